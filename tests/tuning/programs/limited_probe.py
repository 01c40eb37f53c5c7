"""A real probe with less memory: `hook` refuses large tensors as an allocator would, `rlimit` lowers RLIMIT_AS,
`fraction` limits torch's CUDA allocator. Second argument: bytes."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import deepspeed  # noqa: F401 - mapped before the limit is set
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from chatgot.tuning import probe


class Allocations(TorchDispatchMode):
    """Fails as CUDA's allocator does, in forward and in backward."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() > self.limit:
                raise torch.OutOfMemoryError(f"tried to allocate {tensor.untyped_storage().nbytes()} bytes")
        return out


def mapped_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    kind, limit, task = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    if kind == "hook":
        with Allocations(limit):
            code = probe.main(task)
    elif kind == "fraction":
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
        code = probe.main(task)
    else:
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (mapped_bytes() + limit, hard))
        code = probe.main(task)
    sys.stdout.flush()
    os._exit(code)
