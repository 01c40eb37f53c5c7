"""Where each parameter lies in the flat tensors that ZeRO cuts up among its ranks (DeepSpeed 0.19.8,
zero/stage_1_and_2.py, stage3.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Fragment:
    """`numel` elements of a parameter, flattened, from `start` on; they lie at `offset` of one rank's flat tensor."""

    name: str
    start: int
    numel: int
    offset: int


def cut_group(
    numels: Sequence[tuple[str, int]], partition_size: int, rank: int, paddings: Sequence[int] = ()
) -> list[Fragment]:
    """ZeRO 1-2 and the BF16_Optimizer: the group's parameters one after the other, cut into equal parts by rank.

    Args:
        numels: (name, number of elements) in the order of the flat tensor.
        partition_size: elements of one rank's part, padding at the end of the last ones included.
        paddings: unused elements after each parameter (zero_optimization.parameter_alignment); none by default.
    """
    begin, end, position = rank * partition_size, (rank + 1) * partition_size, 0
    found = []
    for index, (name, numel) in enumerate(numels):
        left, right = max(position, begin), min(position + numel, end)
        if left < right:
            found.append(Fragment(name, left - position, right - left, left - begin))
        position += numel + (paddings[index] if paddings else 0)
    return found


def cut_each(numels: Iterable[tuple[str, int]], ranks: int, rank: int) -> list[Fragment]:
    """ZeRO 3: every parameter of a sub-group is cut into `ranks` equal parts, the last one padded; a rank has its parts
    in a row.
    """
    offset = 0
    found = []
    for name, numel in numels:
        part = -(-numel // ranks)
        inside = min(part, numel - rank * part)
        if inside > 0:
            found.append(Fragment(name, rank * part, inside, offset))
        offset += part
    return found


def whole(numels: dict[str, int], fragments: Iterable[Fragment]) -> list[Fragment]:
    """ZeRO 1-2 with Muon: the momentum of every matrix of which the rank has a piece, whole, one after the other.

    A matrix on the border of two ranks is kept by both.
    """
    offset = 0
    found = []
    for fragment in fragments:
        found.append(Fragment(fragment.name, 0, numels[fragment.name], offset))
        offset += numels[fragment.name]
    return found
