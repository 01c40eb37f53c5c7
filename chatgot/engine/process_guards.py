"""Patches of DeepSpeed 0.19.8 and torch that hold for the whole process, made before there is an engine."""

from __future__ import annotations

import datetime
import functools
import warnings
from typing import Any

import torch.distributed as dist


def skip_shared_memory_op() -> None:
    """Call before the process group exists: on a CPU DeepSpeed would compile an op at its first start (20 s of g++).

    Only inference_all_reduce uses it (deepspeed/comm/torch.py). An empty table of compatible ops skips it.
    """
    import deepspeed.ops

    deepspeed.ops.__dict__["__compatible_ops__"] = {}


def quiet_renamed_collectives() -> None:
    """torch 2.13 renamed the collectives that DeepSpeed calls, and says so in every call."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")


def quiet_memory_report(given: dict[str, Any]) -> None:
    """The BF16_Optimizer reports memory 16 times at its start: print that only if the JSON says memory_breakdown."""
    from deepspeed.runtime import bf16_optimizer, utils

    def see_memory_usage(message: str, force: bool = False) -> None:
        utils.see_memory_usage(message, force=force and bool(given.get("memory_breakdown")))

    bf16_optimizer.see_memory_usage = see_memory_usage


def count_numa_nodes_once() -> None:
    """ZeRO-3 asks a CPU how many devices it has at every reduction, and each time DeepSpeed starts numactl to count."""
    from deepspeed.utils import numa

    if not hasattr(numa.get_numa_cores, "cache_info"):
        numa.get_numa_cores = functools.cache(numa.get_numa_cores)


def run_muon_uncompiled() -> None:
    """Leave Muon's Newton-Schulz iteration to eager PyTorch: on a CPU torch.compile needs g++ and about a minute.

    Call before every initialize. DeepSpeed decorates its functions as the module is imported
    (zero/muon/original_muon.py), by every ZeRO engine, whatever its optimizer. Decorating alone loads torch's compiler,
    3 s of a start, so that nothing is decorated here if this is the first import.
    """
    from deepspeed.runtime import compiler

    compile, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        from deepspeed.runtime.zero.muon import muon_optimizer, original_muon
    finally:
        compiler.compile = compile

    for module in (original_muon, muon_optimizer):
        for name, value in list(vars(module).items()):
            eager = getattr(value, "_torchdynamo_orig_callable", None)
            if eager is not None:
                setattr(module, name, eager)


def forget_autocast() -> None:
    """Call before every initialize: an engine with torch_autocast leaves its mark on the process (torch_autocast.py).

    A later ZeRO engine would scale its loss and communicate in the former one's dtype.
    """
    from deepspeed.runtime import torch_autocast

    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
    torch_autocast.TORCH_AUTOCAST_DTYPE = None


def time_out_alike(timeout: datetime.timedelta) -> None:
    """Give the groups that DeepSpeed makes the timeout of the run's: its new_group passes none on, so that torch's own
    default holds for them (30 minutes over gloo, 10 over NCCL), and it waits in them in every step.
    """
    from deepspeed.comm.torch import TorchBackend

    def new_group(self: TorchBackend, ranks: Any) -> Any:
        return dist.new_group(ranks, timeout=timeout)

    TorchBackend.new_group = new_group
