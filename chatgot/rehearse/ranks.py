"""A rank of the rehearsal's first start: trains some steps as train.py does, then rank 0 is killed as by `kill -9`.

Started by `chatgot rehearse` through launch/run, with the path of its task.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any, NoReturn

from chatgot.launcher.ranks import run_rank


def _rank(task: dict[str, Any]) -> NoReturn:
    from chatgot.distributed import find_place
    from chatgot.training.run import TrainArguments, prepare_run

    given = task["arguments"]
    arguments = TrainArguments(**{**given, "out_dir": Path(given["out_dir"]), "overrides": tuple(given["overrides"])})
    loop = prepare_run(arguments, find_place())
    with loop.watchdog:
        for step in loop.steps():
            if step == task["steps"]:
                break
        loop.proof.flush()
        loop.ranks.barrier()
        if loop.ranks.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        while True:
            loop.ranks.barrier()  # ends with the peer's death


if __name__ == "__main__":
    run_rank(_rank)
