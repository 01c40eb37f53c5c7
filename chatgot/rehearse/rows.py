"""The table of a rehearsal, and one start of launch/run for a row of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from chatgot.distributed import python_path
from chatgot.errors import EXIT_CHECKPOINT, EXIT_DONE, EXIT_ENVIRONMENT, ChatGoTError, MachineError

LAUNCH_SECONDS = 600.0
"""After which a start of the small model has hung."""


@dataclass
class Table:
    """The rows so far; the first that fails ends the rehearsal."""

    rows: list[tuple[str, str, float, str]] = field(default_factory=list)
    exit_code: int = EXIT_DONE

    def row(self, name: str, work: Callable[[], str]) -> None:
        """Do `work`, which says what it found or raises, and keep its time."""
        if self.exit_code:
            self.rows.append((name, "-", 0.0, "not reached"))
            return
        print(f"rehearsing: {name}", file=sys.stderr, flush=True)
        began, verdict = time.monotonic(), "pass"
        try:
            said = work()
        except ChatGoTError as error:
            self.exit_code, verdict, said = error.exit_code, "FAIL", str(error)
        if said.startswith("skipped"):
            verdict = "skip"
        self.rows.append((name, verdict, time.monotonic() - began, said))

    def __str__(self) -> str:
        first = [said.splitlines() or [""] for *_, said in self.rows]
        return "\n".join(
            f"{name:<18} {verdict:<5} {seconds:6.1f} s  {'; '.join(line.strip() for line in lines if line.strip())}"
            for (name, verdict, seconds, _), lines in zip(self.rows, first)
        )


def launch(ranks: int, words: Sequence[str], folder: Path, on_cpu: bool = True) -> tuple[int | None, str]:
    """Start ranks by launch/run; its exit code (None: it hung, and was ended) and what was said (`folder`/log.txt)."""
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    environment |= {"PYTHONPATH": python_path(), "WANDB_MODE": "offline"}
    environment |= {"DS_ACCELERATOR": "cpu"} if on_cpu else {}
    start = "import sys; from chatgot.launcher import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", start, "--nproc", str(ranks), *words]
    with open(folder / "log.txt", "w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        code: int | None = None
        try:
            code = process.wait(None if not on_cpu else LAUNCH_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait()
        log.seek(0)
        return code, log.read()


def reason(said: str) -> str:
    """The refusal in what ranks said, else their last lines."""
    refused = said.rpartition("\nchatgot: ")[2] if "\nchatgot: " in said else said[-600:]
    return " ".join(refused.split())[:600]


def failed(what: str, code: int | None, said: str) -> ChatGoTError:
    """The row's failure, with the ranks' own exit code."""
    if code is None:
        return MachineError(f"{what} did not end in {LAUNCH_SECONDS:.0f} s: {reason(said)}")
    error = MachineError(f"{what} ended with exit {code}: {reason(said)}")
    error.exit_code = code if code in (*range(2, 6), EXIT_CHECKPOINT) else EXIT_ENVIRONMENT
    return error
