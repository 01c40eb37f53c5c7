"""Saving: DeepSpeed's own files in a folder that gets its name only when every rank has written its part."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from chatgot.checkpoint import manifest
from chatgot.checkpoint.ranks import Ranks
from chatgot.config.chatgot_section import CheckpointConfig
from chatgot.config.errors import CheckpointError

UNFINISHED = ".unfinished-"
"""Prefix of folders that are being written; never loaded, and swept at the next save."""


def tag_of(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}"


def save(engine: Any, folder: Path, client_state: dict[str, Any], fields: dict[str, Any], ranks: Ranks) -> str:
    """Save a checkpoint after the current step, publish it, and point `latest` to it. Collective.

    DeepSpeed writes `latest` before the other ranks have finished (engine.py, save_checkpoint), so it is told not to; the folder is
    renamed and `latest` replaced here, after all ranks have reported success.

    Args:
        folder: the run folder's `checkpoints`.
        client_state: what DeepSpeed does not save, under the single key "chatgot" (any other key could overwrite an engine attribute).
        fields: of the manifest.

    Returns:
        The tag.

    Raises:
        CheckpointError: on all ranks, if any rank could not write. Nothing is published then.
    """
    tag = tag_of(engine.global_steps)
    unfinished = folder / f"{UNFINISHED}{tag}"
    error: CheckpointError | None = None
    if ranks.rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(f"{UNFINISHED}*"):
                shutil.rmtree(leftover)
        except OSError as caught:
            error = _refusal(folder, caught)
    ranks.agree(error)
    with _failures_noted(engine) as failures:
        engine.save_checkpoint(str(folder), tag=unfinished.name, client_state={"chatgot": client_state}, save_latest=False)
    ranks.agree(_refusal(unfinished, failures[0]) if failures else None)
    if ranks.rank == 0:
        try:
            manifest.write(unfinished, fields)
            _publish(unfinished, folder / tag)
            manifest.write_atomically(folder / "latest", tag)
        except OSError as caught:
            error = _refusal(folder / tag, caught)
    ranks.agree(error)
    return tag


@contextlib.contextmanager
def _failures_noted(engine: Any) -> Iterator[list[OSError | RuntimeError]]:
    """Let this rank's file operations note their failure instead of raising it.

    DeepSpeed meets the other ranks in a barrier after it has written (engine.py, save_checkpoint): a rank that raised before would
    leave them waiting there until the process group's timeout. torch.save reports a full disk as a RuntimeError.
    """
    failures: list[OSError | RuntimeError] = []

    def noted(operation: Callable[..., Any]) -> Callable[..., Any]:
        def attempt(*args: Any, **kwargs: Any) -> Any:
            try:
                return operation(*args, **kwargs)
            except (OSError, RuntimeError) as error:
                failures.append(error)

        return attempt

    files = engine.checkpoint_engine
    wrapped: list[tuple[Any, str]] = [(files, "save"), (files, "makedirs"), (engine, "_copy_recovery_script")]
    for owner, name in wrapped:
        setattr(owner, name, noted(getattr(owner, name)))
    try:
        yield failures
    finally:
        for owner, name in wrapped:
            delattr(owner, name)


def _refusal(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: the checkpoint could not be saved: {error}; earlier checkpoints are untouched")


def _publish(unfinished: Path, final: Path) -> None:
    """Give the complete folder its name. One that exists already (the same step, saved again) is moved away first, never written into."""
    if final.exists():
        replaced = final.with_name(f"{UNFINISHED}replaced-{final.name}")
        os.rename(final, replaced)
        os.rename(unfinished, final)
        shutil.rmtree(replaced)
    else:
        os.rename(unfinished, final)
    manifest.sync_folder(final.parent)


def published(folder: Path) -> list[tuple[int, str]]:
    """(step, tag) of every published checkpoint, oldest first, by the step in its manifest."""
    found = []
    for path in folder.glob(f"*/{manifest.NAME}"):
        if not path.parent.name.startswith("."):
            found.append((int(manifest.read(path.parent)["step"]), path.parent.name))
    return sorted(found)


def prune(folder: Path, config: CheckpointConfig) -> list[str]:
    """Delete what the retention rules no longer keep; returns the deleted tags. Rank 0 only, after publishing.

    Kept: the newest keep_last, the keep_best with the lowest val/loss, every multiple of keep_every_steps, and the one that `latest`
    names: after a resume from an older checkpoint it is not among those with the highest steps.
    """
    tags = published(folder)
    keep = {tag for _, tag in tags[-config.keep_last :]}
    if (folder / "latest").is_file():
        keep.add((folder / "latest").read_text(encoding="utf-8").strip())
    scored = [(loss, tag) for _, tag in tags if (loss := manifest.read(folder / tag).get("val_loss")) is not None]
    keep |= {tag for _, tag in sorted(scored)[: config.keep_best]}
    if config.keep_every_steps:
        keep |= {tag for step, tag in tags if step % config.keep_every_steps == 0}
    gone = [tag for _, tag in tags if tag not in keep]
    for tag in gone:
        trash = folder / f"{UNFINISHED}pruned-{tag}"
        os.rename(folder / tag, trash)  # at once unpublished, also for a reader that lists the folder meanwhile
        shutil.rmtree(trash)
    return gone
