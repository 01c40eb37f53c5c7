"""Batches from a token array. The data order is a pure function of (seed, global sample index)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]
"""(input_ids, targets), both (B, T) int64."""

IGNORE_INDEX = -100
"""A target with this value counts in no loss: the default of torch's cross_entropy, which the model uses."""

_FEISTEL_ROUNDS = 8
LOOK_AHEAD = 4096
"""Samples whose places are computed at once: numpy costs by the call, which shows beside the step of a small model."""


class DataOrder:
    """Which window of the tokens the i-th sample of a run is.

    Windows are blocks of T + 1 tokens at stride T, so an epoch shows no target twice; each epoch starts at another
    offset in [0, T), so that block edges move. Within an epoch the blocks come in a keyed pseudo-random order without
    replacement: a Feistel network over the next power of four, walked until it lands inside (Black & Rogaway 2002,
    "Ciphers with arbitrary finite domains").
    """

    def __init__(self, n_tokens: int, block_size: int, seed: int) -> None:
        """Raises ValueError if there is not one whole sample of block_size + 1 tokens."""
        if block_size < 1 or n_tokens < block_size + 1:
            raise ValueError(f"{n_tokens} tokens do not hold one sample of block_size + 1 = {block_size + 1}")
        self.n_tokens = n_tokens
        self.block_size = block_size
        self.samples_per_epoch = max((n_tokens - block_size) // block_size, 1)
        self._offsets = min(block_size, n_tokens - self.samples_per_epoch * block_size)
        self._seed = np.uint64(seed & 0xFFFF_FFFF_FFFF_FFFF)
        self._half_bits = np.uint64(max((self.samples_per_epoch - 1).bit_length() + 1, 2) // 2)

    def starts(self, indices: np.ndarray) -> np.ndarray:
        """First token of each global sample index, both (n,) int64. Raises ValueError for a negative index."""
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and int(indices.min()) < 0:
            raise ValueError(f"negative sample index {indices.min()}")
        epochs, slots = np.divmod(indices.reshape(-1), self.samples_per_epoch)
        keys, offsets = self._epochs(epochs)
        blocks = self._permute(slots.astype(np.uint64), keys)
        return (blocks * np.uint64(self.block_size) + offsets).astype(np.int64).reshape(indices.shape)

    def samples_with(self, begin: int, end: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Global indices of the samples first..last whose window has any of the tokens begin..end - 1, in order, and
        their `starts`, both (n,) int64: the way back, in time that does not depend on the length of the text.
        """
        if last < first or end <= begin:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        epochs = np.arange(first // self.samples_per_epoch, last // self.samples_per_epoch + 1)
        keys, offsets = self._epochs(epochs)
        shift = offsets.astype(np.int64)
        lowest = -((shift + self.block_size - begin) // self.block_size)  # the first that reaches `begin`
        highest = (end - 1 - shift) // self.block_size
        blocks = lowest[:, None] + np.arange(int((highest - lowest).max(initial=-1)) + 1)
        inside = (blocks >= 0) & (blocks <= np.minimum(highest, self.samples_per_epoch - 1)[:, None])
        rows, _ = np.nonzero(inside)
        slots = self._permute(blocks[inside].astype(np.uint64), keys[rows], back=True).astype(np.int64)
        indices, starts = epochs[rows] * self.samples_per_epoch + slots, blocks[inside] * self.block_size + shift[rows]
        asked = np.flatnonzero((indices >= first) & (indices <= last))
        asked = asked[np.argsort(indices[asked])]
        return indices[asked], starts[asked]

    def _epochs(self, epochs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The key and the offset of each epoch, all (n,) uint64."""
        keys = _mix(self._seed + _mix(epochs.astype(np.uint64)))
        return keys, _mix(keys) % np.uint64(self._offsets)

    def _permute(self, slots: np.ndarray, keys: np.ndarray, back: bool = False) -> np.ndarray:
        """The block of each slot of an epoch, or back, both (n,) uint64 and below samples_per_epoch."""
        blocks = self._feistel(slots, keys, back)
        outside = np.flatnonzero(blocks >= self.samples_per_epoch)
        while outside.size:  # at most four values for each inside one, so this ends soon
            blocks[outside] = self._feistel(blocks[outside], keys[outside], back)
            outside = outside[blocks[outside] >= self.samples_per_epoch]
        return blocks

    def _feistel(self, values: np.ndarray, keys: np.ndarray, back: bool) -> np.ndarray:
        half = self._half_bits
        mask = (np.uint64(1) << half) - np.uint64(1)
        left, right = values >> half, values & mask
        rounds = range(1, _FEISTEL_ROUNDS + 1)
        if back:  # the same network with its halves exchanged and its rounds reversed
            left, right, rounds = right, left, reversed(rounds)
        for round_number in rounds:
            left, right = right, left ^ (_mix(right ^ (keys + np.uint64(round_number << 40))) & mask)
        return (right << half) | left if back else (left << half) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele, Lea & Flood 2014): a bijection of uint64 that scatters neighbours."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class TrainBatches:
    """One rank's share of global batches, which hold the same samples whatever the ranks and the micro-batch."""

    def __init__(
        self,
        tokens: np.ndarray,
        order: DataOrder,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        """Raises ValueError if the sizes do not divide, or rank or order do not fit."""
        across = micro_batch_size * world_size
        if across < 1 or global_batch_size < 1 or global_batch_size % across:
            sizes = f"micro batch {micro_batch_size} x {world_size} ranks"
            raise ValueError(f"global batch {global_batch_size} is not a multiple of {sizes}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}")
        if len(tokens) != order.n_tokens:
            raise ValueError(f"the order is for {order.n_tokens} tokens, got {len(tokens)}")
        self.accumulation = global_batch_size // across
        self.global_batch_size = global_batch_size
        self.block_size = order.block_size
        self.tokens_per_step = global_batch_size * order.block_size
        """Tokens of one optimizer step, over all ranks."""
        self.order = order
        # every window as a view (n, T + 1); indexing it with starts copies whole rows
        self._windows = np.lib.stride_tricks.sliding_window_view(tokens, order.block_size + 1)
        slots = np.arange(global_batch_size, dtype=np.int64).reshape(self.accumulation, world_size, micro_batch_size)
        self._slots = np.ascontiguousarray(slots[:, rank]).reshape(-1)
        self._known_first, self._known = 0, np.empty((0, len(self._slots)), dtype=np.int64)

    def indices(self, first_sample: int) -> np.ndarray:
        """Global sample indices (accumulation * B,) of this rank in the step that begins at first_sample, in order."""
        return first_sample + self._slots

    def _starts(self, first_sample: int) -> np.ndarray:
        """`order.starts` of `indices`, which are computed for some steps at once and kept."""
        step, inside = divmod(first_sample - self._known_first, self.global_batch_size)
        if inside or not 0 <= step < len(self._known):
            steps = np.arange(max(1, LOOK_AHEAD // len(self._slots)))[:, None]
            self._known = self.order.starts(self.indices(first_sample) + steps * self.global_batch_size)
            self._known_first, step = first_sample, 0
        return self._known[step]

    def tokens(self, sample: int) -> np.ndarray:
        """The (T + 1,) tokens of a global sample index."""
        return self._windows[int(self.order.starts(np.array([sample]))[0])]

    def micro_batches(self, first_sample: int) -> Iterator[Batch]:
        """The micro-batches of the step of samples first_sample .. first_sample + global_batch_size - 1."""
        for rows in self._starts(first_sample).reshape(self.accumulation, -1):
            samples = torch.from_numpy(self._windows[rows].astype(np.int64))  # (B, T + 1)
            yield samples[:, :-1].contiguous(), samples[:, 1:].contiguous()

    def batch_hash(self, first_sample: int) -> int:
        """The 64-bit hashes of this rank's samples (index and tokens) of a step, added modulo 2**64.

        Added over the ranks it is the global batch's, whatever the number of ranks, micro batch and accumulation.
        """
        indices = self.indices(first_sample)
        total = 0
        for index, window in zip(indices.tolist(), self._windows[self._starts(first_sample)]):
            digest = hashlib.blake2b(index.to_bytes(8, "little"), digest_size=8)
            digest.update(window.tobytes())
            total += int.from_bytes(digest.digest(), "little")
        return total % 2**64


class EvalBatches:
    """A whole split: over all ranks every token but the first is a target exactly once. Or a part of it, in windows of
    block_size targets at even distances.

    All ranks get the same number of batches. What is missing in the last window and in the last batches is filled up
    with input 0 and target -100; a batch can consist of nothing else, so sum the losses and divide by `target_tokens`
    instead of averaging batch means.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        block_size: int,
        batch_size: int,
        rank: int,
        world_size: int,
        max_tokens: int | None = None,
    ) -> None:
        """`max_tokens`: targets at most, rounded down to windows, but one of them; None: all.

        Raises ValueError if there is no target token, or sizes and rank make no sense.
        """
        if len(tokens) < 2:
            raise ValueError(f"{len(tokens)} tokens hold no target")
        if min(block_size, batch_size, world_size) < 1 or not 0 <= rank < world_size:
            raise ValueError(f"block_size {block_size}, batch_size {batch_size}, rank {rank} of {world_size}")
        self._tokens = tokens
        self._block_size = block_size
        self._batch_size = batch_size
        self._rank = rank
        self._world_size = world_size
        targets = len(tokens) - 1
        windows = total = -(-targets // block_size)
        if max_tokens is not None and targets > max_tokens:
            windows = max(1, max_tokens // block_size)
        self._starts = np.arange(windows) * total // windows * block_size  # each at its place, whatever the ranks
        self.target_tokens = int(np.minimum(block_size, targets - self._starts).sum())
        """Targets, over all ranks."""
        self._batches = -(-windows // (batch_size * world_size))

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        shape = (self._batch_size, self._block_size)
        for i in range(self._batches):
            first = (i * self._world_size + self._rank) * self._batch_size
            input_ids, targets = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORE_INDEX)
            for row, start in enumerate(self._starts[first : first + self._batch_size].tolist()):
                span = torch.from_numpy(self._tokens[start : start + self._block_size + 1].astype(np.int64))
                input_ids[row, : len(span) - 1], targets[row, : len(span) - 1] = span[:-1], span[1:]
            yield input_ids, targets
