"""From a process to a DeepSpeedEngine: join the process group, then wrap a plain PyTorch model as the JSON says."""

from __future__ import annotations

import contextlib
import datetime
import functools
import logging
import os
import socket
import sys
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from chatgot.deepspeed_json.machine import has_c_compiler
from chatgot.deepspeed_json.optimizers import has_one_group
from chatgot.deepspeed_json.resolve import EngineConfig
from chatgot.distributed import COLLECTIVES, Place, gloo_interface
from chatgot.engine import guards, process_guards
from chatgot.engine.optimizer import build_client_optimizer, is_muon, parameter_groups, weight_decay
from chatgot.engine.step import TrainingEngine
from chatgot.errors import ConfigError, MachineError
from chatgot.model.gpt import GPT
from chatgot.version import __version__


def join(place: Place, kind: str, timeout: datetime.timedelta = COLLECTIVES) -> torch.device:
    """Initialise torch.distributed through DeepSpeed, unless an earlier run of this process has; returns the device.

    Args:
        timeout: of every process group's collectives, DeepSpeed's own groups included.

    Raises:
        MachineError: more ranks on this machine than CUDA devices, or the rendezvous failed.
    """
    os.environ.setdefault("DS_ACCELERATOR", kind)
    with contextlib.suppress(OSError, RuntimeError):  # no home, or it is read-only: torch takes TMPDIR, as ever
        # torch makes this folder whether or not it compiles anything; kept, compiled code is there for the next start.
        compiled = Path(os.environ.get("CHATGOT_CACHE") or Path.home() / ".cache" / "chatgot") / "inductor"
        compiled.mkdir(parents=True, exist_ok=True)
        if os.access(compiled, os.W_OK):
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled))
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    process_guards.quiet_renamed_collectives()
    process_guards.skip_shared_memory_op()
    process_guards.count_numa_nodes_once()
    process_guards.time_out_alike(timeout)
    device = _own_cuda_device(place) if kind == "cuda" else torch.device("cpu")
    if not dist.is_initialized():
        if place.world_size > 1 and (interface := gloo_interface(os.environ["MASTER_ADDR"])) is not None:
            _take_interface(place, interface)
        backend = "nccl" if kind == "cuda" else "gloo"
        try:
            deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
        except (RuntimeError, ValueError) as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise MachineError(
                f"rank {place.rank} of {place.world_size} could not join the process group at {where}: {error}; "
                "is the port free (MASTER_PORT), and did every rank start?"
            ) from error
    return device


def _take_interface(place: Place, interface: str) -> None:
    """Let gloo use an interface, unless the user has named one, and say so once a machine."""
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
        if place.local_rank == 0:
            host = socket.gethostname()
            why = f"host {host}: its own name resolves to the loopback, or to no address of it"
            print(
                f"chatgot: {why}; the ranks talk over {interface}, which reaches {os.environ['MASTER_ADDR']} "
                f"(GLOO_SOCKET_IFNAME names another)",
                file=sys.stderr,
            )


def _own_cuda_device(place: Place) -> torch.device:
    devices, index = torch.cuda.device_count(), place.local_rank
    if place.launcher in ("slurm", "mpi") and devices == 1:
        index = 0  # the scheduler shows every task its own device (srun --gpus-per-task 1); DeepSpeed reads LOCAL_RANK
        os.environ["LOCAL_RANK"] = "0"
    if index >= devices:
        raise MachineError(
            f"local rank {index}: this machine has {devices} CUDA devices; start fewer ranks per machine"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def build(model: GPT, config: EngineConfig, device: torch.device) -> TrainingEngine:
    """Wrap `model` in a DeepSpeedEngine. The process group must exist.

    Raises:
        ConfigError: the JSON's optimizer section is missing or does not fit the optimizer, or DeepSpeed refuses it.
    """
    import deepspeed

    if config.optimizer is None:
        raise ConfigError(f"{config.path}: optimizer: missing; without it there is nothing to train with")
    in_one = has_one_group(config.zero_stage, config.optimizer.type, config.offload_optimizer != "none")
    groups, given = parameter_groups(model, weight_decay(config), in_one), dict(config.deepspeed)
    optimizer, chosen = build_client_optimizer(config, groups)
    notes = [wire_activation_checkpointing(model, config), chosen]
    if optimizer is not None:
        del given["optimizer"]
        if config.offload_optimizer != "none" and given.get("zero_force_ds_cpu_optimizer", True):
            given["zero_force_ds_cpu_optimizer"] = False
            why = "torch's fused AdamW steps on the CPU as DeepSpeed's CPUAdam would"
            notes.append(f"zero_force_ds_cpu_optimizer = false: {why}")
    if is_muon(config):
        notes += _spare_muon_the_compilers(given, device)
    if device.type == "cpu" or not has_c_compiler("cuda"):
        process_guards.run_muon_uncompiled()
    process_guards.quiet_memory_report(config.deepspeed)
    process_guards.forget_autocast()
    shared_out = guards.sharing_out_from_the_cpu(model) if config.zero_stage == 3 else contextlib.nullcontext()
    own = None if optimizer is not None else cast(Any, groups)  # annotated as a Module, takes groups
    try:
        with shared_out:
            engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, model_parameters=own, config=given, dist_init_required=False
            )
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f"{config.path}: DeepSpeed refuses it: {error}") from error
    except RuntimeError as error:  # of an operator that is compiled at the first start
        if "failed to build" not in str(error):
            raise
        raise MachineError(f"{config.path}: {error} It needs g++ and ninja: {error.__cause__}") from error
    except ImportError as error:  # of a monitor, or of a package that an optimizer or an operator needs
        what = f"DeepSpeed needs what is not installed here: {error}"
        raise MachineError(f"{config.path}: {what}; install it, or take the section out") from error
    if in_one:
        guards.adopt_new_adagrad(engine)
    if config.chatgot.compile.enabled and not has_c_compiler(device.type):
        why = "this machine has no C compiler, which torch.compile needs; install gcc and g++"
        notes.append(f"torch.compile: off, although chatgot.compile.enabled = true: {why}")
    elif config.chatgot.compile.enabled:
        engine.compile(compile_kwargs={"mode": config.chatgot.compile.mode})
        notes.append(f"torch.compile: on (mode {config.chatgot.compile.mode}); the first steps take longer")
    return TrainingEngine(engine, config, device, notes)


def wire_activation_checkpointing(model: GPT, config: EngineConfig) -> str:
    """Make `model` recompute the blocks that the JSON asks for; returns the line that says so. Needs the process group.

    The presence of the JSON's section turns recomputation on. DeepSpeed by itself only reads it
    (deepspeed.checkpointing.configure); each of its keys is obeyed by deepspeed.checkpointing.checkpoint.

    Raises:
        ConfigError: contiguous_memory_optimization has room for fewer blocks than are recomputed.
    """
    if config.activation_backend is None:
        model.set_activation_checkpointing(None)
        return "activation checkpointing: off (no activation_checkpointing section in the JSON)"
    every = config.chatgot.activation_checkpointing.every_n_layers
    which = "every block is" if every == 1 else f"one block in {every} is"
    if config.activation_backend == "torch":
        model.set_activation_checkpointing(functools.partial(torch_checkpoint, use_reentrant=False), every)
        return f"activation checkpointing: {which} recomputed, by torch.utils.checkpoint (non-reentrant)"
    import deepspeed

    section, recomputed = dict(config.activation_checkpointing or {}), len(range(0, len(model.layers), every))
    room = section.get("number_checkpoints") or recomputed
    # DeepSpeed allocates this room and fails at the block after it (checkpointing.py, partition_activations).
    if section.get("contiguous_memory_optimization") and room < recomputed:
        raise ConfigError(
            f"{config.path}: activation_checkpointing.number_checkpoints = {room}: contiguous_memory_optimization must "
            f"have room for the {recomputed} blocks that this model recomputes; write {recomputed}"
        )
    section["number_checkpoints"] = room
    deepspeed.checkpointing.configure(None, deepspeed_config={**config.deepspeed, "activation_checkpointing": section})
    model.set_activation_checkpointing(deepspeed.checkpointing.checkpoint, every)
    return f"activation checkpointing: {which} recomputed, by deepspeed.checkpointing"


def _spare_muon_the_compilers(given: dict[str, Any], device: torch.device) -> list[str]:
    """Take torch's Adam for Muon's Adam half, and on a CPU eager PyTorch for Newton-Schulz; returns notes."""
    notes, params = [], given["optimizer"].get("params") or {}
    if "torch_adam" not in params:
        given["optimizer"] = {**given["optimizer"], "params": {**params, "torch_adam": True}}
        why = "Muon's Adam half is torch's; DeepSpeed's is the same update, but needs a compiler"
        notes.append(f"optimizer.params.torch_adam = true: {why}")
    if device.type == "cpu":
        notes.append("Muon: not compiled on a CPU, where compiling takes longer than it saves")
    elif not has_c_compiler("cuda"):
        notes.append("Muon: not compiled, and slower for it: this machine has no C compiler; install gcc")
    return notes


def versions() -> dict[str, str]:
    """Of what computes: part of every checkpoint's manifest."""
    import deepspeed

    return {"chatgot": __version__, "torch": torch.__version__, "deepspeed": deepspeed.__version__}
