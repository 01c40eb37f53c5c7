"""A GGUF file for llama.cpp: architectures gpt2 and qwen3, through the package gguf."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from chatgot.config.run import ModelConfig
from chatgot.data.byte_level import GPT2, byte_level_alphabet
from chatgot.data.tokenizer import BpeTokenizer, CharTokenizer, Tokenizer
from chatgot.errors import ConfigError
from chatgot.exchange.layout import gguf_parts
from chatgot.exchange.tokenizer import end_of_text
from chatgot.exchange.weights import Reader
from chatgot.export.weights import Weights, chunks

FILE = "model.gguf"
_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
NEVER = 0xFF
"""A byte that stands in no UTF-8 text. llama.cpp takes token 11 for the end of a text unless another one is named."""


def gguf_library() -> Any:
    """The package gguf. Raises ConfigError without it."""
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(f"--format gguf needs the package gguf ({error}); pip install gguf") from error
    return gguf


def write_gguf(
    path: Path, config: ModelConfig, tokenizer: Tokenizer, weights: Weights, dtype: torch.dtype, name: str
) -> None:
    """Write the file, tensor by tensor. Norms and biases are fp32, as llama.cpp wants them."""
    gguf = gguf_library()
    modern = config.architecture == "modern"
    writer = gguf.GGUFWriter(path, "qwen3" if modern else "gpt2")
    writer.add_name(name)
    writer.add_vocab_size(tokenizer.vocab_size)
    writer.add_context_length(config.max_seq_length)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.d_hid)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.kv_heads)
    if modern:
        writer.add_key_length(config.head_width)
        writer.add_value_length(config.head_width)
        writer.add_layer_norm_rms_eps(config.epsilon)
        writer.add_rope_freq_base(config.rope_theta)
        writer.add_rope_dimension_count(config.head_width)
    else:
        writer.add_layer_norm_eps(config.epsilon)
    mostly = gguf.LlamaFileType
    files = {torch.float32: mostly.ALL_F32, torch.bfloat16: mostly.MOSTLY_BF16, torch.float16: mostly.MOSTLY_F16}
    writer.add_file_type(files[dtype])
    _add_tokenizer(writer, gguf, tokenizer)
    parts = list(gguf_parts(config, tokenizer.vocab_size))
    types = [dtype if part.columns is not None else torch.float32 for part in parts]
    for part, kind in zip(parts, types):
        size = int(np.prod(part.shape)) * kind.itemsize
        raw = gguf.GGMLQuantizationType[_TYPES[kind]]
        writer.add_tensor_info(part.name, part.shape, np.dtype(np.float32), size, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for part, kind in zip(parts, types):
        raw = np.empty(int(np.prod(part.shape)) * kind.itemsize, dtype=np.uint8)  # one tensor, which the package wants
        at = 0
        for chunk in chunks(part, weights, kind):
            data = chunk.view(torch.uint8).numpy()
            raw[at : at + data.size] = data
            at += data.size
        writer.write_tensor_data(raw)
        del raw  # before the next one is made
    writer.close()


def reader(path: Path, config: ModelConfig, vocab_size: int) -> Reader:
    """The parameters in a file that `write_gguf` made; the file stays mapped."""
    gguf = gguf_library()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path, "c").tensors}
    types = {name: kind for kind, name in _TYPES.items()}

    def read(name: str) -> torch.Tensor:
        stored = tensors[name]  # numpy has no bfloat16, and the package's own conversion takes three times the memory
        return torch.from_numpy(stored.data).view(types[stored.tensor_type.name])

    return Reader(gguf_parts(config, vocab_size), read)


def _add_tokenizer(writer: Any, gguf: Any, tokenizer: Tokenizer) -> None:
    types = [gguf.TokenType.NORMAL] * tokenizer.vocab_size
    writer.add_add_bos_token(False)
    if isinstance(tokenizer, CharTokenizer):
        # RWKV's: the longest token that fits, and no token ends a text
        writer.add_token_types(types)
        writer.add_tokenizer_model("rwkv")
        writer.add_token_list([_escaped(character) for character in tokenizer.characters])
        return
    byte_of = byte_level_alphabet()
    spelled = {byte: character for character, byte in byte_of.items()}
    tokens, split = [f"[PAD{number}]" for number in range(tokenizer.vocab_size)], GPT2
    if isinstance(tokenizer, BpeTokenizer):
        model = tokenizer.definition["model"]
        vocabulary: dict[str, int] = model["vocab"]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        vocabulary, split = vocabulary | tokenizer.added, tokenizer.split
        types = [gguf.TokenType.UNUSED] * tokenizer.vocab_size
        for number in vocabulary.values():
            types[number] = gguf.TokenType.NORMAL
        for number in tokenizer.added.values():
            types[number] = gguf.TokenType.CONTROL
    else:
        vocabulary, merges = {spelled[byte]: byte for byte in range(256)}, []
    for token, number in vocabulary.items():
        tokens[number] = token
    writer.add_token_types(types)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_merges(merges or [f"{spelled[NEVER]} {spelled[NEVER]}"])  # an empty list is refused
    for add in (writer.add_bos_token_id, writer.add_eos_token_id):
        add(vocabulary[spelled[NEVER]] if (end := end_of_text(tokenizer)) is None else end)


def _escaped(character: str) -> str:
    """As llama.cpp spells a token of this kind."""
    known = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\\": "\\\\"}
    return known.get(character) or (character if character != "\0" else "\\x00")
