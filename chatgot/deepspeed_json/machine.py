"""What this machine has, found out without importing anything heavy."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path


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
