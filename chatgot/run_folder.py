"""The run folder: the names of its files, its settings, and its lock. Another machine needs only this folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import socket
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

from chatgot.errors import ConfigError
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
MICRO_BATCH = "micro_batch.json"
"""The micro-batch that memory allows, see tuning/micro_batch.py."""
LOCK = ".lock"
"""Held by the run that writes here."""


class Tokenizer(Protocol):
    """What `write_settings` asks of a tokenizer."""

    def save(self, path: Path) -> None: ...


def check_writable(folder: Path) -> None:
    """Try to write in the folder, and leave no trace, because the run may still be refused.

    Raises:
        ConfigError: it is a file, or cannot be made or written to.
    """
    try:
        made = _make(folder)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
        for path in made:
            path.rmdir()
    except OSError as error:
        raise ConfigError(f"--out_dir {folder}: cannot be written to: {error}") from error


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
        "started": _now(),
        "command": sys.argv,
        "cwd": os.getcwd(),
        **extra,
    }


def write_settings(
    folder: Path, run: dict[str, Any], engine: dict[str, Any], environ: dict[str, Any], tokenizer: Tokenizer
) -> None:
    """Write run.yaml, ds_config.json, environment.json and tokenizer.json; the folder is made. Rank 0 only."""
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / RUN, yaml.safe_dump(run, sort_keys=False, allow_unicode=True))
    write_atomically(folder / DS_CONFIG, json.dumps(engine, indent=2) + "\n")
    write_atomically(folder / ENVIRONMENT, json.dumps(environ, indent=2) + "\n")
    tokenizer.save(folder / TOKENIZER)


def check(folder: Path) -> None:
    """Raises ConfigError if this is no run folder of train.py."""
    missing = [name for name in (RUN, DS_CONFIG, ENVIRONMENT) if not (folder / name).is_file()]
    if missing:
        what = "no such folder" if not folder.is_dir() else f"not a run folder of train.py: {missing[0]} is missing"
        raise ConfigError(f"{folder}: {what}; give the --out_dir of a run")


def read(folder: Path, name: str) -> dict[str, Any]:
    """Read RUN, DS_CONFIG or ENVIRONMENT.

    Raises:
        ConfigError: missing, or cannot be read.
    """
    import yaml

    path = folder / name
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} cannot be read: it holds no mapping")
    return tree


def changed_settings(folder: Path, run: dict[str, Any], engine: dict[str, Any]) -> list[str]:
    """Compare with the folder's run.yaml and ds_config.json, a line per key that differs.

    Keys of the JSON are named as overrides name them: 'ds.optimizer.params.lr: 0.003 -> 0.001'. No files there: no
    lines.
    """
    if not all((folder / name).is_file() for name in (RUN, DS_CONFIG)):
        return []
    try:
        before = flattened(read(folder, RUN)) | flattened(read(folder, DS_CONFIG), "ds.")
    except ConfigError as error:
        return [f"changes since then are not known: {error}"]
    now = flattened(run) | flattened(engine, "ds.")
    return [
        f"{key}: {before.get(key, 'absent')} -> {now.get(key, 'absent')}"
        for key in dict.fromkeys([*now, *before])
        if before.get(key, "absent") != now.get(key, "absent")
    ]


def flattened(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Name the leaves of nested mappings with dots; an empty mapping is a leaf."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def describe(run: dict[str, Any], engine: dict[str, Any]) -> list[str]:
    """Show the resolved settings as lines for the log, one per section of run.yaml and one for the JSON."""
    return [
        f"settings: {name}: "
        + ", ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in flattened(section).items())
        for name, section in (*run.items(), ("ds", engine))
    ]


@dataclass
class _HeldLock:
    descriptor: int
    made: list[Path]
    """Folders that were made for the lock, the deepest first."""


_held: dict[str, _HeldLock] = {}
"""By real path. Runs of one process follow each other, so one that was abandoned does not block the next."""


def acquire_lock(folder: Path) -> str | None:
    """Take the lock of a run folder, which is made if need be. Rank 0 only.

    Returns:
        A note where a process that is gone had held it.

    Raises:
        ConfigError: another run holds it, or the folder cannot be written to.
    """
    key = os.path.realpath(folder)
    if key in _held:
        return None
    path = folder / LOCK
    try:
        made = _make(folder)
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
        left_by = _holder(file)
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": _now()}).encode(), 0)
    except OSError as error:
        raise ConfigError(f"--out_dir {folder}: its lock cannot be taken: {error}") from error
    _held[key] = _HeldLock(file, made)
    return f"{path}: was left by a run that is gone ({left_by}); taken over" if left_by else None


def release_lock(folder: Path) -> None:
    """Delete the lock if it is held, and the folders that were made for it if they are still empty."""
    lock = _held.pop(os.path.realpath(folder), None)
    if lock is None:
        return
    with contextlib.suppress(OSError):  # the folder may be gone or read-only: closing the file ends the lock anyway
        (folder / LOCK).unlink()
        for path in lock.made:
            path.rmdir()
    os.close(lock.descriptor)


def _holder(file: int) -> str:
    text = os.pread(file, 1000, 0).decode("utf-8", "replace")
    try:
        holder = json.loads(text)
        return f"pid {holder['pid']} on host {holder['host']}, since {holder['started']}"
    except (ValueError, KeyError, TypeError):
        return text.strip()[:80]


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
