"""How much memory a process may still take, and how much it took: of its CUDA device, or on a CPU of the machine, its
cgroup and limits.
"""

from __future__ import annotations

import resource
from pathlib import Path

import torch


def available_bytes(device: torch.device) -> int:
    """What this process could take now, above what it has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [_meminfo("MemAvailable")]
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        found.append(limit - _status("VmSize"))
    group = _cgroup()
    if group is not None:
        found.append(group)
    return max(min(found), 0)


def peak(device: torch.device, available_before: int) -> dict[str, int]:
    """Most memory that was in use, and the limit.

    Args:
        available_before: `available_bytes` at the start.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        others = total - free - torch.cuda.memory_reserved(device)
        return {"peak_bytes": others + torch.cuda.max_memory_reserved(device), "limit_bytes": total}
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit - _status("VmPeak") < available_before:
        return {"peak_bytes": _status("VmPeak"), "limit_bytes": limit}
    used = _status("VmHWM")
    return {"peak_bytes": used, "limit_bytes": used + min(available_bytes(device), available_before)}


def _cgroup() -> int | None:
    """Bytes left in this process' cgroup (version 2, or version 1's memory controller), None where there is no
    limit.
    """
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


def _meminfo(name: str) -> int:
    return _kib(Path("/proc/meminfo"), name)


def _status(name: str) -> int:
    return _kib(Path("/proc/self/status"), name)


def _kib(path: Path, name: str) -> int:
    line = next(line for line in path.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024
