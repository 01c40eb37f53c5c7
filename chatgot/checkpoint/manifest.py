"""manifest.json: what a checkpoint is, readable without torch."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import string
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from chatgot.errors import CheckpointError
from chatgot.files import write_atomically

NAME = "manifest.json"
FORMAT_VERSION = 2

MUST_MATCH: dict[str, str | None] = {
    "model": None,
    "parameters": None,
    "tokenizer": None,
    "optimizer": None,
    "data": "--allow_data_change",
    "train": "--allow_data_change",
    "train_batch_size": "--allow_batch_change",
}
"""Fields of the manifest that a resumed run must share with its checkpoint -> the switch of train.py that lets them
differ, if any.
"""

HASHING_THREADS = 4
"""Files that are hashed at once; hashlib lets other threads run meanwhile."""


@dataclass(frozen=True)
class Difference:
    """A value of the manifest that is another one now."""

    field: str
    """Of the manifest."""
    name: str
    """The field, or field.key where it has keys."""
    before: str
    """As shown: fingerprints are shortened."""
    now: str

    def __str__(self) -> str:
        return f"{self.name}: {self.before} -> {self.now}"


def parameter_fingerprint(named_shapes: Iterable[tuple[str, tuple[int, ...]]]) -> str:
    """sha256 over the ordered (name, shape) list: DeepSpeed's flat buffers are positional, so order is part of the
    format.
    """
    text = "\n".join(f"{name} {tuple(shape)}" for name, shape in named_shapes)
    return hashlib.sha256(text.encode()).hexdigest()


def write(folder: Path, fields: dict[str, Any], before: Callable[[str], None] = lambda operation: None) -> None:
    """Write manifest.json into a checkpoint folder and flush it to the disk. Rank 0 only, last of all files.

    Args:
        before: is called with the name of each file operation, right before it.
    """
    fields = {"format_version": FORMAT_VERSION, **fields}
    write_atomically(folder / NAME, json.dumps({**fields, "sha256": _digest(fields)}, indent=2), before)


def _digest(fields: dict[str, Any]) -> str:
    """sha256 over what the manifest says, so that a damaged manifest is noticed too."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(fields)), sort_keys=True).encode()).hexdigest()


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder.

    Raises:
        CheckpointError: missing, unreadable, damaged, or of another format.
    """
    path = folder / NAME
    try:
        if path.is_symlink():
            raise CheckpointError(f"{path}: is a symbolic link; a checkpoint's files are its own")
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: no {NAME}: the checkpoint is incomplete, or was not written by ChatGoT"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("format_version"), int):
        raise CheckpointError(f"{path}: not a manifest (no format_version)")
    if fields["format_version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {fields['format_version']}, this ChatGoT reads up to {FORMAT_VERSION}; install "
            f"the newer ChatGoT"
        )
    if fields["format_version"] < FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {fields['format_version']} has no hashes, so that nobody can tell whether the "
            f"files are whole; "
            f"this ChatGoT reads version {FORMAT_VERSION}"
        )
    if fields.pop("sha256", None) != _digest(fields):
        raise CheckpointError(f"{path}: damaged: its own sha256 does not fit what it says")
    return fields


def listed(folder: Path) -> list[str]:
    """Every file below a checkpoint folder by its relative name ('/' between folders), the manifest left out."""
    names = []
    for parent, _, files in os.walk(folder):
        names += [(Path(parent) / name).relative_to(folder).as_posix() for name in files]
    return sorted(name for name in names if name != NAME)


def measure(path: Path) -> dict[str, Any]:
    """{"bytes", "sha256"} of a file."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while chunk := file.read(4 << 20):
            digest.update(chunk)
            size += len(chunk)
    return {"bytes": size, "sha256": digest.hexdigest()}


def verify(folder: Path, fields: dict[str, Any], contents: bool = True) -> None:
    """Compare every file of a checkpoint with its manifest: names and sizes first, because they cost nothing, then the
    contents.

    Args:
        contents: whether to read the files; False compares names and sizes only.

    Raises:
        CheckpointError: naming the first file that is missing, not listed, a link, of another size, or of other
            contents.
    """
    files = fields.get("files")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{folder / NAME}: lists no files")
    present = set(listed(folder))
    root = os.path.realpath(folder)
    for name, expected in files.items():
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts:
            raise CheckpointError(f"file {name}: leads out of the checkpoint")
        if os.path.realpath(folder / name) != os.path.join(root, *relative.parts):
            raise CheckpointError(f"file {name}: is, or is reached through, a symbolic link")
        if name not in present:
            raise CheckpointError(f"file {name}: is missing")
        status = os.lstat(folder / name)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"file {name}: is not a regular file")
        if status.st_size != expected["bytes"]:
            raise CheckpointError(f"file {name}: has {status.st_size} bytes, not {expected['bytes']}")
    if unlisted := sorted(present - files.keys()):
        raise CheckpointError(f"file {unlisted[0]}: is not in the manifest")
    if not contents:
        return
    executor = ThreadPoolExecutor(HASHING_THREADS, thread_name_prefix="hash")
    try:
        measured = [(name, executor.submit(measure, folder / name)) for name in files]
        for name, future in measured:  # in the manifest's order, whichever is done first
            try:
                found = future.result()["sha256"]
            except OSError as error:
                raise CheckpointError(f"file {name}: cannot be read: {error}") from error
            if found != (expected := files[name]["sha256"]):
                raise CheckpointError(
                    f"file {name}: its contents have changed (sha256 {found[:12]}…, not {expected[:12]}…)"
                )
    finally:
        executor.shutdown(cancel_futures=True)


def differences(saved: dict[str, Any], now: dict[str, Any], fields: Iterable[str]) -> list[Difference]:
    """What differs in the given fields between a checkpoint's manifest and another one; fields with keys are compared
    key by key.
    """
    found = []
    for field in fields:
        before, after = saved.get(field), now.get(field)
        if isinstance(before, dict) and isinstance(after, dict):
            pairs = {
                f"{field}.{key}": (before.get(key), after.get(key)) for key in sorted(before.keys() | after.keys())
            }
        else:
            pairs = {field: (before, after)}
        found += [Difference(field, name, _shown(a), _shown(b)) for name, (a, b) in pairs.items() if a != b]
    return found


def _shown(value: Any) -> str:
    if value is None:
        return "not given"
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 and set(text) <= set(string.hexdigits) else text
