"""Which checkpoints of a run folder are kept."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from chatgot.checkpoint import faults, manifest
from chatgot.checkpoint.publish import UNFINISHED
from chatgot.config.chatgot_section import CheckpointConfig


def published(folder: Path) -> list[tuple[int, str]]:
    """(step, tag) of every published checkpoint, in the order in which they were published.

    Raises:
        CheckpointError: a manifest cannot be read.
    """
    found = []
    for path in folder.glob(f"*/{manifest.NAME}"):
        if not path.parent.name.startswith("."):
            fields = manifest.read(path.parent)
            found.append((int(fields.get("sequence", 0)), int(fields["step"]), path.parent.name))
    return [(step, tag) for _, step, tag in sorted(found)]


def prune(folder: Path, config: CheckpointConfig) -> list[str]:
    """Delete what the retention rules no longer keep; returns the deleted tags. Rank 0 only, after publishing.

    Kept: the keep_last that were published last (after a resume from an older checkpoint they need not have the highest steps), the
    keep_best with the lowest val/loss, and every multiple of keep_every_steps.
    """
    tags = published(folder)
    keep = {tag for _, tag in tags[-config.keep_last :]}
    scored = [(loss, tag) for _, tag in tags if (loss := manifest.read(folder / tag).get("val_loss")) is not None]
    keep |= {tag for _, tag in sorted(scored)[: config.keep_best]}
    if config.keep_every_steps:
        keep |= {tag for step, tag in tags if step % config.keep_every_steps == 0}
    gone = [tag for _, tag in tags if tag not in keep]
    for tag in gone:
        trash = folder / f"{UNFINISHED}pruned-{tag}"
        faults.operation(f"unpublish {tag}")
        os.rename(folder / tag, trash)  # at once unpublished, also for a reader that lists the folder meanwhile
        faults.operation(f"delete {tag}")
        shutil.rmtree(trash)
    return gone
