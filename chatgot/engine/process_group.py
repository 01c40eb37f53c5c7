"""Joining the process group, and the few collective decisions that every rank must take together."""

from __future__ import annotations

import datetime
import logging
import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from chatgot import __version__
from chatgot.config.device import DeviceFacts
from chatgot.config.errors import ChatGoTError, EnvironmentFault
from chatgot.engine.environment import Place


def device_facts() -> DeviceFacts:
    """What this machine's accelerator can compute in."""
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        # fp16 needs tensor cores to be worth it, but every CUDA device computes it. Emulated bf16 (before Ampere) is
        # slower than fp32.
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return DeviceFacts(kind="cuda", bf16=bf16, fp16=True, name=torch.cuda.get_device_name())
    return DeviceFacts(kind="cpu", bf16=True, fp16=bool(torch.ops.mkldnn._is_mkldnn_fp16_supported()), name="cpu")


def join(place: Place, kind: str, timeout_minutes: float = 10.0) -> torch.device:
    """Initialise torch.distributed through DeepSpeed; returns this rank's device.

    Does nothing when the group exists already (several runs in one process).

    Raises:
        EnvironmentFault: more ranks on this machine than CUDA devices, or the rendezvous failed.
    """
    os.environ.setdefault("DS_ACCELERATOR", kind)
    import deepspeed
    import deepspeed.ops

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # torch 2.13 renamed the collectives that DeepSpeed 0.19.8 calls, and says so in every call.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    # DeepSpeed compiles a shared-memory op (20 s of g++) at the first start on a CPU. Only inference_all_reduce uses it
    # (deepspeed/comm/torch.py); an empty table of compatible ops skips it.
    deepspeed.ops.__dict__["__compatible_ops__"] = {}
    device = torch.device("cpu")
    if kind == "cuda":
        devices, index = torch.cuda.device_count(), place.local_rank
        if place.launcher in ("slurm", "mpi") and devices == 1:
            index = (
                0  # the scheduler shows every task its own device (srun --gpus-per-task 1); DeepSpeed reads LOCAL_RANK
            )
            os.environ["LOCAL_RANK"] = "0"
        if index >= devices:
            raise EnvironmentFault(
                f"local rank {index}: this machine has {devices} CUDA devices; start fewer ranks per machine"
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if kind == "cuda" else "gloo"
        try:
            deepspeed.init_distributed(
                backend, auto_mpi_discovery=False, verbose=False, timeout=datetime.timedelta(minutes=timeout_minutes)
            )
        except (RuntimeError, ValueError) as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise EnvironmentFault(
                f"rank {place.rank} of {place.world_size} could not join the process group at {where}: {error}; "
                "is the port free (MASTER_PORT), and did every rank start?"
            ) from error
    return device


def versions() -> dict[str, str]:
    """Of what computes: part of every checkpoint's manifest."""
    import deepspeed

    return {"chatgot": __version__, "torch": torch.__version__, "deepspeed": deepspeed.__version__}


def device_name(device: torch.device) -> str:
    """What decides how a sum is rounded, beside the number of threads: the GPU's name, or the CPU's vector unit ('cpu
    AVX512').
    """
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu {torch.backends.cpu.get_cpu_capability()}"
    )


def deterministic(device: torch.device) -> bool:
    """Whether the same step on the same device gives the same bits: CUDA's kernels promise it on request only."""
    return device.type == "cpu" or torch.are_deterministic_algorithms_enabled()


class ControlGroup:
    """Small decisions shared by all ranks over gloo, so that no GPU is synchronised for them."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        alone = self.world_size == 1
        self._group: Any = (
            None if alone else (dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo"))
        )

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether any rank raised it. Collective."""
        return self.exchange(flags, ())[0]

    def exchange(self, flags: Sequence[bool], sums: Sequence[float]) -> tuple[tuple[bool, ...], tuple[float, ...]]:
        """For each flag, whether any rank raised it, and each number summed over the ranks in fp64. One collective, for
        both.

        Whole numbers below 2**32 are summed exactly for up to 2**20 ranks.
        """
        if self.world_size == 1:
            return tuple(flags), tuple(sums)
        shared = torch.tensor([*map(float, flags), *sums], dtype=torch.float64)
        dist.all_reduce(shared, group=self._group)
        found = shared.tolist()
        return tuple(raised > 0 for raised in found[: len(flags)]), tuple(found[len(flags) :])

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank. Collective."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def from_rank_0(self, value: Any) -> Any:
        """Rank 0's value on every rank. Collective."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def barrier(self) -> None:
        """Wait for every rank. Collective."""
        self.any(False)

    def agree(self, error: ChatGoTError | None) -> None:
        """Raise on every rank if any rank met an error: nobody goes on alone, and nobody waits for the dead.
        Collective.

        Raises:
            ChatGoTError: the error of the lowest rank that had one, with its exit code.
        """
        errors = self.gather(None if error is None else (type(error), str(error)))
        for rank, found in enumerate(errors):
            if found is not None:
                if error is not None and rank == self.rank:
                    raise error
                kind, message = found
                raise kind(message if self.world_size == 1 else f"rank {rank}: {message}")
