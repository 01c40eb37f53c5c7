"""Where a text is cut into training, validation and test: contiguous parts in reading order, before any windowing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from chatgot.config.run import DataConfig
from chatgot.errors import ConfigError

AUTO_TOLERANCE = 0.2
"""split_by: auto cuts at file boundaries if each held-out part is within this share of its wished size."""


@dataclass(frozen=True)
class SplitPlan:
    """Character positions in the whole text: train [0, train_end), val [train_end, val_end), test [val_end, total)."""

    split_by: Literal["position", "file"]
    train_end: int
    val_end: int
    total: int

    @property
    def ends(self) -> list[tuple[str, int]]:
        """Name and end of every split that is not empty by intention, in order."""
        ends = [("train", self.train_end), ("val", self.val_end)]
        return ends if self.val_end == self.total else [*ends, ("test", self.total)]


def plan_split(file_characters: Sequence[int], config: DataConfig) -> SplitPlan:
    """Choose the cuts.

    Args:
        file_characters: characters that each file adds to the whole text, in order.
        config: val_fraction, test_fraction and split_by.

    Raises:
        ConfigError: nothing left for training, or split_by: file with too few files.
    """
    val, test = config.val_fraction, config.test_fraction
    if val + test >= 1.0:
        raise ConfigError(
            f"data.val_fraction = {val} and data.test_fraction = {test} leave nothing for training; their sum must be "
            f"below 1"
        )
    total = sum(file_characters)
    by_position = SplitPlan(
        "position", int(total * (1.0 - val - test)), int(total * (1.0 - test)) if test else total, total
    )
    if config.split_by == "position":
        return by_position
    held_out = 2 if test else 1
    if len(file_characters) <= held_out:
        if config.split_by == "file":
            raise ConfigError(
                f"data.split_by: file needs at least {held_out + 1} text files, got {len(file_characters)}; use "
                f"position or auto"
            )
        return by_position
    boundaries = list(accumulate(file_characters))[:-1]
    val_end = _nearest(boundaries[1:], by_position.val_end) if test else total
    train_end = _nearest([b for b in boundaries if b < val_end], by_position.train_end)
    by_file = SplitPlan("file", train_end, val_end, total)
    wished, got = ((plan.val_end - plan.train_end, plan.total - plan.val_end) for plan in (by_position, by_file))
    close = all(abs(g - w) <= AUTO_TOLERANCE * w for w, g in zip(wished, got))
    return by_file if config.split_by == "file" or close else by_position


def split_pieces(pieces: Iterable[str], plan: SplitPlan) -> Iterator[tuple[str, str]]:
    """Cut a stream of text at the plan's positions: yields (split name, text). The last split takes the rest."""
    names, ends = zip(*plan.ends)
    current = position = 0
    for piece in pieces:
        while current + 1 < len(names) and position + len(piece) > ends[current]:
            head, piece = piece[: ends[current] - position], piece[ends[current] - position :]
            if head:
                yield names[current], head
            position = ends[current]
            current += 1
        if piece:
            yield names[current], piece
            position += len(piece)


def _nearest(boundaries: Sequence[int], wished: int) -> int:
    return min(boundaries, key=lambda b: abs(b - wished))
