"""From a process to a DeepSpeedEngine: join the process group, then wrap a plain PyTorch model as the JSON says."""

from __future__ import annotations

import datetime
import logging
import os
from typing import Any, cast

import torch
import torch.distributed as dist

from chatgot.deepspeed_json.resolve import EngineConfig
from chatgot.distributed import Place
from chatgot.engine import activation_checkpointing, guards
from chatgot.engine.optimizer import build_client_optimizer, is_muon, parameter_groups, weight_decay
from chatgot.engine.step import TrainingEngine
from chatgot.errors import ConfigError, MachineError
from chatgot.model.gpt import GPT
from chatgot.version import __version__


def join(place: Place, kind: str, timeout_minutes: float = 10.0) -> torch.device:
    """Initialise torch.distributed through DeepSpeed, if it is not yet (several runs in one process); returns this
    rank's device.

    Raises:
        MachineError: more ranks on this machine than CUDA devices, or the rendezvous failed.
    """
    os.environ.setdefault("DS_ACCELERATOR", kind)
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    guards.quiet_renamed_collectives()
    guards.skip_shared_memory_op()
    device = _own_cuda_device(place) if kind == "cuda" else torch.device("cpu")
    if not dist.is_initialized():
        backend, timeout = "nccl" if kind == "cuda" else "gloo", datetime.timedelta(minutes=timeout_minutes)
        try:
            deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
        except (RuntimeError, ValueError) as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise MachineError(
                f"rank {place.rank} of {place.world_size} could not join the process group at {where}: {error}; "
                "is the port free (MASTER_PORT), and did every rank start?"
            ) from error
    return device


def _own_cuda_device(place: Place) -> torch.device:
    devices, index = torch.cuda.device_count(), place.local_rank
    if place.launcher in ("slurm", "mpi") and devices == 1:
        index = 0  # the scheduler shows every task its own device (srun --gpus-per-task 1); DeepSpeed reads LOCAL_RANK
        os.environ["LOCAL_RANK"] = "0"
    if index >= devices:
        what = f"this machine has {devices} CUDA devices; start fewer ranks per machine"
        raise MachineError(f"local rank {index}: {what}")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def build(model: GPT, config: EngineConfig, device: torch.device) -> TrainingEngine:
    """Wrap `model` in a DeepSpeedEngine. The process group must exist.

    Raises:
        ConfigError: the JSON's optimizer section is missing, or its parameters do not fit the optimizer.
    """
    import deepspeed

    if config.optimizer is None:
        raise ConfigError(f"{config.path}: optimizer: missing; without it there is nothing to train with")
    groups = parameter_groups(model, weight_decay(config))
    optimizer, chosen = build_client_optimizer(config, groups)
    notes = [activation_checkpointing.wire(model, config), chosen]
    given = dict(config.deepspeed)
    if optimizer is not None:
        del given["optimizer"]
        if config.offload_optimizer != "none" and given.get("zero_force_ds_cpu_optimizer", True):
            given["zero_force_ds_cpu_optimizer"] = False
            notes.append(
                "zero_force_ds_cpu_optimizer = false: torch's fused AdamW steps on the CPU as DeepSpeed's CPUAdam would"
            )
    if is_muon(config):
        notes += _spare_muon_the_compilers(given, device)
    if device.type == "cpu":
        guards.run_muon_uncompiled()
    guards.quiet_memory_report(config.deepspeed)
    guards.forget_autocast()
    own = None if optimizer is not None else cast(Any, groups)  # annotated as a Module, takes groups
    try:
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, model_parameters=own, config=given, dist_init_required=False
        )
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f"{config.path}: DeepSpeed refuses it: {error}") from error
    if config.chatgot.compile.enabled:
        engine.compile(compile_kwargs={"mode": config.chatgot.compile.mode})
        notes.append(f"torch.compile: on (mode {config.chatgot.compile.mode}); the first steps take longer")
    return TrainingEngine(engine, config, device, notes)


def _spare_muon_the_compilers(given: dict[str, Any], device: torch.device) -> list[str]:
    """Muon's Adam half becomes torch's, and on a CPU its Newton-Schulz iteration runs in eager PyTorch; returns notes."""
    notes = []
    params = given["optimizer"].get("params") or {}
    if "torch_adam" not in params:
        given["optimizer"] = {**given["optimizer"], "params": {**params, "torch_adam": True}}
        notes.append(
            "optimizer.params.torch_adam = true: Muon's Adam half is torch's; DeepSpeed's is the same update, but "
            "needs a compiler"
        )
    if device.type == "cpu":
        notes.append("Muon: not compiled on a CPU, where compiling takes longer than it saves")
    return notes


def versions() -> dict[str, str]:
    """Of what computes: part of every checkpoint's manifest."""
    import deepspeed

    return {"chatgot": __version__, "torch": torch.__version__, "deepspeed": deepspeed.__version__}
