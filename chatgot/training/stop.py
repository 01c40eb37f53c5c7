"""Asking a run to stop: once politely, twice at once."""

from __future__ import annotations

import os
import signal
from types import FrameType

from chatgot.errors import EXIT_SECOND_INTERRUPT


class StopSignals:
    """Within `with`, SIGTERM, SIGINT and SIGUSR1 raise a flag that the loop shares between ranks; a second SIGINT exits
    130 at once.
    """

    handled = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        for number in self.handled:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == "SIGINT":
            os._exit(EXIT_SECOND_INTERRUPT)
        self.received = signal.Signals(number).name
