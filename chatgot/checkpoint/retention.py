"""Which checkpoints of a run folder are kept, deleting the others, and whether there is room for the next one.

A checkpoint is good as long as its manifest can be read, its files have the names and sizes that the manifest lists,
and nobody has found their contents changed. One that is not good is never deleted: a person may want to see it. It
counts for no rule but the disk budget.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from chatgot.checkpoint import faults
from chatgot.checkpoint.load import Holdings, Published, examine
from chatgot.deepspeed_json.settings import CheckpointConfig
from chatgot.errors import CheckpointError, ConfigError
from chatgot.run_folder import PRUNED

MARGIN_SHARE, MARGIN_BYTES = 0.03, 64 * 1024
"""What a checkpoint is expected to take at most beyond its expected size: how far the estimate may be off, and what is
no file of its own (folder entries, unfilled blocks)."""
FILES_OF_ANY = 64
"""Free inodes that are asked for where no checkpoint shows how many files one has."""


@dataclass(frozen=True)
class Pruned:
    """What was deleted, and what the user must hear."""

    tags: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    damaged: tuple[str, ...] = ()
    """Tags that turned out not to be good, each with a warning; pass them in from now on, and no warning repeats."""


def budget(config: CheckpointConfig) -> int | None:
    """chatgot.checkpoint.disk_budget_gb in bytes."""
    return None if config.disk_budget_gb is None else int(config.disk_budget_gb * 1e9)


def to_go(
    good: Sequence[Published], config: CheckpointConfig, other_bytes: int = 0, coming: int | None = None
) -> list[Published]:
    """Apply the rules; returns what goes, in the order in which it is to be deleted. Pure.

    Kept: the keep_last that were published last, the keep_best with the lowest val/loss, and every multiple of
    keep_every_steps. All others go, the oldest first. If the folder still holds more than disk_budget_gb: then those
    that keep_every_steps alone keeps, the oldest first; those of keep_best, the worst first; those of keep_last, the
    oldest first; the newest good one never.

    Args:
        other_bytes: what else is in the folder and counts for the budget.
        coming: bytes of a checkpoint that is about to be written and takes one of the keep_last places.
    """
    ordered = sorted(good, key=lambda checkpoint: checkpoint.sequence)
    last = ordered[-(config.keep_last - (coming is not None)) :]
    scored = [c for c in ordered if c.val_loss is not None and math.isfinite(c.val_loss)]
    best = sorted(scored, key=lambda c: (c.val_loss, c.sequence))[: config.keep_best]
    every = [c for c in ordered if config.keep_every_steps and c.step % config.keep_every_steps == 0]
    kept = (("keep_every_steps", every), ("keep_best", best), ("keep_last", last))
    rules = {checkpoint.tag: rule for rule, checkpoints in kept for checkpoint in checkpoints}
    gone = [c for c in ordered if c.tag not in rules]
    total = sum(c.bytes for c in ordered if c.tag in rules) + other_bytes + (coming or 0)
    limit = budget(config)
    if limit is not None:
        turn = [c for c in every if rules[c.tag] == "keep_every_steps"]
        turn += [c for c in reversed(best) if rules[c.tag] == "keep_best"]
        turn += last[:-1]
        for checkpoint in turn:
            if total <= limit:
                break
            gone.append(checkpoint)
            total -= checkpoint.bytes
    return gone


def prune(folder: Path, config: CheckpointConfig, damaged: Collection[str] = ()) -> Pruned:
    """Delete what the rules no longer keep, and what could not be deleted earlier. Rank 0 only, after publishing.

    What cannot be deleted is a warning: the new checkpoint is safe.
    """
    leftovers: list[str] = []
    try:
        for trash in sorted(folder.glob(f"{PRUNED}*")):
            leftovers += _delete(trash, trash)
        holdings = examine(folder, damaged)
    except OSError as error:
        return Pruned(warnings=(f"{folder}: old checkpoints could not be deleted: {error}",))
    deleted, warnings = delete(folder, to_go(holdings.good, config, holdings.other_bytes))
    return _pruned(holdings, deleted, leftovers + warnings)


def delete(folder: Path, gone: Sequence[Published]) -> tuple[list[str], list[str]]:
    """Delete checkpoints; returns their tags, and warnings of those that could not be deleted."""
    deleted, warnings = [], []
    for checkpoint in gone:
        path, trash = folder / checkpoint.tag, folder / f"{PRUNED}{checkpoint.tag}"
        try:
            faults.operation(f"unpublish {checkpoint.tag}")
            os.rename(path, trash)  # at once unpublished, also for a reader that lists the folder meanwhile
        except OSError as error:
            warnings.append(_not_deleted(path, error))
        else:
            deleted.append(checkpoint.tag)
            warnings += _delete(trash, path)
    return deleted, warnings


def _delete(trash: Path, original: Path) -> list[str]:
    """Delete what is unpublished already; returns a warning where that fails."""
    try:
        faults.operation(f"delete {trash.name.removeprefix(PRUNED)}")
        shutil.rmtree(trash)
    except OSError as error:
        return [_not_deleted(original, error)]
    return []


def _not_deleted(path: Path, error: OSError) -> str:
    return f"{path}: the old checkpoint could not be deleted: {error}; it is tried again after the next save"


def _pruned(holdings: Holdings, deleted: list[str], warnings: Sequence[str] = ()) -> Pruned:
    """What was deleted, with a warning for each checkpoint that turned out to be damaged."""
    advice = "it is not counted to those that are kept, and left where it is: look, delete it"
    damaged = [f"{reason}; {advice}" for _, reason in holdings.damaged]
    return Pruned(tuple(deleted), (*damaged, *warnings), tuple(tag for tag, _ in holdings.damaged))


def needed(expected_bytes: int) -> int:
    """Bytes that must be free for a checkpoint, margin included."""
    return math.ceil(expected_bytes * (1 + MARGIN_SHARE)) + MARGIN_BYTES


@dataclass(frozen=True)
class Room:
    """What must be deleted so that another checkpoint fits."""

    holdings: Holdings
    deletions: list[Published]
    free: int
    """Bytes free now on the file system, leftovers of a save that was cut short included."""


def find_room(folder: Path, config: CheckpointConfig, expected_bytes: int, damaged: Collection[str] = ()) -> Room:
    """Find what to delete, of what the rules would no longer keep, so that another checkpoint fits. Writes nothing.

    Raises:
        CheckpointError: it does not fit, with the numbers; or the folder cannot be looked at.
    """
    coming, limit, untouched = needed(expected_bytes), budget(config), "earlier checkpoints are untouched"
    try:
        holdings = examine(folder, damaged)
        free, inodes = _free(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: no checkpoint can be saved there: {error}; {untouched}") from error
    free += holdings.leftover_bytes
    # Three more than the last one's: the folder, `latest`, the manifest's temporary file.
    files = holdings.good[-1].files + 3 if holdings.good else FILES_OF_ANY
    total = sum(checkpoint.bytes for checkpoint in holdings.good) + holdings.other_bytes + coming
    gone = to_go(holdings.good, config, holdings.other_bytes, coming)
    lack = ""
    for count in range(len(gone) + 1):
        freed = sum(checkpoint.bytes for checkpoint in gone[:count])
        if free + freed < coming:
            also = ", what may be deleted included" if gone else ""
            lack = (
                f"{shown(free + freed)} are free on this file system{also}; make room there, keep fewer checkpoints "
                "(chatgot.checkpoint.keep_last, keep_best, keep_every_steps), or give an --out_dir elsewhere"
            )
        elif limit is not None and total - freed > limit:
            lack = (
                f"beside the {shown(total - freed - coming)} that may not be deleted (the newest good checkpoint, "
                "damaged ones, other files) that is more than chatgot.checkpoint.disk_budget_gb = "
                f"{config.disk_budget_gb:g} allows; give a larger budget, or delete what is damaged"
            )
        elif inodes is not None and inodes + sum(checkpoint.files for checkpoint in gone[:count]) < files:
            lack = f"{files} new files, and this file system has inodes for {inodes} only; delete files there"
        else:
            return Room(holdings, gone[:count], free)
    one = f"it needs about {shown(coming)} ({shown(expected_bytes)} and a margin of 3 % and 64 KiB)"
    raise CheckpointError(f"{folder}: the checkpoint could not be saved: {one}, and {lack}; {untouched}")


def make_room(folder: Path, config: CheckpointConfig, expected_bytes: int, damaged: Collection[str] = ()) -> Pruned:
    """Make sure, before a save writes anything, that it fits into file system and budget. Rank 0 only, nobody else
    saving here. Deletes only what the rules would no longer keep beside it, and no more than it takes.

    Raises:
        CheckpointError: it does not fit even then, with the numbers, and nothing was deleted; or what was to go could
            not be deleted, or gave less room than its size; or the folder cannot be looked at.
    """
    deleted: list[str] = []
    first = room = find_room(folder, config, expected_bytes, damaged)
    while room.deletions:
        tags, failures = delete(folder, room.deletions)
        deleted += tags
        if failures:
            lack = f"there is no room for it, and {'; '.join(failures)}"
            raise CheckpointError(f"{folder}: the checkpoint could not be saved: {lack}")
        room = find_room(folder, config, expected_bytes, damaged)  # deleting may give less than the files' sizes
    return _pruned(first.holdings, deleted)


def preflight(
    folder: Path,
    config: CheckpointConfig,
    expected_bytes: int,
    max_steps: int,
    json: str,
    damaged: Collection[str] = (),
) -> list[str]:
    """Compare what the rules keep with the room that there is; one line for the user, and a WARNING where it does not
    fit. Rank 0 only; writes nothing.

    Args:
        folder: the run folder's `checkpoints`; need not exist yet.
        json: name of the file that `config` comes from.

    Raises:
        ConfigError: the budget has no room for two: the newest one, and the next while it is written.
        CheckpointError: not even one fits, or the folder cannot be looked at.
    """
    one, limit = needed(expected_bytes), budget(config)
    two = 2 * one  # the margin of the second one holds DeepSpeed's recovery scripts, 40 kB beside the checkpoints
    if limit is not None and limit < two:
        raise ConfigError(
            f"{json}: chatgot.checkpoint.disk_budget_gb = {config.disk_budget_gb:g} ({shown(limit)}): must have room "
            f"for two checkpoints, the newest one and the next while it is written, which take about {shown(two)}; "
            f"give at least {_rounded_up(two / 1e9)}"
        )
    room = find_room(folder, config, expected_bytes, damaged)

    def fitting(space: int) -> int:
        return 0 if space < one else 1 + (space - one) // expected_bytes

    every = max_steps // config.keep_every_steps if config.keep_every_steps else 0
    at_most = kept = config.keep_last + config.keep_best + every
    rules = f"{config.keep_last} last" + (f" + {config.keep_best} best" if config.keep_best else "")
    if config.keep_every_steps:
        rules += f" + every {config.keep_every_steps} steps, which is up to {every} over this run"
    line = (
        f"checkpoints: about {shown(expected_bytes)} each; {shown(room.free)} free in {folder}, {fitting(room.free)} "
    )
    line += f"fit; kept: {rules}: about {shown(kept * expected_bytes)}"
    if limit is not None:
        within = fitting(limit - room.holdings.other_bytes)
        at_most = min(kept, within)
        line += f"; disk_budget_gb = {config.disk_budget_gb:g}: {within} fit into it"
        line += ", and it comes first" if at_most < kept else ""
    space = room.free + sum(checkpoint.bytes for checkpoint in room.holdings.good)
    if at_most <= fitting(space):  # the one being written is among them: room is made for it before
        return [line]
    return [
        line,
        f"WARNING: the checkpoints that are kept need {shown(at_most * expected_bytes)}, and there are {shown(space)} "
        "for them: saves will fail; make room, or lower chatgot.checkpoint.keep_last, keep_best or keep_every_steps, "
        "or set disk_budget_gb",
    ]


def _rounded_up(value: float) -> str:
    """Two digits, never below the value."""
    digits = 1 - math.floor(math.log10(value))
    return f"{math.ceil(value * 10**digits) / 10**digits:.{max(0, digits)}f}"


def _free(folder: Path) -> tuple[int, int | None]:
    """Bytes and inodes (None: not counted there) that this user may still take where a folder is, or will be."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    system = os.statvfs(place)
    return system.f_bavail * system.f_frsize, system.f_favail if system.f_files else None


def shown(size: float) -> str:
    """Write a size as '168 MB' or '76.1 GB': three digits, in units of 1000 as disk_budget_gb."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= 0.9995 * factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} bytes"
