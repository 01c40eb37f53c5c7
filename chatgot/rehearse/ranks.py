"""The ranks of a rehearsal: how they are started, and those of the first start, which train as train.py does until rank
0 is killed as by `kill -9`.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from chatgot.errors import EXIT_DONE, EXIT_ENVIRONMENT, ChatGoTError, MachineError
from chatgot.launcher.ranks import launch, refusal, run_rank

_SECONDS = 600.0
"""After which a start of the small model has hung."""


def start(ranks: int, words: Sequence[str], log: Path, on_cpu: bool = True) -> tuple[int | None, str]:
    """Run launch/run with `words`; returns its exit code (None: it has hung) and what was said."""
    environment = {**os.environ, "WANDB_MODE": "offline"} | ({"DS_ACCELERATOR": "cpu"} if on_cpu else {})
    return launch(ranks, words, environment, log, _SECONDS if on_cpu else None)


def trained(what: str, ranks: int, words: Sequence[str], log: Path, on_cpu: bool = True) -> str:
    """Run launch/run with `words` to its end; returns what was said. Raises what `failed` makes of another end."""
    code, said = start(ranks, words, log, on_cpu)
    if code != EXIT_DONE:
        raise failed(what, code, said)
    return said


def failed(what: str, code: int | None, said: str) -> ChatGoTError:
    """The failure of a start, with the ranks' own exit code."""
    how = f"did not end in {_SECONDS:.0f} s" if code is None else f"ended with exit {code}"
    error = MachineError(f"{what} {how}: {' '.join(refusal(said).split())[:600]}")
    error.exit_code = code if code is not None and 2 <= code <= 5 else EXIT_ENVIRONMENT
    return error


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
