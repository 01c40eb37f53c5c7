"""The run folder: resolved configuration and environment, so that another machine needs only this folder."""

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
from typing import Any

from chatgot.errors import ConfigError
from chatgot.files import write_atomically

MICRO_BATCH = "micro_batch.json"
"""The micro-batch that memory allows, see tuning/micro_batch.py."""


def check_writable(folder: Path) -> None:
    """Try to write in the folder, and leave no trace, because the run may still be refused.

    Raises:
        ConfigError: it is a file, or cannot be made or written to.
    """
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
        for path in made:
            path.rmdir()
    except OSError as error:
        raise ConfigError(f"--out_dir {folder}: cannot be written to: {error}") from error


def environment(extra: dict[str, Any]) -> dict[str, Any]:
    """Machine and command of this start, with `extra` (versions, data)."""
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


def write_settings(
    folder: Path, run: dict[str, Any], engine: dict[str, Any], environ: dict[str, Any], tokenizer
) -> None:
    """run.yaml, ds_config.json, environment.json and tokenizer.json, in a folder that is made here. Rank 0 only."""
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "run.yaml", yaml.safe_dump(run, sort_keys=False, allow_unicode=True))
    write_atomically(folder / "ds_config.json", json.dumps(engine, indent=2) + "\n")
    write_atomically(folder / "environment.json", json.dumps(environ, indent=2) + "\n")
    tokenizer.save(folder / "tokenizer.json")


def changed_settings(folder: Path, run: dict[str, Any], engine: dict[str, Any]) -> list[str]:
    """One line per key of run.yaml and ds_config.json that differs from the folder's: 'train.max_steps: 1000 -> 2000'.

    Keys of the JSON are named as overrides name them: 'ds.optimizer.params.lr: 0.003 -> 0.001'. No files there: no
    lines.
    """
    import yaml

    before: dict[str, Any] = {}
    for name, prefix, read in (("run.yaml", "", yaml.safe_load), ("ds_config.json", "ds.", json.loads)):
        path = folder / name
        if not path.is_file():
            return []
        try:
            before |= flattened(read(path.read_text(encoding="utf-8")), prefix)
        except (ValueError, yaml.YAMLError) as error:
            return [f"{path} cannot be read, so that changes since then are not known: {error}"]
    now = flattened(run) | flattened(engine, "ds.")
    return [
        f"{key}: {before.get(key, 'absent')} -> {now.get(key, 'absent')}"
        for key in dict.fromkeys([*now, *before])
        if before.get(key, "absent") != now.get(key, "absent")
    ]


def flattened(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested mappings by dotted name; an empty mapping is a leaf."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def describe(run: dict[str, Any], engine: dict[str, Any]) -> list[str]:
    """The resolved settings as lines for the log, one per section of run.yaml and one for the JSON."""
    sections = [*((name, section) for name, section in run.items()), ("ds", engine)]
    return [
        f"settings: {name}: "
        + ", ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in flattened(section).items())
        for name, section in sections
    ]


LOCK = ".lock"


@dataclass
class _Held:
    descriptor: int
    made: list[Path]
    """Folders that were made for the lock, the deepest first."""


_held: dict[str, _Held] = {}
"""By absolute path: runs of one process follow each other, so that one that was abandoned is not in the way of the
next.
"""


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
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    path = folder / LOCK
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


def release_lock(folder: Path) -> None:
    """Let go of the lock and delete it, and the folders made for it if they are still empty. Does nothing where it is
    not held.
    """
    held = _held.pop(os.path.realpath(folder), None)
    if held is None:
        return
    with contextlib.suppress(
        OSError
    ):  # the folder may be gone, or no longer writable: the lock ends with the file all the same
        (folder / LOCK).unlink()
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
