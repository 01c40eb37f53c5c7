"""Prints how much resident memory reading a checkpoint takes, in bytes: opened, one parameter read, everything read and
kept.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import deepspeed  # noqa: F401 - so that its import is not counted
import torch

from chatgot.checkpoint.load import find
from chatgot.checkpoint.portable import read_portable


def resident() -> int:
    """Anonymous and file-backed pages of this process."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024


def main() -> None:
    found = find(Path(sys.argv[1]))
    assert found is not None
    torch.zeros(1).float()
    before = resident()
    state = read_portable(found)
    opened = resident() - before
    tensors = [t for p in state.parameters.values() for t in (p.weight, *p.moments.values())]
    one = tensors[0].whole()
    read_one = resident() - before
    kept = [one, *(t.whole() for t in tensors)]
    print(
        json.dumps(
            {
                "opened": opened,
                "one": read_one,
                "all": resident() - before,
                "bytes": sum(t.numel() * 4 for t in kept[1:]),
            }
        )
    )


if __name__ == "__main__":
    main()
