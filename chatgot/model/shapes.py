"""Names and shapes of the GPT's parameters, and FLOPs of a token, by arithmetic: no torch, so a plan is quick."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from chatgot.config.run import ModelConfig

Shape = tuple[int, ...]


def parameter_shapes(config: ModelConfig, vocab_size: int) -> dict[str, Shape]:
    """The names and shapes of GPT(config, vocab_size).named_parameters(), in its order; a tied matrix once."""
    d = config.d_model
    shapes: dict[str, Shape] = {"embed_tokens.weight": (vocab_size, d)}
    if config.architecture == "gpt2":
        shapes["embed_positions.weight"] = (config.max_seq_length, d)
    for index in range(config.n_layers):
        shapes |= {f"layers.{index}.{name}": shape for name, shape in _block(config)}
    shapes |= dict(_norm(config, "norm"))
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (vocab_size, d)
    return shapes


def _block(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    d, f = config.d_model, config.d_hid
    head_dim = config.head_width
    qkv = (config.n_head + 2 * config.kv_heads) * head_dim
    yield from _norm(config, "attention_norm")
    if config.architecture == "modern":
        yield from (("attention.q_norm", (head_dim,)), ("attention.k_norm", (head_dim,)))
    yield from _linear(config, "attention.qkv", d, qkv)
    yield from _linear(config, "attention.proj", config.attention_width, d)
    yield from _norm(config, "mlp_norm")
    if config.architecture == "modern":
        yield from _linear(config, "mlp.gate_up", d, 2 * f)
    else:
        yield from _linear(config, "mlp.up", d, f)
    yield from _linear(config, "mlp.down", f, d)


def _norm(config: ModelConfig, name: str) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (config.d_model,)
    if config.architecture == "gpt2":
        yield f"{name}.bias", (config.d_model,)


def _linear(config: ModelConfig, name: str, inputs: int, outputs: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (outputs, inputs)
    if config.architecture == "gpt2":
        yield f"{name}.bias", (outputs,)


def count_parameters(config: ModelConfig, vocab_size: int) -> int:
    """Number of parameters of GPT(config, vocab_size), a tied matrix counted once."""
    return sum(prod(shape) for shape in parameter_shapes(config, vocab_size).values())


def count_matmul_parameters(config: ModelConfig, vocab_size: int) -> int:
    """Parameters that every token is multiplied with: all but the lookups. A tied output head counts."""
    looked_up = 0 if config.tie_embeddings else vocab_size
    if config.architecture == "gpt2":
        looked_up += config.max_seq_length
    return count_parameters(config, vocab_size) - looked_up * config.d_model


def flops_per_token(n_params_non_embedding: int, n_layers: int, attention_width: int, seq: int) -> float:
    """Model FLOPs of forward and backward for one token: 6 N + 12 L a T.

    N counts the parameters that are multiplied with: all but the lookups, the output head included also where it is
    tied to the token embedding. The second term is attention's scores and weighted sum, causality not discounted.
    Recomputation (activation checkpointing) is not model work and does not count. Source: PaLM (arXiv:2204.02311),
    appendix B, a being heads x head size; where that is d_model, the same formula as nanoGPT's estimate_mfu.
    """
    return 6.0 * n_params_non_embedding + 12.0 * n_layers * attention_width * seq
