"""Saving: DeepSpeed's own files in a folder that gets its name only when every rank has written its part, hashed and on the disk."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from chatgot.checkpoint import faults, manifest
from chatgot.checkpoint.ranks import Ranks
from chatgot.config.errors import CheckpointError

UNFINISHED = ".unfinished-"
"""Prefix of folders that are being written or deleted; never loaded, and swept at the next save."""
REPLACED = ".replaced-"
"""Prefix of a checkpoint that makes way for another one of the same step, until that one has its name."""
VISIBLE_WITHIN_S = 60.0
"""How long rank 0 waits until a file that another machine has written shows up in its own listing (NFS keeps listings for a while)."""


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
        CheckpointError: on all ranks, if any rank could not write. Nothing is published then, unless only the flush after the rename
            or `latest` failed; what is published is whole in any case.
    """
    tag = tag_of(engine.global_steps)
    unfinished = folder / f"{UNFINISHED}{tag}"
    error: CheckpointError | None = None
    if ranks.rank == 0:
        try:
            faults.operation("make the folder and sweep leftovers")
            folder.mkdir(parents=True, exist_ok=True)
            sweep(folder)
        except OSError as caught:
            error = _refusal(folder, caught)
    ranks.agree(error)
    try:
        with _failures_noted(engine) as failures:
            engine.save_checkpoint(str(folder), tag=unfinished.name, client_state={"chatgot": client_state}, save_latest=False)
        ranks.agree(_refusal(unfinished, failures[0]) if failures else None)
        files = _flush_and_hash(unfinished, ranks)
        if ranks.rank == 0:
            try:
                manifest.write(unfinished, {**fields, "sequence": _next_sequence(folder), "files": files}, faults.operation)
                _publish(unfinished, folder / tag)
                manifest.write_atomically(folder / "latest", tag, faults.operation)
            except OSError as caught:
                error = _refusal(folder / tag, caught)
        ranks.agree(error)
    except CheckpointError:
        if ranks.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)  # makes room at once; what cannot be deleted now is swept at the next save
        raise
    return tag


def sweep(folder: Path) -> None:
    """Clear up after a save that was cut short. Rank 0 only, while nobody else saves here."""
    take_back(folder)
    for leftover in (*folder.glob(f"{UNFINISHED}*"), *folder.glob(f"{REPLACED}*")):
        shutil.rmtree(leftover)
    for leftover in folder.glob(".latest.tmp-*"):
        leftover.unlink()


def take_back(folder: Path) -> None:
    """A checkpoint that had made way for another one of the same step gets its name back if the other one never got it. Rank 0 only."""
    for replaced in folder.glob(f"{REPLACED}*"):
        original = replaced.with_name(replaced.name.removeprefix(REPLACED))
        if not original.exists():
            os.rename(replaced, original)
            manifest.sync(folder)


def writer(name: str) -> int:
    """The rank that wrote a file, by DeepSpeed's naming (engine.py, _get_zero_ckpt_name and the NVMe copies); all others are rank 0's."""
    match = re.search(r"(?:^|/)(?:\w*_)?zero_pp_rank_(\d+)_", name) or re.match(r"offloaded_tensors/rank(\d+)/", name)
    return int(match.group(1)) if match else 0


def _flush_and_hash(folder: Path, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """Every rank flushes its own files to the disk and hashes them; {name: {"bytes", "sha256"}} of all of them. Collective.

    Raises:
        CheckpointError: on all ranks: a file could not be flushed or read, or rank 0 does not see what another rank wrote.
    """
    own: dict[str, dict[str, Any]] = {}
    error: CheckpointError | None = None
    try:
        for name in manifest.listed(folder):
            if writer(name) % ranks.world_size == ranks.rank:
                faults.operation(f"flush and hash {name}")
                manifest.sync(folder / name)
                own[name] = manifest.measure(folder / name)
    except OSError as caught:
        error = _refusal(folder, caught)
    ranks.agree(error)
    gathered = ranks.gather(own)
    files = {name: measured for part in gathered for name, measured in part.items()}
    if ranks.rank == 0:
        error = _not_the_same_folder(folder, gathered)
        try:
            for parent in sorted({(folder / name).parent for name in files} - {folder}):
                manifest.sync(parent)
        except OSError as caught:
            error = _refusal(folder, caught)
    ranks.agree(error)
    return dict(sorted(files.items()))


def _not_the_same_folder(folder: Path, gathered: list[dict[str, dict[str, Any]]]) -> CheckpointError | None:
    """The error if rank 0 does not see exactly the files that all ranks together have hashed."""
    until = time.monotonic() + VISIBLE_WITHIN_S
    hashed = {name for part in gathered for name in part}
    while hashed - (seen := set(manifest.listed(folder))) and time.monotonic() < until:
        time.sleep(0.5)
    for rank, part in enumerate(gathered):
        if unseen := sorted(part.keys() - seen):
            return CheckpointError(
                f"{folder}: rank {rank} wrote {unseen[0]}, and rank 0 does not see it: the ranks do not share this file system; "
                "give an --out_dir on a file system that all machines share"
            )
    if unhashed := sorted(seen - hashed):
        return CheckpointError(f"{folder}: nobody has written {unhashed[0]}: another program writes into this folder")
    return None


def _next_sequence(folder: Path) -> int:
    """One more than any published checkpoint's: which one was published last does not follow from the steps, since a run can go back."""
    newest = 0
    for path in folder.glob(f"*/{manifest.NAME}"):
        with contextlib.suppress(CheckpointError):  # a damaged one is reported where checkpoints are chosen
            newest = max(newest, int(manifest.read(path.parent).get("sequence", 0)))
    return newest + 1


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
                paths = [Path(value).name for value in (*args, *kwargs.values()) if isinstance(value, (str, Path))]
                faults.operation(" ".join([operation.__name__.strip("_"), *paths]))
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
    free = ""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        with contextlib.suppress(OSError):
            free = f" ({shutil.disk_usage(path.parent).free / 2**30:.2f} GiB free)"
    return CheckpointError(f"{path}: the checkpoint could not be saved: {error}{free}; earlier checkpoints are untouched")


def _publish(unfinished: Path, final: Path) -> None:
    """Give the complete folder its name. One that exists already (the same step, saved again) makes way first, never written into.

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
    manifest.sync(final.parent)
    if replaced.exists():
        faults.operation(f"delete the earlier {final.name}")
        shutil.rmtree(replaced)
