"""One run per run folder: `.lock` in it, held with flock by rank 0, so that the kernel lets go of it when the process
dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from chatgot.config.errors import ConfigError

NAME = ".lock"


@dataclass
class _Held:
    descriptor: int
    made: list[Path]
    """Folders that were made for the lock, the deepest first."""


_held: dict[str, _Held] = {}
"""By absolute path: runs of one process follow each other, so that one that was abandoned is not in the way of the
next.
"""


def acquire(folder: Path) -> str | None:
    """Take the lock of a run folder, which is made if need be. Rank 0 only.

    Returns:
        A note where a process that is gone had held it.

    Raises:
        ConfigError: another run holds it, or the folder cannot be written to.
    """
    key = os.path.realpath(folder)
    if key in _held:
        return None
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    path = folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _holder(file)
                os.close(file)
                raise ConfigError(
                    f"--out_dir {folder}: another run is writing there: {holder} ({path}); "
                    "wait for it, stop it, or choose another --out_dir"
                ) from None
            except OSError:
                os.close(file)
                raise
            if path.exists() and os.path.samestat(os.fstat(file), os.stat(path)):
                break
            os.close(file)  # its holder deleted it between our open and our lock
        stale = _holder(file)
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": started}).encode(), 0)
    except OSError as error:
        raise ConfigError(f"--out_dir {folder}: its lock cannot be taken: {error}") from error
    _held[key] = _Held(file, made)
    return f"{path}: was left by a run that is gone ({stale}); taken over" if stale else None


def release(folder: Path) -> None:
    """Let go of the lock and delete it, and the folders made for it if they are still empty. Does nothing where it is
    not held.
    """
    held = _held.pop(os.path.realpath(folder), None)
    if held is None:
        return
    with contextlib.suppress(
        OSError
    ):  # the folder may be gone, or no longer writable: the lock ends with the file all the same
        (folder / NAME).unlink()
        for path in held.made:
            path.rmdir()
    os.close(held.descriptor)


def _holder(file: int) -> str:
    text = os.pread(file, 1000, 0).decode("utf-8", "replace")
    try:
        holder = json.loads(text)
        return f"pid {holder['pid']} on host {holder['host']}, since {holder['started']}"
    except (ValueError, KeyError, TypeError):
        return text.strip()[:80]
