"""A tensor that lies in pieces in the memory-mapped files of a checkpoint, and is read a range at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from chatgot.engine.zero_view import Fragment


@dataclass(frozen=True)
class Piece:
    """`numel` elements of a tensor, flattened, from `start` on: those of `source` (1-D) from `offset` on."""

    start: int
    numel: int
    source: torch.Tensor
    offset: int


@dataclass(frozen=True)
class StoredTensor:
    """Its elements stay in the files until they are read. The pieces hold each of them once, in order; `join` has
    checked that.
    """

    shape: torch.Size
    pieces: tuple[Piece, ...]

    def read(self, start: int, numel: int) -> torch.Tensor:
        """Elements [start, start + numel) of the flattened tensor: a new fp32 tensor (numel,) on the CPU.

        Raises:
            ValueError: the range is not inside the tensor.
        """
        if start < 0 or numel < 0 or start + numel > self.shape.numel():
            raise ValueError(f"elements [{start}, {start + numel}) of a tensor of {self.shape.numel()}")
        found = torch.empty(numel, dtype=torch.float32)
        for piece in self.pieces:
            left, right = max(start, piece.start), min(start + numel, piece.start + piece.numel)
            if left < right:
                offset = piece.offset + left - piece.start
                found[left - start : right - start] = piece.source[offset : offset + right - left]
        return found

    def whole(self) -> torch.Tensor:
        """All of it: a new fp32 tensor of its shape on the CPU."""
        return self.read(0, self.shape.numel()).view(self.shape)


def stored(tensor: torch.Tensor, shape: torch.Size) -> StoredTensor:
    """A tensor that lies in one piece.

    Raises:
        ValueError: it has another number of elements than `shape`.
    """
    if tensor.numel() != shape.numel():
        raise ValueError(f"{tensor.numel()} elements in the file, {tuple(shape)} has {shape.numel()}")
    return StoredTensor(shape, (Piece(0, tensor.numel(), tensor.detach().reshape(-1), 0),))


def join(
    shapes: dict[str, torch.Size], owned: list[list[Fragment]], held: list[list[Fragment]], parts: list[torch.Tensor]
) -> dict[str, StoredTensor]:
    """Put every rank's parts together, without reading their elements.

    Args:
        owned: by rank, the pieces that it is the owner of; together they are all elements, each once.
        held: by rank, the pieces that its part holds; the owned ones or more.
        parts: by rank, its flat tensor.

    Raises:
        ValueError: the pieces are not all elements, each once, or a part is too short for its pieces.
    """
    pieces: dict[str, list[Piece]] = {name: [] for name in shapes}
    for rank, (own, have, part) in enumerate(zip(owned, held, parts)):
        place = {fragment.name: fragment for fragment in have}
        for fragment in own:
            source = place[fragment.name]
            offset = source.offset + fragment.start - source.start
            if (
                offset < 0
                or fragment.start + fragment.numel > source.start + source.numel
                or offset + fragment.numel > part.numel()
            ):
                raise ValueError(
                    f"{fragment.name}: elements [{offset}, {offset + fragment.numel}) of rank {rank}'s shard, which "
                    f"has {part.numel()}"
                )
            pieces[fragment.name].append(Piece(fragment.start, fragment.numel, part.detach().reshape(-1), offset))
    for name, found in pieces.items():
        found.sort(key=lambda piece: piece.start)
        end = 0
        for piece in found:
            if piece.start != end:
                raise ValueError(
                    f"{name}: a shard continues with element {piece.start}, the ones before it end at {end}"
                )
            end += piece.numel
        if end != shapes[name].numel():
            raise ValueError(f"{name}: the shards have {end} of {shapes[name].numel()} elements")
    return {name: StoredTensor(shapes[name], tuple(found)) for name, found in pieces.items()}
