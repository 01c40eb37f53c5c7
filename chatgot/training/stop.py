"""How a run is asked to stop: once politely, twice at once. Works before torch is imported."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

from chatgot.errors import EXIT_SECOND_INTERRUPT, RunAgainError


class StopSignals:
    """Within `with`, SIGTERM, SIGINT and SIGUSR1 raise a flag for the loop; a second SIGINT exits 130 at once.

    While the run is `starting` they end it, since nothing can be lost yet.
    """

    handled = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, starting: bool = False) -> None:
        self.starting = starting
        self.received: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in self.handled:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == "SIGINT":
            os._exit(EXIT_SECOND_INTERRUPT)
        self.received = signal.Signals(number).name
        if self.starting:
            self.starting = False  # once: what ends the run may be cut short by no second one
            what = f"stopped by {self.received} before the first step"
            error = RunAgainError(f"{what}: nothing is lost. Run the same command again to go on")
            error.shared = True  # a launcher sends it to every rank
            raise error
