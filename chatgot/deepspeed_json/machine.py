"""What this machine has, found out without importing anything heavy."""

from __future__ import annotations

import glob
import importlib.util
import os
import shutil
from pathlib import Path

from chatgot.devices import DeviceFacts


def has_package(*names: str) -> bool:
    """Whether one of the packages can be imported; nothing is imported."""
    return any(importlib.util.find_spec(name) is not None for name in names)


def has_command(*names: str) -> bool:
    """Whether one of the programs is on the PATH."""
    return any(shutil.which(name) is not None for name in names)


def has_cuda_compiler() -> bool:
    """nvcc, where DeepSpeed looks for it (torch.utils.cpp_extension)."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return has_command("nvcc") or any(home and Path(home, "bin", "nvcc").exists() for home in homes)


def has_library(name: str) -> bool:
    """Whether the dynamic linker finds lib<name>."""
    from ctypes.util import find_library  # asks other programs, so only when somebody needs to know

    return find_library(name) is not None


def is_writable_folder(path: str) -> bool:
    """Whether a folder is there, and files can be written into it."""
    return os.path.isdir(path) and os.access(path, os.W_OK)


def guess_device() -> DeviceFacts:
    """A CUDA device where the driver shows one and the environment does not hide it, else the CPU.

    Which types a GPU supports is only known to torch, so both are assumed; a CPU trains in fp16 with AVX512-FP16 or
    AMX-FP16 only (oneDNN).
    """
    hidden = os.environ.get("DS_ACCELERATOR") == "cpu" or os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    if not hidden and (glob.glob("/dev/nvidia[0-9]*") or glob.glob("/proc/driver/nvidia/gpus/*")):
        return DeviceFacts("cuda", bf16=True, fp16=True, name="cuda", certain=False)
    return DeviceFacts("cpu", bf16=True, fp16=_cpu_has_fp16(), name="cpu", certain=False)


def assumed_device(kind: str) -> DeviceFacts:
    """The device that --device names: 'auto' is this machine's, 'cuda' a modern GPU, 'cpu' a CPU without fp16
    kernels.
    """
    if kind == "auto":
        return guess_device()
    if kind == "cuda":
        return DeviceFacts("cuda", bf16=True, fp16=True, name="cuda")
    return DeviceFacts("cpu", bf16=True, fp16=False, name="cpu")


def _cpu_has_fp16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return False
    return "avx512_fp16" in flags or "amx_fp16" in flags
