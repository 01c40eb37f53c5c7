"""Joining the process group, and what this machine computes with."""

from __future__ import annotations

import datetime
import logging
import os
import warnings

import torch
import torch.distributed as dist

from chatgot import __version__
from chatgot.devices import DeviceFacts
from chatgot.distributed import Place
from chatgot.errors import MachineError


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
        MachineError: more ranks on this machine than CUDA devices, or the rendezvous failed.
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
            raise MachineError(
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
            raise MachineError(
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
