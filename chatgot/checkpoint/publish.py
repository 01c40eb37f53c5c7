"""Giving a complete checkpoint its name, by renames that a kill between any two of them cannot spoil. Rank 0 only."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from chatgot.checkpoint import faults, manifest
from chatgot.errors import CheckpointError
from chatgot.files import sync

UNFINISHED = ".unfinished-"
"""Prefix of folders that are being written or deleted; never loaded, and swept at the next save."""
REPLACED = ".replaced-"
"""Prefix of a checkpoint that makes way for another one of the same step, until that one has its name."""


def tag_of(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}"


def sweep(folder: Path) -> None:
    """Clear up after a save that was cut short, while nobody else saves here."""
    take_back(folder)
    for leftover in (*folder.glob(f"{UNFINISHED}*"), *folder.glob(f"{REPLACED}*")):
        shutil.rmtree(leftover)
    for leftover in folder.glob(".latest.tmp-*"):
        leftover.unlink()


def take_back(folder: Path) -> None:
    """A checkpoint that had made way for another one of the same step gets its name back if the other one never got
    it.
    """
    for replaced in folder.glob(f"{REPLACED}*"):
        original = replaced.with_name(replaced.name.removeprefix(REPLACED))
        if not original.exists():
            os.rename(replaced, original)
            sync(folder)


def next_sequence(folder: Path) -> int:
    """One more than any published checkpoint's: which one was published last does not follow from the steps, since a
    run can go back.
    """
    newest = 0
    for path in folder.glob(f"*/{manifest.NAME}"):
        with contextlib.suppress(CheckpointError):  # a damaged one is reported where checkpoints are chosen
            newest = max(newest, int(manifest.read(path.parent).get("sequence", 0)))
    return newest + 1


def publish(unfinished: Path, final: Path) -> None:
    """Give the complete folder its name. One that exists already (the same step, saved again) makes way first, never
    written into.

    A kill between the two renames leaves it as REPLACED, from where `take_back` fetches it.
    """
    replaced = final.with_name(f"{REPLACED}{final.name}")
    if final.exists():
        faults.operation(f"move the earlier {final.name} away")
        os.rename(final, replaced)
    faults.operation(f"publish {final.name}")
    try:
        os.rename(unfinished, final)
    except OSError:
        if replaced.exists():
            os.rename(replaced, final)
        raise
    faults.operation("flush the folder of checkpoints")
    sync(final.parent)
    if replaced.exists():
        faults.operation(f"delete the earlier {final.name}")
        shutil.rmtree(replaced)
