"""Keys and values of the tokens already seen, so that sampling one more token costs one token's work."""

from __future__ import annotations

import torch
from torch import Tensor

from chatgot.config.run import ModelConfig


class KVCache:
    """Preallocated keys and values of all layers; attention reads slices of them, never a mask over the full length.

    One forward of T tokens stores them at positions [length, length + T) in every layer; GPT.forward then calls
    `advance(T)`.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Device and dtype None: those of the first keys stored (under autocast they differ from the parameters')."""
        if batch_size < 1:
            raise ValueError(f"batch_size = {batch_size}: must be at least 1")
        head_dim = config.d_model // config.n_head
        self._shape = (config.n_layers, 2, batch_size, config.kv_heads, config.max_seq_length, head_dim)
        self._device, self._dtype = device, dtype
        self._buffer: Tensor | None = None  # keys and values: (n_layers, 2, B, n_kv, max_seq_length, hd)
        self.length = 0
        """Tokens stored so far: the position of the next one."""

    @property
    def max_seq_length(self) -> int:
        """Tokens that fit."""
        return self._shape[4]

    def reset(self) -> None:
        """Forget all tokens and keep the memory."""
        self.length = 0

    def advance(self, n_tokens: int) -> None:
        """Count the tokens that every layer has stored."""
        self.length += n_tokens

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, n_kv, T, hd) of the next T tokens; return this layer's so far (B, n_kv, length + T, hd)."""
        if self._buffer is None:
            self._buffer = torch.empty(self._shape, device=self._device or k.device, dtype=self._dtype or k.dtype)
        end = self.length + k.shape[2]
        keys, values = self._buffer[layer]  # (B, n_kv, max_seq_length, hd) each
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]
