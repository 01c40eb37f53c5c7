"""Reads wandb's offline transaction logs back, so that tests can see what a sync would upload.

A `.wandb` file is a LevelDB log (7-byte header, 32 KiB blocks of [crc32 | length | type | data] chunks; LevelDB
doc/log_format.md) of wandb's protobuf `Record`s. wandb 0.31 ships the messages but no Python reader any more.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HEADER = struct.Struct("<4sHB")
_CHUNK = struct.Struct("<IHB")
_BLOCK = 32768
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def read_offline_history(run_dir: str | os.PathLike) -> tuple[set[str], list[dict[str, Any]]]:
    """(run ids, history records) of all offline wandb folders below run_dir/wandb, in the order of their start.

    Each record is what one wandb.log call gave ("train/step", "train/loss", ...), plus wandb's own "_step",
    "_timestamp", "_runtime".
    """
    ids: set[str] = set()
    history: list[dict[str, Any]] = []
    for record in read_offline_records(run_dir):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            ids.add(record.run.run_id)
        elif kind == "history":
            history.append(
                {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            )
    return ids, history


def read_offline_records(run_dir: str | os.PathLike) -> list[Any]:
    """All protobuf records of the offline logs below run_dir/wandb, in the order of their start."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]  made at import

    logs = sorted(Path(run_dir, "wandb").glob("offline-run-*/*.wandb"), key=lambda p: p.parent.name)
    if not logs:
        raise FileNotFoundError(f"no offline wandb log below {run_dir}/wandb")
    return [Record.FromString(data) for log in logs for data in _leveldb_records(log.read_bytes())]


def summary_of(records: list[Any]) -> dict[str, Any]:
    """What the run's summary was set to, plain keys."""
    summary: dict[str, Any] = {}
    for record in records:
        if record.WhichOneof("record_type") == "summary":
            summary |= {item.key: json.loads(item.value_json) for item in record.summary.update if item.key}
    return summary


def _leveldb_records(data: bytes) -> Iterator[bytes]:
    ident, magic, _version = _HEADER.unpack_from(data)
    assert (ident, magic) == (b":W&B", 0xBEE1), f"not a wandb log: {data[: _HEADER.size]!r}"
    position, parts = _HEADER.size, []
    while position + _CHUNK.size <= len(data):
        left_in_block = _BLOCK - position % _BLOCK
        if left_in_block < _CHUNK.size:
            position += left_in_block
            continue
        _crc, length, kind = _CHUNK.unpack_from(data, position)
        position += _CHUNK.size
        if position + length > len(data):  # still being written, which readers of such a log do not mind
            break
        if kind == 0:  # padding
            position += (_BLOCK - position % _BLOCK) % _BLOCK
            continue
        parts.append(data[position : position + length])
        position += length
        if kind in (_FULL, _LAST):
            yield b"".join(parts)
            parts = []
