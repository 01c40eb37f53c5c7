"""Which checkpoints of a run folder are kept, and deleting the others.

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

from chatgot.checkpoint import faults, manifest
from chatgot.checkpoint.load import tags_in
from chatgot.checkpoint.publish import REPLACED, UNFINISHED
from chatgot.deepspeed_json.chatgot_section import CheckpointConfig
from chatgot.errors import CheckpointError

PRUNED = ".pruned-"
"""Prefix of a checkpoint that is being deleted; what could not be deleted is tried again after the next save."""


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


def budget(config: CheckpointConfig) -> int | None:
    """chatgot.checkpoint.disk_budget_gb in bytes."""
    return None if config.disk_budget_gb is None else int(config.disk_budget_gb * 1e9)


def plan(good: Sequence[Published], config: CheckpointConfig, other_bytes: int = 0, coming: int | None = None) -> Plan:
    """Apply the rules; pure.

    Kept: the keep_last that were published last, the keep_best with the lowest val/loss, and every multiple of
    keep_every_steps. All others go, the oldest first. If the folder still holds more than disk_budget_gb: then those
    that keep_every_steps alone keeps, the oldest first; those of keep_best, the worst first; those of keep_last, the
    oldest first; the newest good one never.

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
    kept = (("keep_every_steps", every), ("keep_best", best), ("keep_last", last))
    rules = {checkpoint.tag: rule for rule, checkpoints in kept for checkpoint in checkpoints}
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
    bad: list[tuple[str, str]] = []
    for tag in tags_in(folder):
        if tag in damaged:
            continue
        path = folder / tag
        try:
            if path.is_symlink():
                raise CheckpointError("it is a symbolic link")
            fields = manifest.read(path)
            manifest.verify(path, fields, contents=False)
            loss, files = fields.get("val_loss"), len(fields["files"]) + 1
            place = int(fields["step"]), int(fields.get("sequence", 0))
            loss = None if loss is None else float(loss)
            good.append(Published(tag, *place, manifest.bytes_of(path, fields), files, loss))
        except (CheckpointError, KeyError, TypeError, ValueError) as error:
            bad.append((tag, str(error)))
    good.sort(key=lambda checkpoint: checkpoint.sequence)
    leftover = sum(_bytes_below(path) for path in _leftovers(folder))
    other = _bytes_below(folder) - leftover - sum(checkpoint.bytes for checkpoint in good)
    return Holdings(tuple(good), tuple(bad), other, leftover)


def _leftovers(folder: Path) -> list[Path]:
    """List what `sweep` deletes when the next save begins."""
    replaced = [path for path in folder.glob(f"{REPLACED}*") if (folder / path.name.removeprefix(REPLACED)).exists()]
    return [*folder.glob(f"{UNFINISHED}*"), *replaced]


def _bytes_below(folder: Path) -> int:
    return sum((Path(parent) / name).lstat().st_size for parent, _, names in os.walk(folder) for name in names)


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
    deleted, warnings = delete(folder, plan(holdings.good, config, holdings.other_bytes).gone)
    return Pruned(
        deleted, (*warnings_of(folder, holdings), *leftovers, *warnings), tuple(tag for tag, _ in holdings.damaged)
    )


def delete(folder: Path, gone: Sequence[tuple[Published, str]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Delete checkpoints; returns their tags, and warnings of those that could not be deleted."""
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


def warnings_of(folder: Path, holdings: Holdings) -> list[str]:
    """One line per checkpoint that turned out to be damaged."""
    return [
        f"checkpoint {folder / tag} is damaged: {reason}; it is not counted to those that are kept, and left where it "
        "is: look, delete it"
        for tag, reason in holdings.damaged
    ]
