"""What the configuration has to know of the device it will run on. torch is imported only when it is asked."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DeviceFacts:
    """Found out by `device_facts`; a check for another machine states them by hand."""

    kind: Literal["cpu", "cuda"]
    bf16: bool
    """Whether bfloat16 training is supported."""
    fp16: bool
    """Whether float16 training is supported."""
    name: str = ""
    """For messages: 'NVIDIA H100 80GB HBM3'."""
    certain: bool = True
    """False: a guess about another machine, so that what the device lacks is a warning and no refusal."""


def device_facts() -> DeviceFacts:
    """What this machine's accelerator can compute in."""
    import torch

    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        # fp16 needs tensor cores to be worth it, but every CUDA device computes it. Emulated bf16 (before Ampere) is
        # slower than fp32.
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return DeviceFacts(kind="cuda", bf16=bf16, fp16=True, name=torch.cuda.get_device_name())
    return DeviceFacts(kind="cpu", bf16=True, fp16=bool(torch.ops.mkldnn._is_mkldnn_fp16_supported()), name="cpu")


def device_name(device: torch.device) -> str:
    """What decides how a sum is rounded, beside the number of threads: the GPU's name, or the CPU's vector unit ('cpu
    AVX512').
    """
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu {torch.backends.cpu.get_cpu_capability()}"


def deterministic(device: torch.device) -> bool:
    """Whether the same step on the same device gives the same bits: CUDA's kernels promise it on request only."""
    import torch

    return device.type == "cpu" or torch.are_deterministic_algorithms_enabled()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python could not allocate: the device's memory, or on a CPU the host's."""
    import torch

    texts = (
        "DefaultCPUAllocator: can't allocate memory",
        "DefaultCPUAllocator: not enough memory",
        "CUDA out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
    )
    without_memory = isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    return without_memory or isinstance(error, (torch.OutOfMemoryError, MemoryError))
