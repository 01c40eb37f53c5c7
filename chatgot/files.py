"""Writing files so that a crash leaves the old one or the new one, never a part; their hashes, and locks."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)
LOCK_SECONDS = 0.5
"""How often a lock that somebody else has is tried again."""


def write_atomically(path: Path, text: str, before: Callable[[str], None] = lambda operation: None) -> None:
    """Replace `path` by `text`: readers see the old file or the new one, never a part.

    Args:
        before: is called with the name of each file operation, right before it.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    before(f"write a new {path.name}")
    temporary.unlink(missing_ok=True)  # of a process that had this number; or a link, which is not to be followed
    with open(temporary, "x", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    before(f"rename it to {path.name}")
    os.replace(temporary, path)
    before(f"flush the folder of {path.name}")
    sync(path.parent)


def replace_folder(new: Path, final: Path, away: Path, before: Callable[[str], None] = lambda operation: None) -> None:
    """Give a finished folder its name. One that has it already makes way first as `away`, is never written into, and is
    deleted in the end; a kill between the two renames leaves it there for `put_back`. `before` as above.
    """
    if final.exists():
        before(f"move the earlier {final.name} away")
        os.rename(final, away)
    before(f"publish {final.name}")
    try:
        os.rename(new, final)
    except OSError:
        put_back(away, final)
        raise
    before(f"flush the folder of {final.name}")
    sync(final.parent)
    if away.exists():
        before(f"delete the earlier {final.name}")
        shutil.rmtree(away)


def put_back(away: Path, final: Path) -> None:
    """Give a folder that made way its name back, if the new one never got it."""
    if away.exists() and not final.exists():
        os.rename(away, final)
        sync(final.parent)


def sync(path: Path) -> None:
    """Flush a file's contents, or a folder's entries (new names, renames), to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def take_lock(file: IO[str], waiting: Callable[[], object], why: str) -> None:
    """Take the lock of an open file, which the kernel drops when this process ends, however it ends.

    Args:
        waiting: is called every LOCK_SECONDS while another process has it.
        why: what is logged then, once.
    """
    said = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not said:
                logger.info(why)
            said = True
            waiting()
            time.sleep(LOCK_SECONDS)


def sha256(path: Path) -> str:
    """Hash a file's contents, 4 MiB at a time; hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(4 << 20):
            digest.update(chunk)
    return digest.hexdigest()
