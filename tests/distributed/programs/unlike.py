"""train.py with arguments that are not the same on all ranks: {"argv": of all, "more": one list per rank, "torch": one
version per rank, "clock": seconds that each rank's is ahead}.
"""

from __future__ import annotations

import json
import sys
import time

import torch

from chatgot.cli import train
from chatgot.distributed import find_place

if __name__ == "__main__":
    plan, rank = json.loads(sys.argv[1]), find_place().rank
    ahead, now = plan.get("clock", [0, 0])[rank], time.time
    time.time = lambda: now() + ahead
    torch.__version__ = plan.get("torch", [torch.__version__] * 2)[rank]
    train([*plan["argv"], *plan["more"][rank]])
