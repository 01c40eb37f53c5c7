"""Find what a text has word for word from a prepared one: one pass over the tokens, no index, bounded memory."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from chatgot.data.prepared import PreparedData
from chatgot.data.tokenizer import CharTokenizer, Tokenizer
from chatgot.errors import ConfigError

MIN_CHARACTERS = 40
"""Shorter passages are everybody's words."""
KEPT_PLACES = 1000
"""Places of one passage that are kept; all are counted."""
EFFORT = 10_000_000
"""Stretches that are joined to passages at most: seconds. A text that repeats itself in one that does has more."""
_WINDOW = 1 << 17  # tokens that are decoded at once

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Tokens begin..end - 1 of a split, and where they begin. `file` and `line` (from 1) are None in a folder that an
    earlier version prepared.
    """

    begin: int
    end: int
    file: str | None
    line: int | None

    def __str__(self) -> str:
        return f"token {self.begin}" if self.file is None else f"{self.file}:{self.line}"


@dataclass
class Copy:
    """A passage text[begin:end], in characters, that stands there `count` times and is part of no longer one."""

    begin: int
    end: int
    count: int
    places: list[Place]
    """In reading order, at most KEPT_PLACES."""


def find_copies(
    text: str, data: PreparedData, min_characters: int = MIN_CHARACTERS, split: str = "train"
) -> list[Copy]:
    """`search` all of a split, with a warning where that ended early."""
    (found, searched), asked = search(text, data, min_characters, split, effort=EFFORT), len(getattr(data, split))
    if searched < asked:
        why = "the text that is looked for repeats itself, and so does the one that is searched"
        logger.warning(f"copies: looked for in {searched} of {asked} tokens only: {why}")
    return found


def search(
    text: str,
    data: PreparedData,
    min_characters: int = MIN_CHARACTERS,
    split: str = "train",
    most: int | None = None,
    effort: int = EFFORT,
) -> tuple[list[Copy], int]:
    """Find all longest passages of at least `min_characters` that stand verbatim in a split; returns them in their
    order in the text, and how many tokens of the split were searched.

    Args:
        most: tokens of the split that are searched, from its beginning; None: all.
        effort: it ends when so many stretches were joined.

    Raises:
        ConfigError: fewer than one character asked for, or the library ahocorasick_rs is missing.
    """
    if min_characters < 1:
        raise ConfigError(f"{min_characters} characters: a passage that is looked for has at least 1")
    where = Places(data, split)
    searched, overlap = len(where.tokens[:most]), 4 * min_characters  # a character has at most four bytes, a token >= 1
    if len(text) < min_characters:
        return [], searched
    matcher = _Matcher(text, min_characters, effort)
    base, held = 0, b""
    for number, fresh in enumerate(where.windows(most)):
        matcher.search(held + fresh, base - len(held), len(held))
        if matcher.effort <= 0:
            searched = number * _WINDOW
            break
        base, held = base + len(fresh), (held + fresh)[-overlap:]
    found = [
        Copy(begin, end, count, [where.place(*at) for at in places]) for begin, end, count, places in matcher.longest()
    ]
    return found, searched


def covered(found: Iterable[tuple[int, int]], since: int = 0) -> int:
    """Characters from `since` on that stand in at least one of the passages, given by begin and end."""
    total, last = 0, since
    for begin, end in sorted(found):
        total, last = total + max(0, end - max(begin, last)), max(last, end)
    return total


class Places:
    """Bytes of a split's text -> tokens, files and lines. Knows as much of the text as was read of `windows`."""

    def __init__(self, data: PreparedData, split: str) -> None:
        self.tokens: np.ndarray = getattr(data, split)
        self.decode, self._sizes = _decoder(data.tokenizer)
        self._parts = (data.meta.parts or {}).get(split, ())
        self._names = [file.name for file in data.meta.files]
        self._windows: list[tuple[int, int, int]] = []  # first byte, first token, line ends before
        self._window = lru_cache(maxsize=4)(self._decoded)
        self._lines_before = lru_cache(maxsize=1024)(self._count_lines)

    def windows(self, most: int | None = None) -> Iterator[bytes]:
        """The text of the tokens up to `most`, or of all, in pieces; each is known from then on."""
        tokens, base, lines = self.tokens[:most], 0, 0
        for token in range(0, len(tokens), _WINDOW):
            raw = self.decode(tokens[token : token + _WINDOW])
            self._windows.append((base, token, lines))
            yield raw
            base, lines = base + len(raw), lines + raw.count(b"\n")

    def read(self, most: int | None = None) -> Places:
        """Read the windows up to token `most`, or all."""
        for _ in self.windows(most):
            pass
        return self

    def place(self, begin: int, end: int) -> Place:
        """The place of the bytes begin..end - 1."""
        return Place(self._token(begin), self._token(end - 1) + 1, *self._file_line(begin))

    def of_token(self, token: int) -> Place:
        """The place of one token."""
        base, first, _ = self._windows[bisect_right(self._windows, token, key=lambda one: one[1]) - 1]
        byte = base + int(self._sizes[self.tokens[first:token]].sum())
        return Place(token, token + 1, *self._file_line(byte))

    def _file_line(self, byte: int) -> tuple[str | None, int | None]:
        if not self._parts:
            return None, None
        part = self._parts[bisect_right(self._parts, byte, key=lambda one: one.begin) - 1]
        return self._names[part.file], part.line + self._count_lines(byte) - self._lines_before(part.begin)

    def _at(self, byte: int) -> int:
        return bisect_right(self._windows, byte, key=lambda one: one[0]) - 1

    def _token(self, byte: int) -> int:
        base, first, _ = self._windows[self._at(byte)]
        return first + int(np.searchsorted(self._window(self._at(byte))[1], byte - base, side="right"))

    def _count_lines(self, byte: int) -> int:
        base, _, lines = self._windows[self._at(byte)]
        return lines + self._window(self._at(byte))[0].count(b"\n", 0, byte - base)

    def _decoded(self, number: int) -> tuple[bytes, np.ndarray]:
        """A window's text, and where each of its tokens ends in it."""
        first = self._windows[number][1]
        ids = self.tokens[first : first + _WINDOW]
        return self.decode(ids), np.cumsum(self._sizes[ids])


def _decoder(tokenizer: Tokenizer) -> tuple[Callable[[np.ndarray], bytes], np.ndarray]:
    """A function from token ids to UTF-8, and the bytes of each token."""
    table = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    sizes = np.array([len(one) for one in table], dtype=np.int32)
    raw = np.frombuffer(b"".join(table), dtype=np.uint8)
    if int(sizes.max()) == 1:
        return (lambda ids: raw[ids].tobytes()), sizes
    if isinstance(tokenizer, CharTokenizer):
        return (lambda ids: tokenizer.decode(ids).encode("utf-8")), sizes
    begins = np.cumsum(sizes, dtype=np.int32) - sizes

    def decode(ids: np.ndarray) -> bytes:
        size = sizes[ids]
        shift = begins[ids] - np.cumsum(size, dtype=np.int32) + size  # a token's place in the table minus in the text
        at = np.repeat(shift, size)
        at += np.arange(len(at), dtype=np.int32)
        return raw.take(at, mode="clip").tobytes()

    return decode, sizes


class _Matcher:
    """Joins the matches of all stretches of `size` characters of a text to passages.

    Half-stretches of the text, so spaced that every stretch has one whole, are looked for first: their automaton is
    small enough for a cache, and where none is found there is no stretch.
    """

    def __init__(self, text: str, size: int, effort: int) -> None:
        try:
            from ahocorasick_rs import BytesAhoCorasick, Implementation
        except ImportError as error:
            raise ConfigError(
                f"copies are looked for with ahocorasick_rs ({error}); pip install ahocorasick-rs"
            ) from error
        raw = [character.encode("utf-8", "replace") for character in text]
        self.effort = effort
        """What is left of it."""
        self._size = size
        self._offset = np.cumsum([0, *map(len, raw)]).tolist()
        stretches: dict[bytes, list[int]] = {}
        for i in range(len(text) - size + 1):
            stretches.setdefault(b"".join(raw[i : i + size]), []).append(i)
        self._positions = list(stretches.values())
        self._automaton = BytesAhoCorasick(list(stretches))
        half = (size + 1) // 2
        halves = {b"".join(raw[i : i + half]) for i in range(0, len(text) - half + 1, size - half + 1)}
        self._halves = BytesAhoCorasick(list(halves), implementation=Implementation.DFA)
        self._open: dict[int, list[int]] = {}
        """Byte of the split minus byte of the text -> first and last stretch, first byte and end."""
        self._found: dict[tuple[int, int], list[tuple[int, int]]] = {}
        """First character and end of a passage -> first byte and end of its first KEPT_PLACES in the split."""
        self._counts: Counter[tuple[int, int]] = Counter()

    def search(self, raw: bytes, base: int, known: int) -> None:
        """Look through raw, which begins at byte `base`; matches within its first `known` bytes are known."""
        for first, last in self._regions(raw):
            for pattern, begin, end in self._automaton.find_matches_as_indexes(raw[first:last], overlapping=True):
                if first + end > known:
                    self._join(self._positions[pattern], base + first + begin, base + first + end)
        self._close(base + len(raw) - 4)

    def _regions(self, raw: bytes) -> list[tuple[int, int]]:
        """The parts of raw, apart from each other, that all stretches in it are within."""
        reach, found = 4 * self._size, list[tuple[int, int]]()
        for begin, end in sorted((one[1], one[2]) for one in self._halves.find_matches_as_indexes(raw, True)):
            if found and begin - reach <= found[-1][1]:
                found[-1] = (found[-1][0], max(found[-1][1], end + reach))
            else:
                found.append((max(0, begin - reach), end + reach))
        return found

    def _join(self, positions: list[int], begin: int, end: int) -> None:
        """Add the match begin..end - 1, in bytes of the split, of a stretch that stands at all these positions."""
        self.effort -= len(positions)
        if self.effort <= 0:
            return
        for i in positions:
            shift = begin - self._offset[i]
            run = self._open.get(shift)
            if run is not None and run[1] == i - 1:
                run[1], run[3] = i, end
            else:
                if run is not None:
                    self._keep(run)
                self._open[shift] = [i, i, begin, end]

    def _close(self, before: int) -> None:
        """Count the passages that end before this byte and so can grow no more."""
        for shift in [shift for shift, run in self._open.items() if run[3] < before]:
            self._keep(self._open.pop(shift))

    def _keep(self, run: list[int]) -> None:
        passage = (run[0], run[1] + self._size)
        self._counts[passage] += 1
        if self._counts[passage] <= KEPT_PLACES:
            self._found.setdefault(passage, []).append((run[2], run[3]))

    def longest(self) -> Iterator[tuple[int, int, int, list[tuple[int, int]]]]:
        """At the end: first character, end, count and byte places of the passages that are part of no longer one."""
        for run in self._open.values():
            self._keep(run)
        self._open.clear()
        furthest = 0
        for begin, end in sorted(self._found, key=lambda key: (key[0], -key[1])):
            if end > furthest:
                furthest = end
                yield begin, end, self._counts[begin, end], sorted(self._found[begin, end])
