"""Which checkpoints of a run folder are kept, and whether there is room for another one.

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
from typing import Any

from chatgot.checkpoint import faults, manifest, size
from chatgot.checkpoint.load import tags_in
from chatgot.checkpoint.publish import REPLACED, UNFINISHED
from chatgot.deepspeed_json.chatgot_section import CheckpointConfig
from chatgot.errors import CheckpointError

PRUNED = ".pruned-"
"""Prefix of a checkpoint that is being deleted; what could not be deleted is tried again after the next save."""
MARGIN_SHARE, MARGIN_BYTES = 0.03, 64 * 1024
"""What a checkpoint is expected to take at most beyond its expected size: how far the estimate may be off, and what is
no file of its own (folder entries, unfilled blocks)."""
FILES_OF_ANY = 64
"""Free inodes that are asked for where no checkpoint shows how many files one has."""


@dataclass(frozen=True)
class Published:
    """A good checkpoint, as far as retention is concerned."""

    tag: str
    step: int
    sequence: int
    """Order of publication: after a resume from an older checkpoint the newest one need not have the highest step."""
    bytes: int
    files: int
    val_loss: float | None = None


@dataclass(frozen=True)
class Holdings:
    """What a folder of checkpoints holds."""

    good: tuple[Published, ...] = ()
    """In order of publication."""
    damaged: tuple[tuple[str, str], ...] = ()
    """(tag, reason) of those that turned out not to be good just now; those that were known are left out."""
    other_bytes: int = 0
    """Of everything else that stays: damaged checkpoints, small files."""
    leftover_bytes: int = 0
    """Of what a save that was cut short has left, which the next one sweeps."""


@dataclass(frozen=True)
class Plan:
    """What is to be kept, and what goes."""

    kept: dict[str, str]
    """{tag: the strongest rule that keeps it}, in order of publication."""
    gone: tuple[tuple[Published, str], ...]
    """What goes, and why, in the order in which it is to be deleted."""
    bytes: int
    """Of all that the folder then holds, the checkpoint that is to come included."""


@dataclass(frozen=True)
class Pruned:
    """What was deleted, and what the user must hear."""

    tags: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    damaged: tuple[str, ...] = ()
    """Tags that turned out not to be good, each with a warning; pass them in from now on, and nobody hears of them
    again.
    """


def needed(expected_bytes: int) -> int:
    """Bytes that must be free for a checkpoint, margin included."""
    return math.ceil(expected_bytes * (1 + MARGIN_SHARE)) + MARGIN_BYTES


def budget(config: CheckpointConfig) -> int | None:
    """chatgot.checkpoint.disk_budget_gb in bytes."""
    return None if config.disk_budget_gb is None else int(config.disk_budget_gb * 1e9)


def plan(good: Sequence[Published], config: CheckpointConfig, other_bytes: int = 0, coming: int | None = None) -> Plan:
    """Apply the rules; pure.

    Kept: the keep_last that were published last, the keep_best with the lowest val/loss, and every multiple of
        keep_every_steps. All
    others go, the oldest first. If the folder still holds more than disk_budget_gb: then those that keep_every_steps
    alone keeps, the oldest first; those of keep_best, the worst first; those of keep_last, the oldest first; the newest
    good one never.

    Args:
        good: in any order.
        other_bytes: what else is in the folder and counts for the budget.
        coming: bytes of a checkpoint that is about to be written and takes one of the keep_last places.
    """
    ordered = sorted(good, key=lambda checkpoint: checkpoint.sequence)
    last = ordered[-(config.keep_last - (coming is not None)) :]
    scored = [c for c in ordered if c.val_loss is not None and math.isfinite(c.val_loss)]
    best = sorted(scored, key=lambda c: (c.val_loss, c.sequence))[: config.keep_best]
    every = [c for c in ordered if config.keep_every_steps and c.step % config.keep_every_steps == 0]
    rules = (
        {c.tag: "keep_every_steps" for c in every}
        | {c.tag: "keep_best" for c in best}
        | {c.tag: "keep_last" for c in last}
    )
    gone = [(c, "no rule keeps it") for c in ordered if c.tag not in rules]
    total = sum(c.bytes for c in ordered if c.tag in rules) + other_bytes + (coming or 0)
    limit = budget(config)
    if limit is not None:
        turn = [c for c in every if rules[c.tag] == "keep_every_steps"]
        turn += [c for c in reversed(best) if rules[c.tag] == "keep_best"]
        turn += last[:-1]
        for checkpoint in turn:
            if total <= limit:
                break
            gone.append((checkpoint, f"disk_budget_gb comes before {rules.pop(checkpoint.tag)}"))
            total -= checkpoint.bytes
    return Plan({c.tag: rules[c.tag] for c in ordered if c.tag in rules}, tuple(gone), total)


def examine(folder: Path, damaged: Collection[str] = ()) -> Holdings:
    """Look at every checkpoint of a folder: its manifest, and names and sizes of its files, but not their contents.

    Args:
        damaged: tags that are known not to be good, whatever they look like.

    Raises:
        OSError: the folder cannot be listed.
    """
    good: list[Published] = []
    found: list[tuple[str, str]] = []
    for tag in tags_in(folder):
        if tag in damaged:
            continue
        path = folder / tag
        try:
            if path.is_symlink():
                raise CheckpointError("it is a symbolic link")
            fields = manifest.read(path)
            manifest.verify(path, fields, contents=False)
            loss = fields.get("val_loss")
            good.append(
                Published(
                    tag,
                    int(fields["step"]),
                    int(fields.get("sequence", 0)),
                    size.of_checkpoint(path, fields),
                    len(fields["files"]) + 1,
                    None if loss is None else float(loss),
                )
            )
        except (CheckpointError, KeyError, TypeError, ValueError) as error:
            found.append((tag, str(error)))
    good.sort(key=lambda checkpoint: checkpoint.sequence)
    leftover = sum(_bytes_below(path) for path in _leftovers(folder))
    other = _bytes_below(folder) - leftover - sum(checkpoint.bytes for checkpoint in good)
    return Holdings(tuple(good), tuple(found), other, leftover)


def _leftovers(folder: Path) -> list[Path]:
    """What `sweep` deletes when the next save begins."""
    replaced = [path for path in folder.glob(f"{REPLACED}*") if (folder / path.name.removeprefix(REPLACED)).exists()]
    return [*folder.glob(f"{UNFINISHED}*"), *replaced]


def _bytes_below(folder: Path) -> int:
    return sum((Path(parent) / name).lstat().st_size for parent, _, names in os.walk(folder) for name in names)


@dataclass(frozen=True)
class Room:
    """What must be deleted so that another checkpoint fits."""

    holdings: Holdings
    deletions: tuple[tuple[Published, str], ...]
    free: int
    """Bytes free now on the file system, leftovers of a save that was cut short included."""


def find_room(folder: Path, config: CheckpointConfig, expected_bytes: int, damaged: Collection[str] = ()) -> Room:
    """Whether a checkpoint of the expected size fits now, or after deleting what the rules would no longer keep beside
    it. Writes nothing.

    Raises:
        CheckpointError: it does not fit, with the numbers.
        OSError: the folder cannot be looked at.
    """
    coming, limit = needed(expected_bytes), budget(config)
    holdings = examine(folder, damaged)
    free, inodes = _free(folder)
    free += holdings.leftover_bytes
    files = (
        holdings.good[-1].files + 3 if holdings.good else FILES_OF_ANY
    )  # the folder, `latest`, the manifest's temporary file
    total = sum(checkpoint.bytes for checkpoint in holdings.good) + holdings.other_bytes + coming
    gone = plan(holdings.good, config, holdings.other_bytes, coming).gone
    lack = ""
    for count in range(len(gone) + 1):
        freed = sum(checkpoint.bytes for checkpoint, _ in gone[:count])
        if free + freed < coming:
            lack = (
                f"{size.shown(free + freed)} are free on this file "
                f"system{', what may be deleted included' if gone else ''}; make room "
                "there, keep fewer checkpoints (chatgot.checkpoint.keep_last, keep_best, keep_every_steps), or give "
                "an --out_dir elsewhere"
            )
        elif limit is not None and total - freed > limit:
            lack = (
                f"beside the {size.shown(total - freed - coming)} that may not be deleted (the newest good "
                f"checkpoint, damaged ones, other "
                f"files) that is more than chatgot.checkpoint.disk_budget_gb = {config.disk_budget_gb:g} allows; give "
                f"a larger budget, or "
                "delete what is damaged"
            )
        elif inodes is not None and inodes + sum(checkpoint.files for checkpoint, _ in gone[:count]) < files:
            lack = f"{files} new files, and this file system has inodes for {inodes} only; delete files there"
        else:
            return Room(holdings, gone[:count], free)
    one = f"it needs about {size.shown(coming)} ({size.shown(expected_bytes)} and a margin of 3 % and 64 KiB)"
    raise CheckpointError(
        f"{folder}: the checkpoint could not be saved: {one}, and {lack}; earlier checkpoints are untouched"
    )


def expected_bytes(folder: Path, fields: dict[str, Any], estimated: int, damaged: Collection[str] = ()) -> int:
    """Bytes of the next checkpoint: as many as the newest good one of the same layout has, or else the estimate.

    Args:
        fields: of the manifest of this run.

    Raises:
        CheckpointError: the folder cannot be looked at.
    """
    try:
        good = examine(folder, damaged).good
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be looked at: {error}") from error
    for checkpoint in reversed(good):
        saved = manifest.read(folder / checkpoint.tag)
        if all(saved.get(name) == fields.get(name) for name in size.SAME_SIZE):
            return checkpoint.bytes
    return estimated


def make_room(folder: Path, config: CheckpointConfig, expected_bytes: int, damaged: Collection[str] = ()) -> Pruned:
    """Before anything of a save is written: make sure that a checkpoint of the expected size fits into file system and
    budget.

    Deletes what the rules would no longer keep beside it, but only where it would not fit otherwise, and no more than
    that takes. Rank 0 only, while nobody else saves here.

    Raises:
        CheckpointError: it does not fit even then, with the numbers, and nothing was deleted; or what was to go could
            not be deleted, or gave less room than its size; or the folder cannot be looked at.
    """
    deleted: list[str] = []
    try:
        first = room = find_room(folder, config, expected_bytes, damaged)
        while room.deletions:
            tags, failures = _delete(folder, room.deletions)
            deleted += tags
            if failures:
                raise CheckpointError(
                    f"{folder}: the checkpoint could not be saved: there is no room for it, and {'; '.join(failures)}"
                )
            room = find_room(folder, config, expected_bytes, damaged)  # deleting may give less than the files' sizes
    except OSError as error:
        raise CheckpointError(
            f"{folder}: the checkpoint could not be saved: {error}, when looking for room for it; earlier checkpoints "
            f"are untouched"
        ) from error
    return Pruned(
        tuple(deleted), tuple(_about_damaged(folder, first.holdings)), tuple(tag for tag, _ in first.holdings.damaged)
    )


def prune(folder: Path, config: CheckpointConfig, damaged: Collection[str] = ()) -> Pruned:
    """Delete what the rules no longer keep, and what could not be deleted earlier. Rank 0 only, after publishing.

    What cannot be deleted is a warning: the new checkpoint is safe, and the old ones are tried again after the next
    save.
    """
    try:
        leftovers = _delete_leftovers(folder)
        holdings = examine(folder, damaged)
    except OSError as error:
        return Pruned(warnings=(f"{folder}: old checkpoints could not be deleted: {error}",))
    deleted, warnings = _delete(folder, plan(holdings.good, config, holdings.other_bytes).gone)
    return Pruned(
        deleted, (*_about_damaged(folder, holdings), *leftovers, *warnings), tuple(tag for tag, _ in holdings.damaged)
    )


def _delete(folder: Path, gone: Sequence[tuple[Published, str]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Deleted tags, and warnings of those that could not be."""
    deleted, warnings = [], []
    for checkpoint, _ in gone:
        tag, trash = checkpoint.tag, folder / f"{PRUNED}{checkpoint.tag}"
        try:
            faults.operation(f"unpublish {tag}")
            os.rename(folder / tag, trash)  # at once unpublished, also for a reader that lists the folder meanwhile
            deleted.append(tag)
            faults.operation(f"delete {tag}")
            shutil.rmtree(trash)
        except OSError as error:
            warnings.append(_not_deleted(folder / tag, error))
    return tuple(deleted), tuple(warnings)


def _delete_leftovers(folder: Path) -> list[str]:
    warnings = []
    for trash in sorted(folder.glob(f"{PRUNED}*")):
        try:
            faults.operation(f"delete {trash.name.removeprefix(PRUNED)}")
            shutil.rmtree(trash)
        except OSError as error:
            warnings.append(_not_deleted(trash, error))
    return warnings


def _not_deleted(path: Path, error: OSError) -> str:
    return f"{path}: the old checkpoint could not be deleted: {error}; it is tried again after the next save"


def _about_damaged(folder: Path, holdings: Holdings) -> list[str]:
    return [
        f"checkpoint {folder / tag} is damaged: {reason}; it is not counted to those that are kept, and left where it "
        f"is: look, delete it"
        for tag, reason in holdings.damaged
    ]


def _free(folder: Path) -> tuple[int, int | None]:
    """Bytes and inodes that this user may still take on the file system of a folder, which need not exist yet; None:
    not counted there.
    """
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    system = os.statvfs(place)
    return system.f_bavail * system.f_frsize, system.f_favail if system.f_files else None
