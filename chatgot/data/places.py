"""Where a prepared text stands in its files: which file begins at which byte of a split, and in which line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """What one file adds to one split. Its end is the beginning of the next part."""

    file: int
    """Index in the list of files."""
    begin: int
    """First byte, in the UTF-8 text of the split."""
    line: int
    """Line of the file, from 1, in which the part begins."""


def noting_parts(
    pieces: Iterable[tuple[str, str]], file_characters: Sequence[int], skipped: str, parts: dict[str, list[Part]]
) -> Iterator[tuple[str, str]]:
    """Pass on (split, text) without the characters of `skipped`, and fill `parts` on the way, by split.

    Args:
        pieces: the whole text; no piece is in two splits.
        file_characters: what each file adds to it.
    """
    without = str.maketrans("", "", skipped)
    lengths = iter(file_characters)
    file, left, line, size = -1, 0, 1, 0
    for name, piece in pieces:
        begins = name not in parts
        if begins:
            parts[name], size = [], 0
        while piece:
            while not left:
                file, left, line, begins = file + 1, next(lengths, len(piece)), 1, True  # longer: it changes
            text, piece = piece[:left], piece[left:]
            if begins:
                parts[name].append(Part(file, size, line))
                begins = False
            left -= len(text)
            line += text.count("\n")
            text = text.translate(without) if skipped else text
            size += len(text.encode("utf-8"))
            yield name, text
