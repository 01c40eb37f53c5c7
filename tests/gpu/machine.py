"""Where the GPU tests run: on one CUDA device, or, to try the tests themselves, on the CPU with tiny sizes."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from typing import Any

DRY_RUN = os.environ.get("CHATGOT_GPU_TESTS_ON_CPU") == "1"
"""Everything that a CPU can do too: fp32 and bf16, no fp16, no activations moved to the CPU, the large model made
small.
"""

KIND = "cpu" if DRY_RUN else "cuda"


def missing() -> str | None:
    """Why the GPU tests cannot run here; None where they can."""
    if DRY_RUN:
        return None
    try:
        import torch
    except ImportError:
        return "no CUDA device can be used: torch is not installed"
    if not torch.cuda.is_available():
        return f"no CUDA device (torch {torch.__version__})"
    if os.environ.get("DS_ACCELERATOR", "cuda") != "cuda":
        return f"DS_ACCELERATOR = {os.environ['DS_ACCELERATOR']}: the GPU tests need cuda"
    return None


def device_facts() -> dict[str, Any] | None:
    """Name, memory and driver of the device; None without one."""
    if DRY_RUN or missing() is not None:
        return None
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "memory_gib": round(properties.total_memory / 2**30, 2),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "driver": _driver(),
    }


def versions() -> dict[str, str | None]:
    """Of Python and of the packages that matter here; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "deepspeed", "triton", "numpy", "transformers", "pytest"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    if found["torch"] is not None:
        import torch

        found["torch"], found["cuda"] = torch.__version__, torch.version.cuda
    if found["deepspeed"] is None and missing() is None:  # on PYTHONPATH without its metadata
        import deepspeed

        found["deepspeed"] = deepspeed.__version__
    return found


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return (subprocess.run(query, capture_output=True, text=True, timeout=60).stdout.strip().splitlines() or [None])[0]
