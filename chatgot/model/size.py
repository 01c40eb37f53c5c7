"""How many parameters a GPT has, from arithmetic alone: nothing here needs torch."""

from __future__ import annotations

from chatgot.config.run import ModelConfig


def count_parameters(config: ModelConfig, vocab_size: int) -> int:
    """Number of parameters of GPT(config, vocab_size), a tied matrix counted once, from arithmetic alone."""
    d, f, n = config.d_model, config.d_hid, config.n_layers
    head_dim = d // config.n_head
    kv = config.kv_heads * head_dim
    embeddings = vocab_size * d * (1 if config.tie_embeddings else 2)
    if config.architecture == "gpt2":
        block = d * (d + 2 * kv) + (d + 2 * kv) + d * d + d + 2 * d * f + f + d + 4 * d
        return embeddings + config.max_seq_length * d + n * block + 2 * d
    block = d * (d + 2 * kv) + d * d + 3 * d * f + 2 * d + 2 * head_dim
    return embeddings + n * block + d
