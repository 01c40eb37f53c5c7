"""The names and shapes of our parameters in transformers' GPT-2 and Qwen3, and in llama.cpp. Tables, no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from chatgot.config.run import ModelConfig
from chatgot.model.shapes import Shape, parameter_shapes


@dataclass(frozen=True)
class Part:
    """A tensor of the exported file: rows [start, start + rows) of one of our parameters, possibly transposed."""

    name: str
    ours: str
    start: int
    rows: int
    columns: int | None
    """None: one dimension."""
    transposed: bool = False

    @property
    def shape(self) -> Shape:
        """As it stands in the file."""
        if self.columns is None:
            return (self.rows,)
        return (self.columns, self.rows) if self.transposed else (self.rows, self.columns)


Names = dict[str, str | tuple[str, ...]]
"""Our name of a parameter without .weight or .bias -> theirs; several where ours are merged."""

GPT2_BLOCK: Names = {
    "attention_norm": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.proj": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
QWEN3_BLOCK: Names = {
    "attention_norm": "input_layernorm",
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention.proj": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": "mlp.down_proj",
}
GGUF_BLOCK: Names = {
    "attention_norm": "attn_norm",
    "attention.q_norm": "attn_q_norm",
    "attention.k_norm": "attn_k_norm",
    "attention.proj": "attn_output",
    "mlp_norm": "ffn_norm",
    "mlp.up": "ffn_up",
    "mlp.gate_up": ("ffn_gate", "ffn_up"),
    "mlp.down": "ffn_down",
}
OUTSIDE: dict[str, Names] = {
    "gpt2": {
        "embed_tokens": "transformer.wte",
        "embed_positions": "transformer.wpe",
        "norm": "transformer.ln_f",
        "lm_head": "lm_head",
    },
    "modern": {"embed_tokens": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"},
    "gguf": {
        "embed_tokens": "token_embd",
        "embed_positions": "position_embd",
        "norm": "output_norm",
        "lm_head": "output",
    },
}


def transformers_parts(config: ModelConfig, vocab_size: int) -> Iterator[Part]:
    """Every tensor of GPT2LMHeadModel or Qwen3ForCausalLM, tied weights once."""
    if config.architecture == "gpt2":
        # GPT-2's Conv1D keeps its matrices as (in, out)
        return _parts(config, vocab_size, OUTSIDE["gpt2"], GPT2_BLOCK, "transformer.h", transposed=True)
    return _parts(config, vocab_size, OUTSIDE["modern"], QWEN3_BLOCK, "model.layers", transposed=False)


def gguf_parts(config: ModelConfig, vocab_size: int) -> Iterator[Part]:
    """Every tensor of a GGUF file of the architecture gpt2 or qwen3, tied weights once."""
    qkv: Names = {"attention.qkv": "attn_qkv" if config.architecture == "gpt2" else ("attn_q", "attn_k", "attn_v")}
    return _parts(config, vocab_size, OUTSIDE["gguf"], GGUF_BLOCK | qkv, "blk", transposed=False)


def _parts(
    config: ModelConfig, vocab_size: int, outside: Names, block: Names, prefix: str, transposed: bool
) -> Iterator[Part]:
    for ours, shape in parameter_shapes(config, vocab_size).items():
        name, dot, suffix = ours.rpartition(".")
        if suffix not in ("weight", "bias"):  # q_norm and k_norm are parameters of their attention
            name, dot, suffix = ours, ".", "weight"
        if name.startswith("layers."):
            _, index, name = name.split(".", 2)
            theirs, before = block[name], f"{prefix}.{index}."
        else:
            theirs, before = outside[name], ""
        names = (theirs,) if isinstance(theirs, str) else theirs
        turned = transposed and len(shape) == 2 and bool(before)
        start = 0
        for one, rows in zip(names, _cuts(config, shape[0], len(names))):
            columns = shape[1] if len(shape) == 2 else None
            yield Part(f"{before}{one}{dot}{suffix}", ours, start, rows, columns, turned)
            start += rows


def _cuts(config: ModelConfig, rows: int, parts: int) -> list[int]:
    """The rows of each part of a merged matrix: q, k, v; gate, up; or one."""
    if parts != 3:
        return [rows // parts] * parts
    kv = config.kv_heads * config.head_width
    return [config.attention_width, kv, kv]


def transformers_config(config: ModelConfig, vocab_size: int, dtype: str) -> dict[str, Any]:
    """config.json; `dtype` as torch names it: float32."""
    shared = {
        "dtype": dtype,
        "torch_dtype": dtype,  # the name that transformers 4 reads
        "vocab_size": vocab_size,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
        "use_cache": True,
    }
    if config.architecture == "gpt2":
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_positions": config.max_seq_length,
            "n_embd": config.d_model,
            "n_layer": config.n_layers,
            "n_head": config.n_head,
            "n_inner": config.d_hid,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": config.epsilon,
            **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout),
            **shared,
        }
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": config.d_model,
        "intermediate_size": config.d_hid,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_length,
        "rms_norm_eps": config.epsilon,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "attention_dropout": config.dropout,
        "use_sliding_window": False,
        "sliding_window": None,
        **shared,
    }
