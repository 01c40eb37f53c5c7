"""train.py whose rank 1 hangs in its third step: `python hang.py HOW <train.py arguments>`."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

from chatgot import cli
from chatgot.data.loader import TrainBatches

HOW = sys.argv.pop(1)
original = TrainBatches.micro_batches


def micro_batches(self: TrainBatches, first_sample: int) -> Iterator[Any]:
    if os.environ["RANK"] == "1" and first_sample == 2 * self.global_batch_size:
        hang()
    return original(self, first_sample)


def hang() -> None:
    if HOW == "sleeps":
        time.sleep(1000)
    elif HOW == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        time.sleep(2)  # the watchdog has looked on since the first step, which may take longer
        re.match(r"(a+)+$", "a" * 60 + "b")  # one call into C that never gives the GIL back


TrainBatches.micro_batches = micro_batches  # type: ignore[method-assign]
cli.train()
