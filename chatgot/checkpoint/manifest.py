"""manifest.json: what a checkpoint is, readable without torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from chatgot.config.errors import CheckpointError

NAME = "manifest.json"
FORMAT_VERSION = 1

MUST_MATCH = ("model", "parameters", "tokenizer", "data", "train_batch_size")
"""Fields of the manifest that a resumed run must share with its checkpoint."""


def parameter_fingerprint(named_shapes: Iterable[tuple[str, tuple[int, ...]]]) -> str:
    """sha256 over the ordered (name, shape) list: DeepSpeed's flat buffers are positional, so order is part of the format."""
    text = "\n".join(f"{name} {tuple(shape)}" for name, shape in named_shapes)
    return hashlib.sha256(text.encode()).hexdigest()


def write(folder: Path, fields: dict[str, Any]) -> None:
    """Write manifest.json into a checkpoint folder and flush it to the disk. Rank 0 only, last of all files."""
    write_atomically(folder / NAME, json.dumps({"format_version": FORMAT_VERSION, **fields}, indent=2) + "\n")


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder.

    Raises:
        CheckpointError: missing, unreadable, or of a newer format.
    """
    path = folder / NAME
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {NAME}: the checkpoint is incomplete, or was not written by ChatGoT") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("format_version"), int):
        raise CheckpointError(f"{path}: not a manifest (no format_version)")
    if fields["format_version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {fields['format_version']}, this ChatGoT reads up to {FORMAT_VERSION}; install the newer ChatGoT"
        )
    return fields


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One line per field of MUST_MATCH that differs: 'field: checkpoint | now'. Nested fields are compared key by key."""
    lines = []
    for field in MUST_MATCH:
        before, after = saved.get(field), now.get(field)
        if isinstance(before, dict) and isinstance(after, dict):
            for key in sorted(before.keys() | after.keys()):
                if before.get(key) != after.get(key):
                    lines.append(f"{field}.{key}: {before.get(key)!r} | {after.get(key)!r}")
        elif before != after:
            lines.append(f"{field}: {before!r} | {after!r}")
    return lines


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text`: readers see the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries (new names, renames) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
