"""train.py one rank of which hangs: `python hang.py HOW[@WHERE] <train.py arguments>`. Rank 1, in its third step, or
where WHERE says: `data`, which rank 0 prepares, `engine`, `save`; `first` is a first step of HOW seconds that goes on.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

from chatgot import cli
from chatgot.checkpoint.save import Saver
from chatgot.data.loader import TrainBatches
from chatgot.engine.step import TrainingEngine
from chatgot.training import preparation, run

HOW, _, WHERE = sys.argv.pop(1).partition("@")
PLACES: dict[str, tuple[Any, str, int]] = {
    "data": (preparation, "prepare_cached", 0),
    "engine": (run, "build", 1),
    "save": (Saver, "begin", 1),
}
original, train_step = TrainBatches.micro_batches, TrainingEngine.train_step


def micro_batches(self: TrainBatches, first_sample: int) -> Iterator[Any]:
    if os.environ["RANK"] == "1" and first_sample == 2 * self.global_batch_size and not WHERE:
        hang()
    return original(self, first_sample)


def slow_first_step(self: TrainingEngine, *args: Any, **kwargs: Any) -> Any:
    if os.environ["RANK"] == "1" and self.engine.global_steps == 0:
        time.sleep(float(HOW))
    return train_step(self, *args, **kwargs)


def hanging(function: Any) -> Any:
    def called(*args: Any, **kwargs: Any) -> Any:
        hang()
        return function(*args, **kwargs)

    return called


def hang() -> None:
    if HOW == "sleeps":
        time.sleep(1000)
    elif HOW == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        time.sleep(2)  # the watchdog has looked on since the first step, which may take longer
        re.match(r"(a+)+$", "a" * 60 + "b")  # one call into C that never gives the GIL back


TrainBatches.micro_batches = micro_batches  # type: ignore[method-assign]
if WHERE == "first":
    TrainingEngine.train_step = slow_first_step  # type: ignore[method-assign]
if WHERE in PLACES and os.environ["RANK"] == str(PLACES[WHERE][2]):
    setattr(*PLACES[WHERE][:2], hanging(getattr(*PLACES[WHERE][:2])))
cli.train()
