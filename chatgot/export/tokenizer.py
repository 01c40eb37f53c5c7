"""Our tokenizers as a file of the library `tokenizers`, which AutoTokenizer loads without code of ours."""

from __future__ import annotations

from typing import Any

from chatgot.data.tokenizer import BpeTokenizer, CharTokenizer, Tokenizer, byte_level_alphabet

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def library_definition(tokenizer: Tokenizer) -> dict[str, Any]:
    """The library's tokenizer.json. A character that the vocabulary lacks is an error there too."""
    if isinstance(tokenizer, BpeTokenizer):
        return tokenizer.definition
    if isinstance(tokenizer, CharTokenizer):
        vocabulary = {character: index for index, character in enumerate(tokenizer.characters)}
        split = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
        model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}  # which is no token: refused
        return _definition(split, {"type": "Fuse"}, model)
    spelled = {byte: character for character, byte in byte_level_alphabet().items()}
    vocabulary = {spelled[byte]: byte for byte in range(256)}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [], "unk_token": None}
    return _definition(_BYTE_LEVEL, _BYTE_LEVEL, model)


def _definition(pre_tokenizer: dict[str, Any], decoder: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    parts = {"pre_tokenizer": pre_tokenizer, "decoder": decoder, "model": model}
    return {"version": "1.0", **empty, "added_tokens": [], **parts}


def tokenizer_config(max_seq_length: int) -> dict[str, Any]:
    """tokenizer_config.json: nothing is added to a text, and nothing is taken from it."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_seq_length,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
