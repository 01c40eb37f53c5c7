"""The run folder: the names of its files, its settings, and its lock. Another machine needs only this folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import socket
import stat
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from chatgot.errors import ConfigError, FolderMovedError
from chatgot.files import write_atomically

RUN = "run.yaml"
"""The resolved run YAML."""
DS_CONFIG = "ds_config.json"
"""The resolved DeepSpeed JSON."""
TOKENIZER = "tokenizer.json"
ENVIRONMENT = "environment.json"
"""Machine, versions, data and command of the last start."""
METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
SAMPLES = "samples"
REPORT = "report.html"
CHECKPOINTS = "checkpoints"
LATEST = "latest"
"""In CHECKPOINTS: the newest one's name, for stock DeepSpeed."""
UNFINISHED = ".unfinished-"
"""Prefix in CHECKPOINTS of what is being written; never loaded, and swept at the next save."""
REPLACED = ".replaced-"
"""Prefix of a checkpoint that makes way for another one of the same step, until that one has its name."""
PRUNED = ".pruned-"
"""Prefix of a checkpoint that is being deleted; what could not be deleted is tried again after the next save."""
WANDB = "wandb"
STACKS = "stacks"  # where each rank stood when one hung
MICRO_BATCH = "micro_batch.json"
"""The micro-batch that memory allows, see tuning/micro_batch.py."""
LOCK = ".lock"
"""Held by the run that writes here."""

LARGEST = 1 << 20
"""Bytes of a run.yaml, ds_config.json or environment.json that are read; a larger one is refused."""


def open_file(path: Path, flags: int = os.O_RDONLY, follow: bool = False) -> int:
    """Open a file of a run folder; returns its descriptor. Never waits. Raises OSError, also where it is no regular
    file, or a symbolic link and not to `follow`: a folder may come from elsewhere.
    """
    flags |= os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        file = os.open(path.name, flags, 0o644, dir_fd=folder)
    except OSError as error:
        why = "is a symbolic link, which is not followed here" if error.errno == errno.ELOOP else error.strerror
        raise OSError(error.errno, why, str(path)) from None
    finally:
        os.close(folder)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    return file


def read_bytes(path: Path, largest: int = LARGEST, follow: bool = False) -> bytes:
    """Read a file of a run folder as a whole; OSError: also where it has more than `largest` bytes, see `open_file`."""
    with open(open_file(path, follow=follow), "rb") as file:
        data = file.read(min(os.fstat(file.fileno()).st_size, largest) + 1)
    if len(data) > largest:
        raise OSError(errno.EFBIG, f"has more than the {largest} bytes that such a file may have", str(path))
    return data


def linked_folders(folder: Path) -> list[str]:
    """Say which folders of a run folder are links; ConfigError: the owner of such a link is not that of its target."""
    notes = []
    for path in (folder / CHECKPOINTS, folder / SAMPLES, folder / WANDB):
        if path.is_symlink() and path.exists():
            if path.lstat().st_uid != path.stat().st_uid:
                raise ConfigError(f"{path}: a link to somebody else's {path.resolve()}; put a folder of your own there")
            notes.append(f"{path} is a symbolic link to {path.resolve()}, and is followed")
    return notes


def check_writable(folder: Path) -> None:
    """Try to write in the folder and to open its records, and leave no trace, because the run may still be refused.

    Raises:
        ConfigError: it is a file, or cannot be made or written to.
    """
    try:
        made = _make(folder)
        probe = folder / f".probe-{os.getpid()}"
        probe.unlink(missing_ok=True)
        probe.touch(exist_ok=False)
        probe.unlink()
        for path in made:
            path.rmdir()
        for path in (folder / METRICS, folder / EVENTS):
            with contextlib.suppress(FileNotFoundError):
                os.close(open_file(path, os.O_RDWR))
    except OSError as error:
        why = f"{error.strerror} ({error.filename})"
        if isinstance(error, (FileExistsError, NotADirectoryError)):
            why = "it, or what should be a folder above it, is a file"
        raise ConfigError(f"--out_dir {folder}: cannot be written to: {why}; name another folder") from error


def _make(folder: Path) -> list[Path]:
    """Make a folder; returns the folders that were made for it, the deepest first."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return made


def environment(extra: dict[str, Any]) -> dict[str, Any]:
    """Describe machine and command of this start, and add `extra` (versions, data)."""
    import numpy

    return {
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "cwd": os.getcwd(),
        **extra,
    }


def write_settings(folder: Path, run: dict[str, Any], engine: dict[str, Any], environ: dict[str, Any]) -> None:
    """Write run.yaml, ds_config.json and environment.json; the folder is made. Rank 0 only."""
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / RUN, yaml.safe_dump(run, sort_keys=False, allow_unicode=True))
    write_atomically(folder / DS_CONFIG, json.dumps(engine, indent=2) + "\n")
    write_atomically(folder / ENVIRONMENT, json.dumps(environ, indent=2) + "\n")


def check(folder: Path) -> None:
    """Raises ConfigError if this is no run folder of train.py."""
    missing = [name for name in (RUN, DS_CONFIG, ENVIRONMENT) if not (folder / name).is_file()]
    if missing:
        what = "no such folder" if not folder.is_dir() else f"not a run folder of train.py: {missing[0]} is missing"
        raise ConfigError(f"{folder}: {what}; give the --out_dir of a run")


def read(folder: Path, name: str) -> dict[str, Any]:
    """Read RUN, DS_CONFIG or ENVIRONMENT. ConfigError if it is missing or cannot be read."""
    import yaml

    class WithoutAliases(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError("it has a YAML alias, and train.py writes none")
            return super().compose_node(parent, index)

    path = folder / name
    try:
        text = read_bytes(path).decode("utf-8")
        tree = yaml.load(text, WithoutAliases) if path.suffix == ".yaml" else json.loads(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} cannot be read: it holds no mapping")
    return tree


def changed_settings(folder: Path, run: dict[str, Any], engine: dict[str, Any]) -> list[str]:
    """Compare with the folder's run.yaml and ds_config.json, a line per key that differs; no files there: no lines.

    Keys of the JSON are named as overrides name them: 'ds.optimizer.params.lr: 0.003 -> 0.001'.
    """
    if not all((folder / name).is_file() for name in (RUN, DS_CONFIG)):
        return []
    try:
        before = flattened(read(folder, RUN)) | flattened(read(folder, DS_CONFIG), "ds.")
    except ConfigError as error:
        return [f"changes since then are not known: {error}"]
    now = flattened(run) | flattened(engine, "ds.")
    pairs = {key: (before.get(key, "absent"), now.get(key, "absent")) for key in (*now, *before)}
    return [f"{key}: {old} -> {new}" for key, (old, new) in pairs.items() if old != new]


def flattened(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Name the leaves of nested mappings with dots; an empty mapping is a leaf."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


@dataclass
class _Held:
    """A run folder that a run of this process writes into."""

    lock: int
    """Descriptor of the file LOCK."""
    folder: int
    """Descriptor of the folder, wherever it is moved."""
    made: list[Path]
    """The folders that were made for it, the deepest first."""


_held: dict[str, _Held] = {}
"""By absolute path. Runs of one process follow each other, so one that was abandoned does not block the next."""
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
"""What file systems without flock answer (Lustre mounted without it, some NFS)."""


def acquire_lock(folder: Path) -> str | None:
    """Take the lock of a run folder, which is made if need be. Rank 0 only.

    Returns:
        A note where a process that is gone had held it, or where the file system has no locks.

    Raises:
        ConfigError: another run holds it, or the folder cannot be written to.
    """
    if moved_to(folder) is not None:
        release_lock(folder)
    if _key(folder) is not None:
        return None
    path, note = folder / LOCK, None
    try:
        made = _make(folder)
        here = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"--out_dir {folder}: its lock cannot be taken: {error.strerror}") from error
    try:
        while True:
            file = open_file(path, os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = holder_of(file)
                os.close(file)
                os.close(here)
                raise ConfigError(
                    f"--out_dir {folder}: another run is writing there: {holder} ({path}); "
                    "wait for it, stop it, or choose another --out_dir"
                ) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    os.close(file)
                    raise
                alone = "see to it that no other run writes there"
                note = (
                    f"{path}: this file system has no locks ({error}); {alone} (left there: {holder_of(file) or '-'})"
                )
                break
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), os.stat(LOCK, dir_fd=here, follow_symlinks=False)):
                    break
            os.close(file)  # its holder deleted it between our open and our lock
        if note is None and (left_by := holder_of(file)):
            note = f"{path}: was left by a run that is gone ({left_by}); taken over"
        os.ftruncate(file, 0)
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        os.pwrite(file, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": now}).encode(), 0)
    except OSError as error:
        os.close(here)
        raise ConfigError(f"--out_dir {folder}: its lock cannot be taken: {error.strerror}") from error
    _held[os.path.abspath(folder)] = _Held(file, here, made)
    return note


def release_lock(folder: Path) -> None:
    """Delete the lock if it is held, and the folders that were made for it if they are still empty."""
    if (key := _key(folder)) is None:
        return
    made = [] if moved_to(folder) else _held[key].made  # else what has these names now is not ours
    held = _held.pop(key)
    with contextlib.suppress(OSError):  # the folder may be read-only: closing the file ends the lock anyway
        os.unlink(LOCK, dir_fd=held.folder)
        for path in made:
            path.rmdir()
    os.close(held.lock)
    os.close(held.folder)


def moved_to(folder: Path) -> str | None:
    """Where the folder is that this process locked under this name, if another one or none has that name now."""
    held = _held.get(os.path.abspath(folder))
    if held is None:
        return None
    try:
        if os.path.samestat(os.stat(folder), os.fstat(held.folder)):
            return None
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError:
        return None  # not to be seen at the moment
    return os.readlink(f"/proc/self/fd/{held.folder}")


def check_in_place(folder: Path) -> None:
    """Raises FolderMovedError where the run folder was moved, renamed, unmounted or deleted since it was locked."""
    if (now := moved_to(folder)) is not None:
        why = f"which is {now} now; nothing was written under the old name; go on with --out_dir {now}"
        if now == "/" or now.endswith(" (deleted)"):
            why = "which was unmounted or deleted; nothing was written under its name"
        raise FolderMovedError(f"{folder}: is not the folder any more that this run writes into, {why}")


def _key(folder: Path) -> str | None:
    """The name under which a folder is held."""
    if (key := os.path.abspath(folder)) in _held:
        return key
    with contextlib.suppress(OSError):
        there = os.stat(folder)
        return next((key for key, one in _held.items() if os.path.samestat(os.fstat(one.folder), there)), None)
    return None


def holder_of(file: int) -> str:
    """What an open lock says of the process that took it; empty where nobody did."""
    text = os.pread(file, 1000, 0).decode("utf-8", "replace")
    try:
        holder = json.loads(text)
        return f"pid {holder['pid']} on host {holder['host']}, since {holder['started']}"
    except (ValueError, KeyError, TypeError):
        return text.strip()[:80]
