"""Saving: DeepSpeed's files in a folder that gets its name only when every rank's part of it is hashed and on the disk.

A save has three parts, and all ranks leave each of them together:

1. `Saver.begin`: DeepSpeed collects what is to be saved, and writes it.
2. Every rank flushes and hashes its own files.
3. Rank 0 lists all hashes in the manifest, gives the folder its name, replaces `latest`, and prunes.

With chatgot.checkpoint.async, part 1 only copies to memory, and part 2 writes. Parts 2 and 3 then run in a thread of
their own while training goes on; `Saver.advance` moves from one to the next, when no rank is busy any more. Without it
they run right away, in the same order.
"""

from __future__ import annotations

import contextlib
import errno
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from chatgot.checkpoint import faults
from chatgot.checkpoint.load import expected_bytes
from chatgot.checkpoint.manifest import ClientState, Measured, StateFields
from chatgot.checkpoint.retention import Pruned, make_room, prune
from chatgot.checkpoint.writing import (
    Snapshots,
    check_shared,
    file_operations,
    flush_and_measure,
    publish,
    sweep,
    tag_of,
)
from chatgot.deepspeed_json.settings import CheckpointConfig
from chatgot.distributed import ControlGroup
from chatgot.engine.zero_view import first_non_finite
from chatgot.errors import CheckpointError, NumericsError
from chatgot.run_folder import UNFINISHED, check_in_place

T = TypeVar("T")


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was published."""

    step: int
    tag: str
    seconds: float
    """From the start of the save until it was published and old ones were pruned."""
    stalled_seconds: float
    """Part of it during which training stood still."""
    pruned: tuple[str, ...]
    """Tags that were deleted; known on rank 0."""
    notes: tuple[str, ...]
    """What the user must hear; known on rank 0."""


@dataclass
class _Pending:
    """A save that has begun."""

    step: int
    started: float
    stalled: float
    """Seconds during which training stood still for it."""
    fields: Mapping[str, Any]
    writing: Future[dict[str, Measured]]
    made_room: tuple[str, ...]
    """Tags that were deleted for it; known on rank 0."""
    publishing: Future[Pruned] | None = None


@dataclass
class Saver:
    """Saves the checkpoints of one run into the run folder's `checkpoints`, one at a time. Every rank has one.

    DeepSpeed writes `latest` before the other ranks have finished (engine.py, save_checkpoint), so it is told not to;
    the folder is renamed and `latest` replaced here, after all ranks have reported success.
    """

    folder: Path
    config: CheckpointConfig
    ranks: ControlGroup
    estimated_bytes: int = 0
    """What a checkpoint will take, until one shows it."""
    damaged: set[str] = field(default_factory=set)
    """Tags in the folder that are known not to be whole; known on rank 0."""
    failed_step: int = 0
    """Step of the save that failed last."""
    _notes: list[str] = field(default_factory=list)
    """For the next `Saved`."""
    _pending: _Pending | None = None
    _unfinished: Path | None = None
    """The folder of the save that began last, until it has a tag for a name."""
    _snapshots: Snapshots = field(default_factory=Snapshots)
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"))

    @property
    def pending(self) -> bool:
        """Whether a save has begun and is not published yet; the same on all ranks."""
        return self._pending is not None

    @property
    def busy(self) -> bool:
        """Whether this rank still works on the pending save; when no rank is, `advance`."""
        pending = self._pending
        return pending is not None and not (pending.publishing or pending.writing).done()

    def begin(self, engine: Any, client_state: ClientState, fields: StateFields) -> None:
        """Begin to save the state after the current step; when this returns, training may change it. Collective.

        Args:
            client_state: what DeepSpeed does not save; under one key, because others could overwrite engine attributes.
            fields: the manifest's.

        Raises:
            CheckpointError: on all ranks, if any could not write; then nothing is pending, and nothing was published.
            NumericsError: on all ranks, if any has a value that is not finite; the same.
            ValueError: another save is pending.
        """
        if self._pending is not None:
            raise ValueError(f"the save of step {self._pending.step} is not finished")
        started, step = time.monotonic(), engine.global_steps
        bad = first_non_finite(engine)  # such a checkpoint would push one that is worth something out of the folder
        why = f"step {step}: {bad} has values that are not finite, and such a state is never saved"
        self.ranks.agree(NumericsError(why) if bad else None)
        with self._cleared_away(step):
            made_room, name = self.ranks.on_rank_0(lambda: self._make_ready(fields, step))
            self._unfinished = unfinished = self.folder / name
            self._snapshots.reuse()
            with file_operations(engine, self._snapshots if self.config.async_ else None) as failures:
                engine.save_checkpoint(
                    str(self.folder), tag=unfinished.name, client_state={"chatgot": client_state}, save_latest=False
                )
            self.ranks.agree(_refusal(unfinished, failures[0]) if failures else None)
        writing = self._run(lambda: self._write(unfinished, engine.checkpoint_engine))
        stalled = time.monotonic() - started
        self._pending = _Pending(step, started, stalled, {"step": step, **fields}, writing, made_room)

    def advance(self) -> Saved | None:
        """Go on with the pending save, when no rank is busy; returns what was published, or None. Collective.

        Raises:
            CheckpointError: on all ranks, if any could not write. Nothing is pending then, and nothing was published,
                unless only the flush after the rename or `latest` failed; what is published is whole in any case.
        """
        assert self._pending is not None
        began, pending = time.monotonic(), self._pending
        with self._cleared_away(pending.step):
            if pending.publishing is None:
                gathered = self.ranks.gather(self.ranks.on_every_rank(pending.writing.result))
                alone = self.ranks.rank == 0
                pending.publishing = self._run(lambda: self._publish(pending, gathered) if alone else Pruned())
                pending.stalled += time.monotonic() - began
                return None
            pruned = self.ranks.on_every_rank(pending.publishing.result)
        self._pending = None
        notes, self._notes = (*self._notes, *pruned.warnings), []
        now, deleted = time.monotonic(), (*pending.made_room, *pruned.tags)
        stalled = pending.stalled + now - began
        return Saved(pending.step, tag_of(pending.step), now - pending.started, stalled, deleted, notes)

    def finish(self) -> Saved:
        """Wait until the pending save is published; see `advance`. Collective."""
        while (saved := self.advance()) is None:
            pass
        return saved

    def _run(self, work: Callable[[], T]) -> Future[T]:
        """Begin the work in the thread, and wait for its end unless saves are made in the background."""
        future = self._thread.submit(work)
        if not self.config.async_:
            wait([future])
        return future

    def _make_ready(self, fields: StateFields, step: int) -> tuple[tuple[str, ...], str]:
        """Make the folder, clean it, and make room; returns tags that were deleted for it, and the name of what is to
        be written, which is never another writer's. Rank 0 only.
        """
        check_in_place(self.folder.parent)
        try:
            expected = expected_bytes(self.folder, fields, self.estimated_bytes, self.damaged)
            made_room = make_room(self.folder, self.config, expected, self.damaged)
            self.damaged.update(made_room.damaged)
            self._notes += made_room.warnings
            faults.operation("make the folder and sweep leftovers")
            self.folder.mkdir(parents=True, exist_ok=True)
            self._notes += sweep(self.folder)
        except OSError as error:
            raise _refusal(self.folder, error) from error
        return made_room.tags, f"{UNFINISHED}{tag_of(step)}-{secrets.token_hex(4)}"

    @contextlib.contextmanager
    def _cleared_away(self, step: int) -> Iterator[None]:
        """Forget a save that fails, and make room at once; what cannot be deleted now is swept at the next save."""
        try:
            yield
        except CheckpointError:
            self._pending, self.failed_step = None, step
            if self.ranks.rank == 0 and self._unfinished is not None:
                shutil.rmtree(self._unfinished, ignore_errors=True)
            raise

    def _write(self, folder: Path, files: Any) -> dict[str, Measured]:
        """Part 2: write, flush and hash this rank's files; `files` is DeepSpeed's checkpoint engine."""
        try:
            for path, state in self._snapshots.taken:
                faults.operation(f"save {path.name}")
                files.save(state, str(path))
            return flush_and_measure(folder, self.ranks.rank, self.ranks.world_size)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
            raise _refusal(folder, error) from error

    def _publish(self, pending: _Pending, gathered: list[dict[str, Measured]]) -> Pruned:
        """Part 3: publish, and prune. Rank 0 only."""
        tag = tag_of(pending.step)
        assert self._unfinished is not None
        try:
            check_shared(self._unfinished, gathered)
            notes = publish(self._unfinished, tag, pending.fields, gathered)
        except OSError as error:
            raise _refusal(self.folder / tag, error) from error
        self.damaged.discard(tag)
        pruned = prune(self.folder, self.config, self.damaged)
        self.damaged.update(pruned.damaged)
        return replace(pruned, warnings=(*notes, *pruned.warnings))


def _refusal(path: Path, error: Exception) -> CheckpointError:
    free = ""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        with contextlib.suppress(OSError):
            free = f" ({shutil.disk_usage(path.parent).free / 2**30:.2f} GiB free)"
    untouched = "earlier checkpoints are untouched"
    return CheckpointError(f"{path}: the checkpoint could not be saved: {error}{free}; {untouched}")
