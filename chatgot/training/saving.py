"""When a run saves, what it saves of its own beside the engine, and what a save that fails means for it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import chatgot.run_folder as run_folder
from chatgot.checkpoint.load import Found, expected_bytes
from chatgot.checkpoint.manifest import ClientState, RunFields, StateFields
from chatgot.checkpoint.retention import preflight
from chatgot.checkpoint.save import Saved, Saver
from chatgot.distributed import ControlGroup
from chatgot.engine.step import TrainingEngine
from chatgot.errors import CheckpointError, FolderMovedError
from chatgot.observe.progress import human_seconds
from chatgot.run_folder import moved_to
from chatgot.training.records import Records

logger = logging.getLogger(__name__)

FAILURES = 3
"""Saves in a row that must fail before the run ends, spread over chatgot.checkpoint.every_minutes at least."""
RETRY_MINUTES = 2.0
"""What they are spread over where the JSON does not save by time. They are tried again at the usual steps then."""


@dataclass
class Position:
    """What the loop knows and the engine does not; saved in every checkpoint."""

    next_sample: int = 0
    """Global index of the first sample that has not been trained on."""
    skipped_samples: int = 0
    """How many of the samples before it rollbacks have left out."""
    best_val_loss: float | None = None
    last_val: dict[str, float] = field(default_factory=dict)
    owed: tuple[str, ...] = ()
    """What is due after the last step and not done yet: "evaluation", "samples"."""

    @classmethod
    def of(cls, state: ClientState) -> Position:
        """The position that a checkpoint was saved at. Older ones know no rollbacks and nothing that is owed."""
        skipped, owed = state.get("skipped_samples", 0), tuple(state.get("owed", ()))
        return cls(state["next_sample"], skipped, state["best_val_loss"], state["last_val"], owed)


class Saving:
    """The saves of one run: in the background if chatgot.checkpoint.async says so. Every rank has one."""

    def __init__(self, saver: Saver, records: Records, clock: Callable[[], float] = time.monotonic) -> None:
        self.saver = saver
        self._records = records
        self._clock = clock
        self._last = clock()
        """When the last save ended, well or not."""
        self._failures = 0
        self._first_failure = 0.0
        """When the first of them ended."""
        self._step: int | None = None
        """Whose state is saved."""

    def minutes_over(self, step: int) -> bool:
        """Whether it is time to save the state after a step, by rank 0's clock, none being under way and it not being
        saved yet.

        That is chatgot.checkpoint.every_minutes after the last one ended, a third of that after the first failure and
        two thirds after the second one: a disk that is full for a moment ends no run. It is also time once the run
        folder is not where it was, which the save then refuses on all ranks.
        """
        if self.saver.ranks.rank == 0 and moved_to(self.saver.folder.parent) is not None:
            return True
        minutes = self.saver.config.every_minutes
        if minutes is None or self.saver.pending or self._step == step or self.saver.ranks.rank != 0:
            return False
        return self._clock() - self._last >= 60 * minutes * self._share

    def next_one(self, step: int) -> str | None:
        """When the next save is due by steps or by time, in short: 'in 40 steps or 1m20s'; None: neither."""
        config, left = self.saver.config, []
        if config.every_steps is not None:
            left.append(f"{config.every_steps - step % config.every_steps} steps")
        if config.every_minutes is not None:
            left.append(human_seconds(max(0.0, self._last + 60 * config.every_minutes - self._clock())))
        return f"in {' or '.join(left)}" if left else None

    def due(self, step: int, minutes_over: bool, improved: bool) -> bool:
        """Whether the state after this step is to be saved. The same on all ranks if the arguments are."""
        config = self.saver.config
        if self._failures and config.every_minutes is not None:
            return minutes_over
        by_step = config.every_steps is not None and step % config.every_steps == 0
        return by_step or minutes_over or (improved and config.keep_best > 0)

    def save(self, engine: Any, client_state: ClientState, fields: StateFields, must: bool) -> None:
        """Save the state as it is, after the save that is still under way. Collective.

        Args:
            must: wait for it, and let a failure end the run: it is the last chance.

        Raises:
            CheckpointError: it failed, and it must not, or saves have failed for too long.
            NumericsError: a value is not finite; nothing was written.
        """
        self.finish()
        self._records.flush()
        try:
            self.saver.begin(engine, client_state, fields)
        except CheckpointError as error:
            self._failed(error, must)
            return
        self._step = engine.global_steps
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
        self._last, self._step = self._clock(), None
        self._first_failure = self._first_failure if self._failures else self._last
        self._failures += 1
        self._records.event("save_failed", step=self.saver.failed_step, error=str(error), in_a_row=self._failures)
        minutes = self.saver.config.every_minutes
        spread = self._last - self._first_failure >= 60 * (RETRY_MINUTES if minutes is None else minutes)
        if (
            must
            or isinstance(error, FolderMovedError)
            or self.saver.ranks.from_rank_0(self._failures >= FAILURES and spread)
        ):
            raise error
        then = "the next save will try again"
        if minutes is not None:
            then = f"it is tried again in {60 * minutes * self._share:.3g} s"
        logger.warning(f"{error}; training goes on, {then}")

    @property
    def _share(self) -> float:
        """How much of every_minutes lies between the last save and the next, so that FAILURES fill it."""
        return min(self._failures, FAILURES - 1) / FAILURES if self._failures else 1.0

    def _published(self, saved: Saved | None) -> None:
        if saved is None:
            return
        self._last, self._failures = self._clock(), 0
        for note in saved.notes:
            logger.warning(note)
        times = {"seconds": round(saved.seconds, 3), "stalled_seconds": round(saved.stalled_seconds, 3)}
        self._records.event("saved", step=saved.step, tag=saved.tag, **times, pruned=list(saved.pruned))


def open_saver(
    out_dir: Path,
    engine: TrainingEngine,
    estimated_bytes: int,
    fields: RunFields,
    resumed: Found | None,
    max_steps: int,
    ranks: ControlGroup,
) -> tuple[Saver, list[str]]:
    """The saver of the run's checkpoints, and lines for the log: whether those that it will make fit on the disk.

    Args:
        estimated_bytes: of one checkpoint, until one shows it.

    Raises:
        ConfigError: on all ranks; chatgot.checkpoint.disk_budget_gb is too small.
        CheckpointError: on all ranks; not even one checkpoint fits.
    """
    folder, damaged, config = out_dir / run_folder.CHECKPOINTS, set(), engine.config
    if resumed is not None and folder.is_dir() and resumed.folder.samefile(folder):
        damaged = set(resumed.damaged)
    saver = Saver(folder, config.chatgot.checkpoint, ranks, estimated_bytes=estimated_bytes, damaged=damaged)

    def look() -> list[str]:
        expected = expected_bytes(folder, fields, estimated_bytes, damaged)
        return preflight(folder, saver.config, expected, max_steps, config.path, damaged)

    return saver, ranks.on_rank_0(look) if engine.engine.global_steps < max_steps else []
