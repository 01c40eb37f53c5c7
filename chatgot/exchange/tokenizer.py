"""Our tokenizers as a file of the library `tokenizers`, which AutoTokenizer loads without code of ours; and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chatgot.config.run import RunConfig
from chatgot.data.byte_level import byte_level_alphabet
from chatgot.data.tokenizer import LARGEST, BpeTokenizer, ByteTokenizer, CharTokenizer, Tokenizer
from chatgot.errors import CheckpointError, DataError, quoted
from chatgot.exchange.folder import Folder, open_folder, read_json, run_config

FILE = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
"""The added token that ends a text in GPT-2 and Qwen3."""

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def library_definition(tokenizer: Tokenizer) -> dict[str, Any]:
    """The library's tokenizer.json. A character that the vocabulary lacks is an error there too."""
    if isinstance(tokenizer, BpeTokenizer):
        return tokenizer.definition
    if isinstance(tokenizer, CharTokenizer):
        vocabulary = {character: index for index, character in enumerate(tokenizer.characters)}
        split = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
        model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}  # which is no token: refused
        parts = {"pre_tokenizer": split, "decoder": {"type": "Fuse"}, "model": model}
    else:
        vocabulary = dict(sorted(byte_level_alphabet().items(), key=lambda one: one[1]))
        model = {"type": "BPE", "vocab": vocabulary, "merges": [], "unk_token": None}
        parts = {"pre_tokenizer": _BYTE_LEVEL, "decoder": _BYTE_LEVEL, "model": model}
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    return {"version": "1.0", **empty, "added_tokens": [], **parts}


def end_of_text(tokenizer: Tokenizer) -> int | None:
    """The id of END_OF_TEXT, which only a tokenizer of a folder can have."""
    return tokenizer.added.get(END_OF_TEXT) if isinstance(tokenizer, BpeTokenizer) else None


def tokenizer_config(tokenizer: Tokenizer, max_seq_length: int) -> dict[str, Any]:
    """tokenizer_config.json: nothing is added to a text, and nothing is taken from it."""
    end = {} if end_of_text(tokenizer) is None else {"eos_token": END_OF_TEXT}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_seq_length,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        **end,
    }


def read_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a folder in transformers' layout: byte-level BPE, or one that `chatgot export` wrote.

    Args:
        vocab_size: of the model. A larger one than the tokenizer's is padded, as Qwen's are.

    Raises:
        CheckpointError: there is none, or it is of another kind.
        ConfigError: the library `tokenizers` is missing.
    """
    path = folder / FILE
    how = f"AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) of transformers writes {FILE}"
    definition = read_json(path, LARGEST, f"the tokenizer belongs to the model, and {how}")
    model = definition.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(vocabulary, dict):
        raise CheckpointError(f"{path}: has no vocabulary")
    try:
        tokenizer = _ours(definition, model, vocabulary) or BpeTokenizer(definition, vocab_size)
    except DataError as error:
        taken = "byte-level BPE is taken, as GPT-2 and Qwen3 have it, and what chatgot export writes"
        raise CheckpointError(f"{path}: {error}; {taken}") from error
    if tokenizer.vocab_size != vocab_size:
        sizes = f"the tokenizer's {tokenizer.vocab_size} tokens are not the model's {vocab_size}"
        raise CheckpointError(f"{path}: {sizes}")
    return tokenizer


def config_and_tokenizer(path: Path, config: str, overrides: Mapping[str, Any]) -> tuple[RunConfig, Tokenizer, Folder]:
    """What a run that starts from a folder has of it. Raises what `open_folder`, `run_config` and `read_tokenizer` do.

    Args:
        config: the run YAML or preset, whose model section is left out.
        overrides: of the YAML.
    """
    folder = open_folder(path)
    settings = run_config(config, overrides, folder.model.model_dump(), folder.path)
    return settings, read_tokenizer(folder.path, folder.vocab_size), folder


def _ours(definition: dict[str, Any], model: dict[str, Any], vocabulary: dict[str, Any]) -> Tokenizer | None:
    """The byte or char tokenizer that `library_definition` makes this of."""
    if model.get("type") == "WordLevel":
        if not all(type(number) is int for number in vocabulary.values()):
            raise DataError(f"vocabulary: {quoted(vocabulary)}: must have whole numbers")
        guess: Tokenizer = CharTokenizer(sorted(vocabulary, key=vocabulary.__getitem__))
    elif len(vocabulary) == 256 and not model.get("merges"):
        guess = ByteTokenizer()
    else:
        return None
    same = library_definition(guess)
    parts = ("pre_tokenizer", "normalizer", "added_tokens")
    if vocabulary != same["model"]["vocab"] or any(
        (definition.get(key) or None) != (same[key] or None) for key in parts
    ):
        if isinstance(guess, CharTokenizer):
            raise DataError("a vocabulary of words that chatgot export did not write")
        return None
    return guess
