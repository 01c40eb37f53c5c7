"""Estimates how much of a text stands in it twice, in one pass and bounded memory.

Passages are recognised by content: wherever the hash of 8 consecutive bytes falls under a threshold, the 256 bytes from there are hashed
and remembered. The same passage gives the same samples wherever it stands, so copies are found at any distance and any alignment. The
threshold falls as samples accumulate (as in adaptive sampling of distinct values), which keeps at most MAX_SAMPLES of them.
"""

from __future__ import annotations

import numpy as np

PASSAGE_BYTES = 256
MAX_SAMPLES = 1 << 16
_FIRST_RATE = 16
"""At first one byte position in 16 is sampled."""
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class RepeatDetector:
    """Feed it the UTF-8 bytes of a text in order, then ask for shares."""

    def __init__(self, max_samples: int = MAX_SAMPLES) -> None:
        self._max_samples = max_samples
        self._threshold = np.uint64((1 << 64) // _FIRST_RATE)
        self._tail = b""
        self._position = 0  # of the first byte of _tail
        self._anchors = np.empty(0, np.uint64)
        self._hashes = np.empty(0, np.uint64)
        self._positions = np.empty(0, np.int64)
        self._weights = np.array([pow(int(_MULTIPLIER), 2 * j + 3, 1 << 64) for j in range(PASSAGE_BYTES // 8)], dtype=np.uint64)  # all odd

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes, of any number."""
        data = self._tail + chunk
        starts = len(data) - PASSAGE_BYTES + 1  # positions with a whole passage behind them
        if starts <= 0:
            self._tail = data
            return
        anchors, hashes, positions = [], [], []
        for offset in range(min(8, starts)):
            words = np.frombuffer(data, dtype="<u8", count=(len(data) - offset) // 8, offset=offset)
            mixed = words[: (starts - offset + 7) // 8] * _MULTIPLIER
            at = np.flatnonzero(mixed < self._threshold)
            anchors.append(mixed[at])
            hashes.append(self._hash_passages(words, at))
            positions.append(at * 8 + offset + self._position)
        self._anchors = np.concatenate([self._anchors, *anchors])
        self._hashes = np.concatenate([self._hashes, *hashes])
        self._positions = np.concatenate([self._positions, *positions])
        while len(self._anchors) > self._max_samples and self._threshold > 0:
            self._threshold //= np.uint64(2)
            keep = self._anchors < self._threshold
            self._anchors, self._hashes, self._positions = self._anchors[keep], self._hashes[keep], self._positions[keep]
        self._tail = data[starts:]
        self._position += starts

    def repeated_share(self) -> float:
        """Share of the text that repeats an earlier passage, 0 to 1."""
        return 1.0 - len(np.unique(self._hashes)) / len(self._hashes) if len(self._hashes) else 0.0

    def overlap_share(self, begin: int, end: int) -> float:
        """Share of the bytes [begin, end) that also stand before `begin`, 0 to 1."""
        inside = (self._positions >= begin) & (self._positions < end - PASSAGE_BYTES + 1)
        before = self._positions < begin - PASSAGE_BYTES + 1
        return float(np.isin(self._hashes[inside], self._hashes[before]).mean()) if inside.any() else 0.0

    def _hash_passages(self, words: np.ndarray, at: np.ndarray) -> np.ndarray:
        total = np.zeros(len(at), np.uint64)
        for j, weight in enumerate(self._weights):
            word = words[at + j]
            total += (word ^ (word >> np.uint64(29))) * weight
        return total
