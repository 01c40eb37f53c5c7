"""Making a written checkpoint durable: flush and hash its files, then give its folder its name, by renames that a kill
between any two of them cannot spoil.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from chatgot.checkpoint import faults, manifest
from chatgot.checkpoint.manifest import Measured
from chatgot.errors import CheckpointError
from chatgot.files import sync, write_atomically
from chatgot.run_folder import LATEST

UNFINISHED = ".unfinished-"
"""Prefix of folders that are being written or deleted; never loaded, and swept at the next save."""
REPLACED = ".replaced-"
"""Prefix of a checkpoint that makes way for another one of the same step, until that one has its name."""
VISIBLE_WITHIN_S = 60.0
"""How long rank 0 waits until a file of another machine shows up in its own listing (NFS keeps listings a while)."""


def tag_of(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}"


def writer(name: str) -> int:
    """The rank that wrote a file, by DeepSpeed's naming (engine.py, _get_zero_ckpt_name and the NVMe copies); all
    others are rank 0's.
    """
    match = re.search(r"(?:^|/)(?:\w*_)?zero_pp_rank_(\d+)_", name) or re.match(r"offloaded_tensors/rank(\d+)/", name)
    return int(match.group(1)) if match else 0


def flush_and_measure(folder: Path, rank: int, world_size: int) -> dict[str, Measured]:
    """Flush and hash the files of a rank; {name: what was measured}.

    Raises:
        OSError: one cannot be flushed or read.
    """
    own = {}
    for name in manifest.listed(folder):
        if writer(name) % world_size == rank:
            faults.operation(f"flush and hash {name}")
            with ThreadPoolExecutor(1) as thread:  # hashed out of the page cache while the disk still writes it
                flushed = thread.submit(sync, folder / name)
                own[name] = manifest.measure(folder / name)
                flushed.result()
    return own


def check_shared(folder: Path, gathered: list[dict[str, Measured]]) -> None:
    """Wait until rank 0 sees exactly the files that all ranks together have hashed, VISIBLE_WITHIN_S at most.

    Args:
        gathered: the files of every rank.

    Raises:
        CheckpointError: it does not: the ranks do not share the file system, or somebody else writes there.
    """
    until = time.monotonic() + VISIBLE_WITHIN_S
    hashed = {name for part in gathered for name in part}
    while hashed - (seen := set(manifest.listed(folder))) and time.monotonic() < until:
        time.sleep(0.5)
    for rank, part in enumerate(gathered):
        if unseen := sorted(part.keys() - seen):
            raise CheckpointError(
                f"{folder}: rank {rank} wrote {unseen[0]}, and rank 0 does not see it: the ranks do not share this "
                "file system; give an --out_dir on a file system that all machines share"
            )
    if unhashed := sorted(seen - hashed):
        raise CheckpointError(f"{folder}: nobody has written {unhashed[0]}: another program writes into this folder")


def sweep(folder: Path) -> None:
    """Clear up after a save that was cut short, while nobody else saves here."""
    take_back(folder)
    for leftover in (*folder.glob(f"{UNFINISHED}*"), *folder.glob(f"{REPLACED}*")):
        shutil.rmtree(leftover)
    for leftover in folder.glob(f".{LATEST}.tmp-*"):
        leftover.unlink()


def take_back(folder: Path) -> None:
    """Give a checkpoint that made way for another one of the same step its name back, if the other one never got it."""
    for replaced in folder.glob(f"{REPLACED}*"):
        original = replaced.with_name(replaced.name.removeprefix(REPLACED))
        if not original.exists():
            os.rename(replaced, original)
            sync(folder)


def next_sequence(folder: Path) -> int:
    """One more than any published checkpoint's."""
    newest = 0
    for path in folder.glob(f"*/{manifest.NAME}"):
        with contextlib.suppress(CheckpointError):  # a damaged one is reported where checkpoints are chosen
            newest = max(newest, int(manifest.read(path.parent).get("sequence", 0)))
    return newest + 1


def publish(folder: Path, tag: str, fields: Mapping[str, Any], gathered: list[dict[str, Measured]]) -> None:
    """List all files in the manifest of the unfinished checkpoint, give it its name, and point `latest` to it.

    Args:
        folder: the `checkpoints` folder.
        fields: the manifest's, without sequence and files.
        gathered: the files of every rank.

    Raises:
        OSError: it is published, if only the flush after the rename or `latest` failed.
    """
    unfinished = folder / f"{UNFINISHED}{tag}"
    files = dict(sorted((name, measured) for part in gathered for name, measured in part.items()))
    for parent in sorted({(unfinished / name).parent for name in files} - {unfinished}):
        sync(parent)
    sequence = next_sequence(folder)
    manifest.write(unfinished, {**fields, "sequence": sequence, "files": files}, faults.operation)
    _rename(unfinished, folder / tag)
    write_atomically(folder / LATEST, tag, faults.operation)


def _rename(unfinished: Path, final: Path) -> None:
    """One that exists already (the same step, saved again) makes way first, never written into. A kill between the two
    renames leaves it as REPLACED, from where `take_back` fetches it.
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
