"""Byte-level BPE of the library `tokenizers`: which definitions are taken, and how their tokens spell bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chatgot.errors import ConfigError, DataError, quoted

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {"qwen2": rf"{_WORDS}\p{{N}}{_REST}", "llama-bpe": rf"{_WORDS}\p{{N}}{{1,3}}{_REST}"}
"""llama.cpp's name -> the pattern that cuts a text before BPE; Qwen3 has Qwen2's. Others could cost any time, or join
what stands on the two sides of a line end, where `bpe_pieces` cuts.
"""
GPT2 = "gpt-2"
"""llama.cpp's name of GPT-2's own pattern, which the library's ByteLevel has built in."""

_PARTS: dict[str, tuple[str | None, ...]] = {
    "truncation": (None,),
    "padding": (None,),
    "normalizer": (None, "NFC"),
    "post_processor": (None, "ByteLevel"),
    "pre_tokenizer": ("ByteLevel", "Sequence"),
    "decoder": ("ByteLevel",),
    "model": ("BPE",),
}
"""Types of a definition's parts: those that `BpeTokenizer.train` makes, and GPT-2's and Qwen3's."""
_MODEL = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
_ADDED = ("lstrip", "rstrip", "single_word")


def check_definition(definition: dict[str, Any]) -> str:
    """Refuse what would lose text, draw tokens at random, or cost any time; returns the name of its way to cut a text.

    Raises:
        DataError: naming the part.
    """
    for key, allowed in _PARTS.items():
        part = definition.get(key)
        kind = part.get("type") if isinstance(part, dict) else part or None
        if kind not in allowed:
            names = " or ".join("empty" if one is None else one for one in allowed)
            raise DataError(f"bpe tokenizer: {key} = {quoted(part)}: must be {names}")
    added = definition.get("added_tokens") or ()
    if not all(isinstance(token, dict) and isinstance(token.get("content"), str) for token in added):
        raise DataError(f"bpe tokenizer: added_tokens = {quoted(added)}: must be a list of tokens")
    _must_be_off("model", definition["model"], _MODEL)
    for token in added:
        _must_be_off(f"added token {quoted(token['content'])}", token, _ADDED)
    return _split_of(definition["pre_tokenizer"])


def _must_be_off(name: str, part: dict[str, Any], keys: Sequence[str]) -> None:
    for key in keys:
        if part.get(key):
            raise DataError(f"bpe tokenizer: {name}: {key} = {quoted(part[key])}: must be off")


def _split_of(part: dict[str, Any]) -> str:
    name, last = None, part
    match part:
        case {"type": "ByteLevel"}:
            name = GPT2
        case {
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", **split},
                {"type": "ByteLevel", "use_regex": False} as last,
            ]
        } if not split.get("invert"):
            name = next((known for known, pattern in SPLITS.items() if pattern == regex), None)
    if name is None:
        why = "cuts a text in a way that is not known here; known are GPT-2's, Qwen's and Llama 3's"
        raise DataError(f"bpe tokenizer: pre_tokenizer = {quoted(part)}: {why}")
    _must_be_off("pre_tokenizer", last, ("add_prefix_space",))
    return name


def byte_level_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte (GPT-2's encoder.py, bytes_to_unicode)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


def tokenizers_library() -> Any:
    """The library `tokenizers`, imported where bpe needs it. Raises ConfigError without it."""
    try:
        import tokenizers
    except ImportError as error:
        instead = "pip install tokenizers, or use tokenizer: char or byte"
        raise ConfigError(f"tokenizer: bpe needs the library tokenizers ({error}); {instead}") from error
    return tokenizers
