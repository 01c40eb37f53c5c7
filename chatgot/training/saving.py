"""When a run saves, what a save that fails means for it, and how it is asked to stop: once politely, twice at once."""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import chatgot.run_folder as run_folder
from chatgot.checkpoint.load import Found, expected_bytes
from chatgot.checkpoint.manifest import ClientState, RunFields, StateFields
from chatgot.checkpoint.retention import preflight
from chatgot.checkpoint.save import Saved, Saver
from chatgot.checkpoint.writing import estimate
from chatgot.distributed import ControlGroup
from chatgot.engine.step import TrainingEngine
from chatgot.errors import EXIT_SECOND_INTERRUPT, CheckpointError
from chatgot.training.records import Records

logger = logging.getLogger(__name__)

FAILURES = 3
"""Saves in a row that must fail before the run ends."""


class Saving:
    """The saves of one run: in the background if chatgot.checkpoint.async says so. Every rank has one."""

    def __init__(self, saver: Saver, records: Records) -> None:
        self.saver = saver
        self._records = records
        self._last = time.monotonic()
        self._failures = 0

    def minutes_over(self) -> bool:
        """Whether chatgot.checkpoint.every_minutes have passed since the last save, by rank 0's clock."""
        minutes = self.saver.config.every_minutes
        return minutes is not None and self.saver.ranks.rank == 0 and time.monotonic() - self._last >= 60 * minutes

    def due(self, step: int, minutes_over: bool, improved: bool) -> bool:
        """Whether the state after this step is to be saved. The same on all ranks if the arguments are."""
        config = self.saver.config
        by_step = config.every_steps is not None and step % config.every_steps == 0
        return by_step or minutes_over or (improved and config.keep_best > 0)

    def save(self, engine: Any, client_state: ClientState, fields: StateFields, must: bool) -> None:
        """Save the state as it is, after the save that is still under way. Collective.

        Args:
            must: wait for it, and let a failure end the run: it is the last chance.

        Raises:
            CheckpointError: it failed, and it must not, or two before it have failed too.
            NumericsError: a value is not finite; nothing was written.
        """
        self.finish()
        try:
            self.saver.begin(engine, client_state, fields)
        except CheckpointError as error:
            self._failed(error, must)
            return
        self._last = time.monotonic()
        if must or not self.saver.config.async_:
            self.finish(must)

    def go_on(self) -> None:
        """Take the next part of the save that is under way, when no rank is busy with the last one. Collective."""
        try:
            self._published(self.saver.advance())
        except CheckpointError as error:
            self._failed(error, must=False)

    def finish(self, must: bool = False) -> None:
        """Wait until the save that is under way is published, if there is one; see `save`. Collective."""
        try:
            self._published(self.saver.finish() if self.saver.pending else None)
        except CheckpointError as error:
            self._failed(error, must)

    def _failed(self, error: CheckpointError, must: bool) -> None:
        self._failures += 1
        self._records.event("save_failed", step=self.saver.failed_step, error=str(error), in_a_row=self._failures)
        if must or self._failures >= FAILURES:
            raise error
        logger.warning(f"{error}; training goes on, the next save will try again")

    def _published(self, saved: Saved | None) -> None:
        if saved is None:
            return
        self._failures = 0
        for note in saved.notes:
            logger.warning(note)
        times = {"seconds": round(saved.seconds, 3), "stalled_seconds": round(saved.stalled_seconds, 3)}
        self._records.event("saved", step=saved.step, tag=saved.tag, **times, pruned=list(saved.pruned))


def open_saver(
    out_dir: Path, engine: TrainingEngine, fields: RunFields, resumed: Found | None, max_steps: int, ranks: ControlGroup
) -> tuple[Saver, list[str]]:
    """The saver of the run's checkpoints, and lines for the log: whether those that it will make fit on the disk.

    Raises:
        ConfigError: on all ranks; chatgot.checkpoint.disk_budget_gb is too small.
        CheckpointError: on all ranks; not even one checkpoint fits.
    """
    folder, damaged, config = out_dir / run_folder.CHECKPOINTS, set(), engine.config
    if resumed is not None and folder.is_dir() and resumed.folder.samefile(folder):
        damaged = set(resumed.damaged)
    estimated_bytes = estimate(engine.engine, ranks)
    saver = Saver(folder, config.chatgot.checkpoint, ranks, estimated_bytes=estimated_bytes, damaged=damaged)

    def look() -> list[str]:
        expected = expected_bytes(folder, fields, estimated_bytes, damaged)
        return preflight(folder, saver.config, expected, max_steps, config.path, damaged)

    return saver, ranks.on_rank_0(look) if engine.engine.global_steps < max_steps else []


class StopSignals:
    """Within `with`, SIGTERM, SIGINT and SIGUSR1 raise a flag for the loop; a second SIGINT exits 130 at once."""

    handled = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
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
