"""Keys and values of tokens already seen, so that one more token costs one token's work.

Shapes in comments: B rows, T tokens, nkv key/value heads, hd = head_dim.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from chatgot.config.run import ModelConfig


class Cache(Protocol):
    """What GPT.forward asks of a cache: begin, then update in every layer, then advance."""

    mask: Tensor | None
    """What each query may attend to, (B, 1, 1, tokens) bool; None: everything that `update` returns."""

    @property
    def length(self) -> int:
        """Tokens stored, of the longest row."""
        ...

    def begin(self, T: int, device: torch.device) -> Tensor:
        """Positions of the next T tokens, (T,), or (B, 1) where rows are at different ones."""
        ...

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, nkv, T, hd) of the next T tokens; return this layer's so far (B, nkv, tokens, hd)."""
        ...

    def advance(self, T: int) -> None:
        """Count the T tokens that every layer has stored."""
        ...


class KVCache:
    """Rows of one length. Attention reads slices of it, never a mask over the full length."""

    mask = None

    def __init__(self, config: ModelConfig, batch_size: int, memory: Tensor | None = None) -> None:
        """Make an empty one; `memory` (n_layers, 2, B, nkv, max_seq_length, hd) in place of its own."""
        if batch_size < 1:
            raise ValueError(f"batch_size = {batch_size}: must be at least 1")
        self._shape = _shape(config, batch_size)
        self._memory = memory  # else made with device and dtype of the first keys
        self.length = 0
        """Tokens stored so far: the position of the next one. 0 forgets them and keeps the memory."""

    def begin(self, T: int, device: torch.device) -> Tensor:
        return torch.arange(self.length, self.length + T, device=device)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self._memory is None:
            self._memory = torch.empty(self._shape, device=k.device, dtype=k.dtype)
        end = self.length + k.shape[2]
        keys, values = self._memory[layer]  # (B, nkv, max_seq_length, hd) each
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, T: int) -> None:
        self.length += T


class SlotCache:
    """Rows of different lengths that come and go, for one forward over all of them.

    The rows in use are the first ones, so that attention reads a slice: a row that ends makes place for the last one.
    """

    def __init__(self, config: ModelConfig, slots: int, device: torch.device, dtype: torch.dtype) -> None:
        self._config = config
        # Zeros, because what the mask leaves out is still multiplied by 0, and memory may hold NaN.
        self._memory = torch.zeros(_shape(config, slots), device=device, dtype=dtype)
        self.lengths: list[int] = []
        """Tokens stored of each row in use."""
        self.mask: Tensor | None = None
        self._at = torch.empty(0, dtype=torch.long)

    @property
    def length(self) -> int:
        return max(self.lengths, default=0)

    def alone(self, row: int) -> KVCache:
        """An empty cache over one row's memory, to fill it with many tokens at once; then note its length here."""
        return KVCache(self._config, 1, self._memory[:, :, row : row + 1])

    def remove(self, row: int) -> None:
        """End a row; the last one takes its place."""
        last = len(self.lengths) - 1
        if row != last:
            self._memory[:, :, row, :, : self.lengths[last]] = self._memory[:, :, last, :, : self.lengths[last]]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def begin(self, T: int, device: torch.device) -> Tensor:
        self._at = torch.tensor(self.lengths, device=device)  # (B,)
        seen = torch.arange(self.length + 1, device=device) <= self._at[:, None]  # (B, tokens)
        self.mask = None if min(self.lengths) == self.length else seen[:, None, None]
        return self._at[:, None]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        rows = len(self.lengths)
        keys, values = self._memory[layer, :, :rows]  # (B, nkv, max_seq_length, hd) each
        each = torch.arange(rows, device=k.device)
        keys[each, :, self._at] = k[:, :, 0]
        values[each, :, self._at] = v[:, :, 0]
        return keys[:, :, : self.length + 1], values[:, :, : self.length + 1]

    def advance(self, T: int) -> None:
        self.lengths = [length + T for length in self.lengths]


def _shape(config: ModelConfig, rows: int) -> tuple[int, ...]:
    return (config.n_layers, 2, rows, config.kv_heads, config.max_seq_length, config.head_width)
