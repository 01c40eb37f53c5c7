"""Ranks started by one of our own programs (`verify --replay`, `rehearse`) through launch/run, and what they said."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from chatgot.distributed import python_path
from chatgot.errors import ChatGoTError

_OWN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
"""What a launcher may have told this process, and is not for the ranks."""


def launch(
    ranks: int, words: Sequence[str], environment: Mapping[str, str], log: Path, timeout: float | None = None
) -> tuple[int | None, str]:
    """Run launch/run with `words`; returns its exit code (None: not done after `timeout` seconds, and ended) and what
    was said, which is left in `log`.

    Args:
        environment: of the ranks, beside PYTHONPATH.
    """
    here = {name: value for name, value in environment.items() if name not in _OWN}
    start = "import sys; from chatgot.launcher import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", start, "--nproc", str(ranks), *words]
    with open(log, "w+", encoding="utf-8", errors="replace") as file:
        process = subprocess.Popen(
            command, env={**here, "PYTHONPATH": python_path()}, stdout=file, stderr=subprocess.STDOUT
        )
        code = None
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            pass  # the caller is told by None
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait()
        file.seek(0)
        return code, file.read()


def refusal(said: str) -> str:
    """The refusal in what ranks said, else their last words."""
    return (said.rpartition("\nchatgot: ")[2] if "\nchatgot: " in said else said[-2000:]).strip()


def run_rank(rank: Callable[[dict[str, Any]], None]) -> None:
    """Be a rank: give `rank` the task that the first argument names. A refusal ends the process with its code."""
    try:
        rank(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    except ChatGoTError as error:
        print(f"\nchatgot: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)  # see cli.train: the process group is still joined
