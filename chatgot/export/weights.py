"""Weights written tensor by tensor. Beside the mapped checkpoint, one tensor is in memory at most."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch

from chatgot.checkpoint.portable import StoredTensor
from chatgot.errors import CheckpointError
from chatgot.exchange.folder import INDEX, WEIGHTS
from chatgot.exchange.layout import Part
from chatgot.files import write_atomically

Weights = Mapping[str, StoredTensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
CHUNK = 1 << 20
"""Elements that are converted at a time."""
SHARD_BYTES = 5_000_000_000


def chunks(part: Part, weights: Weights, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The elements of an exported tensor in order, flattened, about a million at a time.

    Raises:
        CheckpointError: one is not finite, or too large for the type.
    """
    for chunk in _chunks(part, weights, dtype):
        if not chunk.isfinite().all():
            kind = str(dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{part.ours}: has values that are not finite in {kind}; take another --tag or --dtype"
            )
        yield chunk


def _chunks(part: Part, weights: Weights, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    width = part.columns or 1
    stored, start, numel = weights[part.ours], part.start * width, part.rows * width
    if not part.transposed:
        for at in range(0, numel, CHUNK):
            yield stored.read(start + at, min(CHUNK, numel - at)).to(dtype)
        return
    whole = stored.read(start, numel).view(part.rows, width)
    step = max(1, CHUNK // part.rows)
    for column in range(0, width, step):
        yield whole[:, column : column + step].T.to(dtype).reshape(-1)


def write_safetensors(
    folder: Path, parts: Sequence[Part], weights: Weights, dtype: torch.dtype, shard_bytes: int = SHARD_BYTES
) -> int:
    """Write model.safetensors, or shards and their index where it would be larger; returns bytes of the tensors."""
    shards: list[list[Part]] = [[]]
    filled = total = 0
    for part in parts:
        size = prod(part.shape) * dtype.itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(part)
        filled, total = filled + size, total + size
    place = {}
    for number, shard in enumerate(shards, start=1):
        name = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / name, shard, weights, dtype)
        place |= {part.name: name for part in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": place}
        write_atomically(folder / INDEX, json.dumps(index, indent=1) + "\n")
    return total


def _write_shard(path: Path, parts: Sequence[Part], weights: Weights, dtype: torch.dtype) -> None:
    # The library's save_file wants all tensors at once; the format is a length, a JSON and the bytes.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for part in parts:
        start, end = end, end + prod(part.shape) * dtype.itemsize
        header[part.name] = {"dtype": _NAMES[dtype], "shape": list(part.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for part in parts:
            for chunk in chunks(part, weights, dtype):
                file.write(chunk.view(torch.uint8).numpy().data)
