"""Folders as transformers itself writes them: random weights, a byte-level BPE of GPT-2's or Qwen3's kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from chatgot.data.byte_level import SPLITS

SPECIAL = {"gpt2": ["<|endoftext|>"], "qwen3": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]}
LENGTH = 64


def tokenizer(kind: str, text: str) -> Any:
    """As AutoTokenizer has it."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    made: Any = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "qwen3":
        made.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(SPLITS["qwen2"]), "isolated")
        parts: Any = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        made.pre_tokenizer = pre_tokenizers.Sequence(parts)
    made.decoder, made.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator([text], BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL[kind]])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=SPECIAL[kind][0])


def make(kind: str, folder: Path, text: str, std: float = 0.1, **changes: Any) -> Any:
    """Write a folder; returns what transformers reads of it. `changes`: of its config. Qwen3: bf16, shards, padded."""
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

    own = tokenizer(kind, text)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": len(own) + (29 if kind == "qwen3" else 0), "initializer_range": std}
    ends = {"bos_token_id": own.eos_token_id, "eos_token_id": own.eos_token_id}
    model: Any
    if kind == "gpt2":
        shape = {"n_positions": LENGTH, "n_embd": 48, "n_layer": 2, "n_head": 4, "layer_norm_epsilon": 1e-4}
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        model = GPT2LMHeadModel(GPT2Config(**{**sizes, **ends, **shape, **dropout, **changes}))
    else:
        shape = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        shape |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": LENGTH, "rms_norm_eps": 1e-5}
        rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}, "tie_word_embeddings": True}
        model = Qwen3ForCausalLM(Qwen3Config(**{**sizes, **ends, **shape, **rope, **changes}))
        model.to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="100KB" if kind == "qwen3" else "1GB")
    own.save_pretrained(folder)
    return type(model).from_pretrained(folder, dtype=torch.float32).eval()
