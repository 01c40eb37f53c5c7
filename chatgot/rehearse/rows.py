"""The table of a rehearsal, and what a start that failed becomes in it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from chatgot.errors import EXIT_DONE, EXIT_ENVIRONMENT, ChatGoTError, MachineError
from chatgot.launcher.ranks import refusal

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


def failed(what: str, code: int | None, said: str) -> ChatGoTError:
    """The row's failure, with the ranks' own exit code."""
    how = f"did not end in {LAUNCH_SECONDS:.0f} s" if code is None else f"ended with exit {code}"
    error = MachineError(f"{what} {how}: {' '.join(refusal(said).split())[:600]}")
    error.exit_code = code if code is not None and 2 <= code <= 5 else EXIT_ENVIRONMENT
    return error
