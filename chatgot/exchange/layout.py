"""The names and shapes of our parameters, and of the keys of our model, in transformers' GPT-2 and Qwen3, and in
llama.cpp. Tables, no torch.
"""

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


KEYS: dict[str, dict[str, str]] = {
    "gpt2": {
        "max_seq_length": "n_positions",
        "d_model": "n_embd",
        "n_layers": "n_layer",
        "n_head": "n_head",
        "d_hid": "n_inner",
        "epsilon": "layer_norm_epsilon",
    },
    "modern": {
        "max_seq_length": "max_position_embeddings",
        "d_model": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "head_width": "head_dim",
        "d_hid": "intermediate_size",
        "epsilon": "rms_norm_eps",
    },
}
"""ModelConfig's name of a value -> the key of config.json, by architecture."""
SHARED_KEYS = {"tie_embeddings": "tie_word_embeddings", "init_std": "initializer_range"}
DROPOUTS = {"gpt2": ("attn_pdrop", "embd_pdrop", "resid_pdrop"), "modern": ("attention_dropout",)}
CLASSES = {"gpt2": ("GPT2LMHeadModel", "gpt2"), "modern": ("Qwen3ForCausalLM", "qwen3")}
"""Architecture -> the class, and model_type."""
FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False,),
        "add_cross_attention": (False,),
    },
    "modern": {"hidden_act": ("silu",), "attention_bias": (False,), "use_sliding_window": (False,)},
}
"""Keys for which our model knows these values only. The first is written; a file that lacks the key means it."""


def transformers_config(config: ModelConfig, vocab_size: int, dtype: str) -> dict[str, Any]:
    """config.json; `dtype` as torch names it: float32."""
    architecture = config.architecture
    class_name, model_type = CLASSES[architecture]
    names = KEYS[architecture] | SHARED_KEYS
    tree: dict[str, Any] = {
        "architectures": [class_name],
        "model_type": model_type,
        "dtype": dtype,
        "torch_dtype": dtype,  # the name that transformers 4 reads
        "vocab_size": vocab_size,
        **{theirs: getattr(config, ours) for ours, theirs in names.items()},
        **dict.fromkeys(DROPOUTS[architecture], config.dropout),
        **{key: values[0] for key, values in FIXED[architecture].items()},
        "bos_token_id": None,
        "eos_token_id": None,
        "use_cache": True,
    }
    if architecture == "modern":
        rope = {"rope_type": "default", "rope_theta": config.rope_theta}
        tree |= {"rope_theta": config.rope_theta, "rope_parameters": rope, "sliding_window": None}
    return tree
