"""Whether a run is started again after its ranks have ended."""

from __future__ import annotations

from pathlib import Path

import chatgot.run_folder as run_folder
from chatgot.errors import (
    EXIT_CHECKPOINT,
    EXIT_CONFIG,
    EXIT_DATA,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_NUMERICS,
    EXIT_SECOND_INTERRUPT,
)
from chatgot.launcher.supervisor import say

REFUSALS = (EXIT_CONFIG, EXIT_DATA, EXIT_CHECKPOINT, EXIT_NUMERICS)
FINAL = (EXIT_DONE, *REFUSALS, EXIT_INTERRUPTED, EXIT_SECOND_INTERRUPT)
"""A refusal would refuse again, and an interruption was asked for."""


class Restarts:
    """Counts restarts, up to a number, and up to two in a row that made no checkpoint."""

    def __init__(self, allowed: int, out_dir: Path | None) -> None:
        self.allowed = allowed
        self._out_dir = out_dir
        self._made = self._idle = 0
        self._newest = _newest_checkpoint(out_dir)

    def another(self, code: int) -> bool:
        """Whether to start again after this exit code; says why not, where it would be allowed."""
        if code in FINAL or self._made == self.allowed:
            return False
        before, self._newest = self._newest, _newest_checkpoint(self._out_dir)
        nothing_new = self._made and self._newest == before and self._out_dir is not None
        self._idle = self._idle + 1 if nothing_new else 0
        if self._idle == 2:
            say("two restarts in a row have made no checkpoint: it is not started again")
            return False
        self._made += 1
        return True

    def announce(self) -> None:
        """Say which one begins."""
        say(f"restart {self._made} of {self.allowed}: all ranks start again")


def _newest_checkpoint(out_dir: Path | None) -> str | None:
    """Read which checkpoint of a run folder is the newest."""
    try:
        return None if out_dir is None else (out_dir / run_folder.CHECKPOINTS / run_folder.LATEST).read_text()[:1000]
    except (OSError, ValueError):
        return None
