"""The GPT: both architectures in plain PyTorch, single device. DeepSpeed, checkpointing and compile live elsewhere.

gpt2:   LayerNorm, learned positions, GELU (tanh), biases; what transformers' GPT2LMHeadModel computes.
modern: RMSNorm, rotary positions, QK-norm, SwiGLU, no biases, grouped key/value heads; what transformers'
    Qwen3ForCausalLM computes.

Shapes in comments: B rows, T tokens, C = d_model, V = vocab_size, nh query heads, nkv key/value heads, hd = head_width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from chatgot.config.run import ModelConfig
from chatgot.model.kv_cache import Cache
from chatgot.model.rms_norm import rms_norm

BlockCall = Callable[[Tensor], Tensor]
Rope = tuple[Tensor, Tensor]
"""cos and sign-carrying sin, (T, 1, hd) each, or (B, T, 1, hd)."""


class GPT(nn.Module):
    """A decoder-only transformer.

    The weights are NaN until `init_weights` or `load_state_dict` fills them: a forgotten initialisation shows in the
    first loss, and building the model draws nothing from the global random state.
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        if vocab_size < 1:
            raise ValueError(f"vocab_size = {vocab_size}: must be at least 1")
        self.config = config
        self.vocab_size = vocab_size
        self.embed_tokens = _Embedding(vocab_size, config.d_model)
        learned = config.architecture == "gpt2"
        self.embed_positions = _Embedding(config.max_seq_length, config.d_model) if learned else None
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.n_layers))
        self.norm = _norm(config)
        self.lm_head = _Linear(config.d_model, vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self._checkpoint: Callable[[BlockCall, Tensor], Any] | None = None
        self._checkpoint_every = 1

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """GPT-2's initialisation: N(0, init_std), block outputs scaled by 1/sqrt(2 n_layers), biases 0, norms 1.

        A pure function of (config, vocab_size, seed): drawn in fp32 on the CPU from a generator of its own, whatever
        the parameters' device and dtype.
        """
        generator = torch.Generator().manual_seed(seed)
        config = self.config
        output_std = 0.0 if config.zero_init_projections else config.init_std / math.sqrt(2 * config.n_layers)
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                std = output_std if name.endswith((".proj.weight", ".down.weight")) else config.init_std
                parameter.copy_(torch.randn(parameter.shape, generator=generator).mul_(std))
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.fill_(1.0)

    def set_activation_checkpointing(
        self, checkpoint: Callable[[BlockCall, Tensor], Any] | None, every_n_layers: int = 1
    ) -> None:
        """Recompute every n-th block in the backward pass, beginning with the first; None turns it off.

        Args:
            checkpoint: called as checkpoint(block, x), x (B, T, C) its only tensor, in forwards that need gradients.
                In evaluation mode, for torch.autograd.grad, which DeepSpeed's own refuses, it is torch's in its place.
        """
        if every_n_layers < 1:
            raise ValueError(f"every_n_layers = {every_n_layers}: must be at least 1")
        self._checkpoint = checkpoint
        self._checkpoint_every = every_n_layers

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor | None = None,
        cache: Cache | None = None,
        reduction: Literal["mean", "sum", "none"] = "mean",
        last_only: bool = False,
    ) -> Tensor:
        """Logits (B, T, V) in the model's dtype, or with targets the loss in nats, an fp32 scalar.

        Args:
            input_ids: (B, T) int64.
            targets: (B, T) int64, the token that follows each input; -100 counts in no loss.
            cache: keys and values of the tokens before input_ids, to be filled; one token at a time may follow them.
            reduction: over the targets that count; the mean over none is NaN. none: a loss (B, T), 0 where ignored.
            last_only: logits of the last position only, (B, 1, V).

        Raises:
            ValueError: more tokens than max_seq_length, or arguments that exclude each other.
        """
        _, T = input_ids.shape
        start = cache.length if cache is not None else 0
        if start + T > self.config.max_seq_length:
            raise ValueError(f"{start + T} tokens are more than max_seq_length = {self.config.max_seq_length}")
        if targets is not None and (cache is not None or last_only):
            raise ValueError("a loss needs all positions: targets exclude cache and last_only")
        if start and T != 1:
            raise ValueError(f"{T} tokens after a filled cache: only one at a time may follow (reset it to start anew)")

        x = self.embed_tokens(input_ids)  # (B, T, C)
        device = input_ids.device
        positions = torch.arange(T, device=device) if cache is None else cache.begin(T, device)
        rope = None
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions)
        else:
            rope = rope_tables(positions, self.config.head_width, self.config.rope_theta, x.dtype)
        x = F.dropout(x, self.config.dropout, self.training)

        checkpoint = self._checkpoint if torch.is_grad_enabled() else None
        if checkpoint is not None and not self.training:
            checkpoint = functools.partial(torch_checkpoint, use_reentrant=False)
        for index, block in enumerate(self.layers):
            if checkpoint is not None and index % self._checkpoint_every == 0:
                # rope is closed over: DeepSpeed's partition_activations and cpu_checkpointing empty float arguments.
                x = checkpoint(lambda h, block=block: block(h, rope=rope), x)
            else:
                x = block(x, rope=rope, cache=cache)
        if cache is not None:
            cache.advance(T)

        if last_only:
            x = x[:, -1:]
        logits = self.lm_head(self.norm(x))  # (B, T, V)
        if targets is None:
            return logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction=reduction)
        return loss.view_as(targets) if reduction == "none" else loss


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)).

    rope and cache are passed by keyword, because ZeRO-3's hooks look through positional arguments for activations.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.attention_norm = _norm(config)
        self.attention = Attention(config, index)
        self.mlp_norm = _norm(config)
        self.mlp = SwiGLU(config) if config.architecture == "modern" else GeluMLP(config)

    def forward(self, x: Tensor, rope: Rope | None = None, cache: Cache | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope=rope, cache=cache)
        return x + self.mlp(self.mlp_norm(x))


class Attention(nn.Module):
    """Causal self-attention with one merged projection for queries, keys and values; scale 1/sqrt(hd)."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.n_head, self.n_kv_head = config.n_head, config.kv_heads
        self.head_dim, self.eps = config.head_width, config.epsilon
        self.dropout = config.dropout
        bias = config.architecture == "gpt2"
        rows = (self.n_head + 2 * self.n_kv_head) * self.head_dim  # all of q, all of k, all of v
        self.qkv = _Linear(config.d_model, rows, bias=bias)
        self.proj = _Linear(config.attention_width, config.d_model, bias=bias)
        if config.architecture == "modern":
            # Parameters of this module and not of children: ZeRO-3 gathers a parameter when its own module runs.
            self.q_norm = nn.Parameter(torch.ones(self.head_dim))
            self.k_norm = nn.Parameter(torch.ones(self.head_dim))
        else:
            self.q_norm = self.k_norm = None

    def forward(self, x: Tensor, rope: Rope | None = None, cache: Cache | None = None) -> Tensor:
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, -1, self.head_dim)  # (B, T, nh + 2 nkv, hd)
        q, k, v = qkv.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = rms_norm(q, self.q_norm, self.eps), rms_norm(k, self.k_norm, self.eps)
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, nh, T, hd), (B, nkv, T, hd)
        if cache is not None:
            k, v = cache.update(self.index, k, v)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=cache.mask if cache is not None else None,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=T > 1,  # a single token attends to everything before it
            enable_gqa=self.n_kv_head != self.n_head,
        )
        y = self.proj(y.transpose(1, 2).reshape(B, T, -1))  # from (B, T, nh hd)
        return F.dropout(y, self.dropout, self.training)


class GeluMLP(nn.Module):
    """GPT-2's feed-forward layer: GELU in its tanh form (gelu_new)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.up = _Linear(config.d_model, config.d_hid, bias=True)
        self.down = _Linear(config.d_hid, config.d_model, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.down(F.gelu(self.up(x), approximate="tanh")), self.dropout, self.training)


class SwiGLU(nn.Module):
    """Gated feed-forward layer (Shazeer, 2020): down(silu(gate(x)) * up(x)), gate and up merged."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.gate_up = _Linear(config.d_model, 2 * config.d_hid, bias=False)  # rows: all gate, all up
        self.down = _Linear(config.d_hid, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return F.dropout(self.down(F.silu(gate) * up), self.dropout, self.training)


class RMSNorm(nn.Module):
    """rms_norm with its weight."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rope_tables(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rope:
    """Rotary tables (Su et al., 2021) for positions (..., T): cos and sin, (..., T, 1, hd) each, their halves split.

    Computed in fp32 and then cast, as transformers does. Half of sin is negated, so that rotating is one roll.
    """
    even = torch.arange(0, head_dim, 2, device=positions.device).float()
    inverse_wavelength = 1.0 / theta ** (even / head_dim)  # (hd / 2,)
    angles = positions.float()[..., None, None] * inverse_wavelength  # (..., T, 1, hd / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """Rotate x (B, T, heads, hd) by its positions' angles."""
    cos, sin = (table.to(x.dtype) for table in rope)  # under autocast x is narrower than the residual stream
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def _norm(config: ModelConfig) -> nn.Module:
    kind = RMSNorm if config.architecture == "modern" else nn.LayerNorm
    return kind(config.d_model, eps=config.epsilon)


class _Linear(nn.Linear):
    """nn.Linear that is born as NaN instead of drawing from the global random state."""

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.constant_(parameter, math.nan)


class _Embedding(nn.Embedding):
    """nn.Embedding that is born as NaN instead of drawing from the global random state."""

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, math.nan)
