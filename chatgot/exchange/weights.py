"""Weights in other programs' layouts, tensor by tensor: safetensors and GGUF files read as parameters of our model, and
written from a mapped checkpoint. One tensor is in memory at most.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chatgot.checkpoint.portable import StoredTensor
from chatgot.config.run import ModelConfig
from chatgot.data.byte_level import GPT2, byte_level_alphabet
from chatgot.data.tokenizer import BpeTokenizer, CharTokenizer, Tokenizer
from chatgot.errors import CheckpointError, ConfigError
from chatgot.exchange.folder import INDEX, WEIGHTS, Folder, open_safetensors
from chatgot.exchange.layout import Part, gguf_parts
from chatgot.exchange.tokenizer import end_of_text
from chatgot.files import write_atomically
from chatgot.model.gpt import GPT

Weights = Mapping[str, StoredTensor]
Read = Callable[[str], torch.Tensor]
"""A tensor by its name."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""In both kinds of file."""
CHUNK = 1 << 20
"""Elements that are converted at a time."""
SHARD_BYTES = 5_000_000_000
GGUF = "model.gguf"
NEVER = 0xFF
"""A byte that stands in no UTF-8 text. llama.cpp takes token 11 for the end of a text unless another one is named."""


def _parameters(parts: Iterable[Part], read: Read) -> Read:
    """Parameters of our model, fp32, put together of the parts that a file has of them; mapped where `read` maps and a
    parameter stands in the file as it is here.
    """
    of: dict[str, list[Part]] = {}
    for part in parts:
        of.setdefault(part.ours, []).append(part)

    def parameter(name: str) -> torch.Tensor:
        pieces = [(part, read(part.name)) for part in of[name]]
        turned = [tensor.T if part.transposed else tensor for part, tensor in pieces]
        if len(turned) == 1 and turned[0].dtype == torch.float32:
            return turned[0]
        whole = torch.empty(sum(map(len, turned)), *turned[0].shape[1:])
        for (part, _), tensor in zip(pieces, turned):
            whole[part.start : part.start + part.rows] = tensor
        return whole

    return parameter


def read_folder(folder: Folder) -> Read:
    """The parameters of our model in a folder in transformers' layout."""
    files: dict[Path, Any] = {}

    def read(name: str) -> torch.Tensor:
        path, stored = folder.tensors[name]
        if path not in files:
            files[path] = open_safetensors(path, "pt")
        return files[path].get_tensor(stored)

    return _parameters(folder.parts, read)


@torch.no_grad()
def fill(model: GPT, folder: Folder) -> None:
    """Copy every tensor of the folder into the model, whose context may be shorter.

    Raises:
        CheckpointError: a value is not finite, or a second copy of a tied tensor is another one.
    """
    read = read_folder(folder)
    for name, parameter in model.named_parameters():
        parameter.copy_(read(name)[: len(parameter)])  # positions beyond a shorter context are left out
        if not parameter.isfinite().all():
            raise CheckpointError(f"{folder.path}: {name} has values that are not finite")
    again = "lm_head.weight"
    if folder.model.tie_embeddings and again in folder.tensors:
        path, stored = folder.tensors[again]
        if not torch.equal(open_safetensors(path, "pt").get_tensor(stored).float(), model.lm_head.weight.float()):
            raise CheckpointError(f"{path}: {again} is not the embedding, and tie_word_embeddings is true")


def chunks(part: Part, weights: Weights, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The elements of an exported tensor in order, flattened, about a million at a time.

    Raises:
        CheckpointError: one is not finite, or too large for the type.
    """
    width = part.columns or 1
    stored, start, numel = weights[part.ours], part.start * width, part.rows * width
    if part.transposed:
        whole = stored.read(start, numel).view(part.rows, width)
        step = max(1, CHUNK // part.rows)
        pieces = (whole[:, column : column + step].T for column in range(0, width, step))
    else:
        pieces = (stored.read(start + at, min(CHUNK, numel - at)) for at in range(0, numel, CHUNK))
    for piece in pieces:
        chunk = piece.to(dtype).reshape(-1)
        if not chunk.isfinite().all():
            kind = str(dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{part.ours}: has values that are not finite in {kind}; take another --tag or --dtype"
            )
        yield chunk


def write_safetensors(
    folder: Path, parts: Sequence[Part], weights: Weights, dtype: torch.dtype, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write model.safetensors, or shards and their index where it would be larger."""
    shards: list[list[Part]] = [[]]
    filled = total = 0
    for part in parts:
        size = prod(part.shape) * dtype.itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(part)
        filled, total = filled + size, total + size
    place = {}
    for number, shard in enumerate(shards, start=1):
        name = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / name, shard, weights, dtype)
        place |= {part.name: name for part in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": place}
        write_atomically(folder / INDEX, json.dumps(index, indent=1) + "\n")


def _write_shard(path: Path, parts: Sequence[Part], weights: Weights, dtype: torch.dtype) -> None:
    # The library's save_file wants all tensors at once; the format is a length, a JSON and the bytes.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for part in parts:
        start, end = end, end + prod(part.shape) * dtype.itemsize
        header[part.name] = {"dtype": _NAMES[dtype], "shape": list(part.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for part in parts:
            for chunk in chunks(part, weights, dtype):
                file.write(chunk.view(torch.uint8).numpy().data)


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
    """Write a file for llama.cpp, of its architecture gpt2 or qwen3. Norms and biases are fp32, as it wants them."""
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
    sizes = [prod(part.shape) * kind.itemsize for part, kind in zip(parts, types)]
    for part, kind, size in zip(parts, types, sizes):
        raw = gguf.GGMLQuantizationType[_NAMES[kind]]
        writer.add_tensor_info(part.name, part.shape, np.dtype(np.float32), size, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for part, kind, size in zip(parts, types, sizes):
        raw, at = np.empty(size, dtype=np.uint8), 0  # one tensor, which the package wants
        for chunk in chunks(part, weights, kind):
            data = chunk.view(torch.uint8).numpy()
            raw[at : at + data.size] = data
            at += data.size
        writer.write_tensor_data(raw)
        del raw  # before the next one is made
    writer.close()


def read_gguf(path: Path, config: ModelConfig, vocab_size: int) -> Read:
    """The parameters of our model in a file that `write_gguf` made; the file stays mapped."""
    gguf = gguf_library()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path, "c").tensors}
    types = {name: kind for kind, name in _NAMES.items()}

    def read(name: str) -> torch.Tensor:
        stored = tensors[name]  # numpy has no bfloat16, and the package's own conversion takes three times the memory
        return torch.from_numpy(stored.data).view(types[stored.tensor_type.name])

    return _parameters(gguf_parts(config, vocab_size), read)


def _add_tokenizer(writer: Any, gguf: Any, tokenizer: Tokenizer) -> None:
    types = [gguf.TokenType.NORMAL] * tokenizer.vocab_size
    writer.add_add_bos_token(False)
    if isinstance(tokenizer, CharTokenizer):
        # RWKV's: the longest token that fits, and no token ends a text
        spelling = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\\": "\\\\", "\0": "\\x00"}
        writer.add_token_types(types)
        writer.add_tokenizer_model("rwkv")
        writer.add_token_list([spelling.get(character, character) for character in tokenizer.characters])
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
        vocabulary, merges = byte_of, []
    for token, number in vocabulary.items():
        tokens[number] = token
    writer.add_token_types(types)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_merges(merges or [f"{spelled[NEVER]} {spelled[NEVER]}"])  # an empty list is refused
    for add in (writer.add_bos_token_id, writer.add_eos_token_id):
        add(vocabulary[spelled[NEVER]] if (end := end_of_text(tokenizer)) is None else end)
