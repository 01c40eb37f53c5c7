"""Estimates how much of a text stands in it twice, in one pass and bounded memory.

Passages are recognised by content: wherever the hash of 8 consecutive bytes falls under a threshold, the 256 bytes from
there are hashed and counted. The same passage gives the same samples wherever it stands, so copies are found at any
distance and any alignment. The threshold falls as distinct samples accumulate (adaptive sampling of distinct values),
which keeps at most MAX_SAMPLES of them.
"""

from __future__ import annotations

import numpy as np

PASSAGE_BYTES = 256
MAX_SAMPLES = 1 << 15
_FIRST_RATE = 16
"""At first one byte position in 16 is sampled."""
_BATCH_BYTES = 1 << 19
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
# all odd
_WEIGHTS = np.array([pow(int(_MULTIPLIER), 2 * j + 3, 1 << 64) for j in range(PASSAGE_BYTES // 8)], dtype=np.uint64)


class RepeatDetector:
    """Feed it the UTF-8 bytes of each split in order, then ask for shares."""

    def __init__(self, max_samples: int = MAX_SAMPLES) -> None:
        self._max_samples = max_samples
        self._threshold = np.uint64((1 << 64) // _FIRST_RATE)
        self._split = ""
        self._pending = bytearray()
        # (5, n) uint64, one column a sample: passage hash, anchor hash, and how many in train, val and the rest
        self._known = np.empty((5, 0), np.uint64)
        self._new: list[np.ndarray] = []  # not yet merged

    def feed(self, chunk: bytes, split: str) -> None:
        """Take the next bytes, of any number, of the split 'train', 'val' or another."""
        if split != self._split:
            self._take_pending()
            self._split, self._pending = split, bytearray()
        self._pending += chunk
        if len(self._pending) >= _BATCH_BYTES:
            self._take_pending()

    def repeated_share(self) -> float:
        """Share of the text that repeats an earlier passage, 0 to 1."""
        self._finish()
        passages = int(self._known[2:].sum())
        return 1.0 - self._known.shape[1] / passages if passages else 0.0

    def val_in_train_share(self) -> float:
        """Share of the validation text that also stands in the training text, 0 to 1."""
        self._finish()
        train, val = self._known[2], self._known[3]
        return int(val[train > 0].sum()) / int(val.sum()) if val.any() else 0.0

    def _take_pending(self) -> None:
        data = bytes(self._pending)
        starts = len(data) - PASSAGE_BYTES + 1  # positions with a whole passage behind them
        if starts <= 0:
            return
        column = {"train": 2, "val": 3}.get(self._split, 4)
        for offset in range(min(8, starts)):
            words = np.frombuffer(data, dtype="<u8", count=(len(data) - offset) // 8, offset=offset)
            anchors = words[: (starts - offset + 7) // 8] * _MULTIPLIER
            at = np.flatnonzero(anchors < self._threshold)
            samples = np.zeros((5, len(at)), np.uint64)
            for j, weight in enumerate(_WEIGHTS):
                word = words[at + j]
                samples[0] += (word ^ (word >> np.uint64(29))) * weight
            samples[1] = anchors[at]
            samples[column] = 1
            self._new.append(samples)
        if sum(samples.shape[1] for samples in self._new) > self._max_samples:
            self._merge()
        del self._pending[:starts]

    def _finish(self) -> None:
        self._take_pending()
        self._merge()

    def _merge(self) -> None:
        samples = np.concatenate([self._known, *self._new], axis=1)
        self._new = []
        while True:
            _, first, which = np.unique(samples[0], return_index=True, return_inverse=True)
            merged = samples[:, first]
            for column in (2, 3, 4):
                merged[column] = np.bincount(which.reshape(-1), samples[column], len(first)).astype(np.uint64)
            if len(first) <= self._max_samples:
                break
            self._threshold //= np.uint64(2)
            samples = merged[:, merged[1] < self._threshold]
        self._known = merged
