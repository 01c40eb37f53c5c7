"""How much memory a process may still take and how much it took: of its CUDA device, or on a CPU of the machine, its
cgroup and limits. Imports torch only where a CUDA device is asked.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def available_bytes(device: torch.device) -> int:
    """Measure what this process could take now, above what it has."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    bounds = [_kib("/proc/meminfo", "MemAvailable")]
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        bounds.append(limit - _status("VmSize"))
    if (left_in_cgroup := _cgroup()) is not None:
        bounds.append(left_in_cgroup)
    return max(min(bounds), 0)


def peak(device: torch.device, available_before: int) -> dict[str, int]:
    """Measure the most memory that was in use, and the limit: {"peak_bytes", "limit_bytes"}.

    Args:
        available_before: `available_bytes` at the start.
    """
    if device.type == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info(device)
        others = total - free - torch.cuda.memory_reserved(device)
        return {"peak_bytes": others + torch.cuda.max_memory_reserved(device), "limit_bytes": total}
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit - _status("VmPeak") < available_before:
        return {"peak_bytes": _status("VmPeak"), "limit_bytes": limit}
    used = _status("VmHWM")
    return {"peak_bytes": used, "limit_bytes": used + min(available_bytes(device), available_before)}


def peak_memory_gib(device_kind: str) -> float:
    """Measure the most memory that this rank has held so far, in GiB: tensors on the current CUDA device for "cuda",
    else the process's resident set.
    """
    if device_kind == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**30
    # Not getrusage where there is a choice: its ru_maxrss is handed down through fork and exec (Linux), the launcher's
    # peak included.
    if sys.platform == "linux":
        return _status("VmHWM") / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, KiB elsewhere


def _cgroup() -> int | None:
    """Bytes left in this process's cgroup (version 2, or version 1's memory controller); None: there is no limit."""
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            allowed = Path(limit).read_text().strip()
            taken = int(Path(used).read_text())
        except OSError:
            continue
        return None if allowed == "max" or int(allowed) >= 2**60 else int(allowed) - taken
    return None


def _status(name: str) -> int:
    return _kib("/proc/self/status", name)


def _kib(path: str, name: str) -> int:
    """Bytes of the line 'name:  1234 kB'."""
    line = next(line for line in Path(path).read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024
