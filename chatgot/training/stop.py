"""How a run is asked to stop: once politely, twice at once. Works before torch is imported."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

from chatgot.errors import EXIT_INTERRUPTED, EXIT_SECOND_INTERRUPT, RunAgainError

STUCK_SECONDS = 2.0
"""After a signal, how long a start may take to come back to Python before its process is ended."""


class StopSignals:
    """Within `with`, SIGTERM, SIGINT and SIGUSR1 raise a flag for the loop; a second SIGINT exits 130 at once.

    While the run is `starting` they end it, since nothing can be lost yet; also where the process waits for another
    rank in a call out of Python, which would notice a signal only when the other comes.
    """

    handled = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, starting: bool = False) -> None:
        self.starting = starting
        self.received: str | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._writing: int | None = None

    def __enter__(self) -> StopSignals:
        for number in self.handled:
            self._previous[number] = signal.signal(number, self._handle)
        if self.starting:
            reading, self._writing = os.pipe()
            os.set_blocking(self._writing, False)
            signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)  # written to at once, wherever Python is
            threading.Thread(target=self._end_if_stuck, args=(reading,), name="stop", daemon=True).start()
        return self

    def started(self) -> None:
        """From now on something can be lost: signals are left to the loop."""
        self.starting = False
        if self._writing is not None:
            signal.set_wakeup_fd(-1)
            os.close(self._writing)  # ends the thread
            self._writing = None

    def _end_if_stuck(self, reading: int) -> None:
        while number := os.read(reading, 1):
            time.sleep(STUCK_SECONDS)
            if self.starting and number[0] in self.handled:  # else the handler has been called
                print(f"chatgot: {_before_the_first_step(signal.Signals(number[0]).name)}", file=sys.stderr, flush=True)
                os._exit(EXIT_INTERRUPTED)
        os.close(reading)

    def __exit__(self, *exc: object) -> None:
        self.started()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == "SIGINT":
            os._exit(EXIT_SECOND_INTERRUPT)
        self.received = signal.Signals(number).name
        if self.starting:
            self.starting = False  # once: what ends the run may be cut short by no second one
            error = RunAgainError(_before_the_first_step(self.received))
            error.shared = True  # a launcher sends it to every rank
            raise error


def _before_the_first_step(received: str) -> str:
    return f"stopped by {received} before the first step: nothing is lost. Run the same command again to go on"
