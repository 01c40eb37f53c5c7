"""A prepared folder: tokens of each split as raw little-endian files, the tokenizer, and meta.json that proves both."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError

from chatgot.data.reading import Part
from chatgot.data.tokenizer import Tokenizer, load_tokenizer, read_own_json
from chatgot.errors import DataError, quoted
from chatgot.files import put_back, replace_folder, sha256

FORMAT = "chatgot-prepared"
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
"""Version 1 has no `parts`."""
META_FILE = "meta.json"
TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class FileMeta:
    """One text file as it lay on disk."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class SplitMeta:
    """One split. `characters` and `bytes` (UTF-8) are of the text that its tokens decode to, `sha256` of its file."""

    tokens: int
    characters: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class PreparedMeta:
    """The contents of meta.json."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # read strictly

    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    source: str
    files: tuple[FileMeta, ...]
    encoding: str
    tokenizer: str
    """char, byte or bpe."""
    tokenizer_sha256: str
    vocab_size: int
    dtype: str
    """uint8, uint16 or uint32, little-endian."""
    split_by: str
    """position or file: where the cuts really are."""
    train: SplitMeta
    val: SplitMeta
    test: SplitMeta | None
    skipped_characters: int
    """Characters left out because an existing vocabulary lacks them."""
    repeated_share: float
    """Estimated share of the text that repeats an earlier passage."""
    val_in_train_share: float
    """Estimated share of the validation text that also stands in the training text."""
    parts: dict[str, tuple[Part, ...]] | None = None
    """Where each file begins in each split. None: prepared by an earlier version, or line ends were left out."""

    @property
    def splits(self) -> dict[str, SplitMeta]:
        """By name, in reading order."""
        return {"train": self.train, "val": self.val} | ({"test": self.test} if self.test else {})


_META = TypeAdapter(PreparedMeta)


@dataclass(frozen=True)
class PreparedData:
    """An opened prepared folder. The token arrays are memory-mapped, read-only, of `tokenizer.dtype`."""

    path: Path
    tokenizer: Tokenizer
    meta: PreparedMeta
    train: np.ndarray
    val: np.ndarray
    test: np.ndarray | None

    @property
    def fingerprint(self) -> str:
        """sha256 over the vocabulary and all tokens: equal data, equal fingerprint, wherever the folder lies."""
        defines = {
            "format_version": 1,  # of the first runs' files: in a later format, the same tokens are the same data
            "tokenizer": self.meta.tokenizer_sha256,
            "dtype": self.meta.dtype,
            "splits": {name: [split.tokens, split.sha256] for name, split in self.meta.splits.items()},
        }
        return hashlib.sha256(json.dumps(defines, sort_keys=True).encode("ascii")).hexdigest()


def looks_prepared(folder: Path) -> bool:
    """Whether `prepare` wrote this folder, a damaged one included."""
    meta = folder / META_FILE
    if (folder / token_file("train")).is_file() and (meta.is_file() or (folder / TOKENIZER_FILE).is_file()):
        return True
    if not meta.is_file():
        return False
    try:
        with meta.open("rb") as file:
            return FORMAT.encode("ascii") in file.read(4096)
    except OSError as error:
        raise DataError(f"{meta}: cannot be read: {error.strerror or error}") from error


def token_file(split: str) -> str:
    """Name of a split's token file."""
    return f"{split}.bin"


def open_prepared(path: Path | str, verify: bool = True) -> PreparedData:
    """Open a prepared folder. Sizes and the vocabulary are always compared with its meta.json; `verify`: the sha256 of
    every token file, too (about 1 GB/s).

    Raises:
        DataError: not a prepared folder, written by another version, truncated or damaged.
        ConfigError: a bpe vocabulary without the library `tokenizers`.
    """
    path = Path(path)
    file = path / META_FILE
    if not file.is_file():
        what = f"not a prepared folder, {META_FILE} is missing" if path.is_dir() else "no such prepared folder"
        raise DataError(f"{path}: {what}; prepare the text again")
    tree = read_own_json(file, FORMAT, READABLE_VERSIONS, True, "; prepare the text again")
    try:
        meta = _META.validate_python(tree)
    except ValidationError as error:
        wrong = "; ".join(f"{quoted('.'.join(map(str, one['loc'])))}: {one['msg']}" for one in error.errors()[:5])
        raise DataError(f"{file}: {wrong}; the prepared folder is damaged, prepare the text again") from error
    again = f"prepare the text again (source: {quoted(meta.source)})"
    for name, parts in (meta.parts or {}).items():
        if name not in meta.splits or any(not 0 <= part.file < len(meta.files) for part in parts):
            raise DataError(f"{file}: parts.{name} names a file or a split that is not there; {again}")
    tokenizer = load_tokenizer(path / TOKENIZER_FILE, follow=True)
    if tokenizer.fingerprint != meta.tokenizer_sha256:
        raise DataError(
            f"{path / TOKENIZER_FILE}: sha256 of the vocabulary is {tokenizer.fingerprint}, meta.json says "
            f"{quoted(meta.tokenizer_sha256)}; {again}"
        )
    if tokenizer.vocab_size != meta.vocab_size or tokenizer.dtype.name != meta.dtype:
        raise DataError(
            f"{file}: vocab_size {quoted(meta.vocab_size)} and dtype {quoted(meta.dtype)} "
            f"do not belong to its tokenizer.json; {again}"
        )
    tokens = {
        name: _open_tokens(path / token_file(name), split, tokenizer.dtype, verify, again)
        for name, split in meta.splits.items()
    }
    return PreparedData(path, tokenizer, meta, tokens["train"], tokens["val"], tokens.get("test"))


def check_block_size(meta: PreparedMeta, max_seq_length: int) -> None:
    """Raise DataError, with both numbers, if a split is too short for one sample and its targets."""
    for name, split in meta.splits.items():
        if split.tokens < max_seq_length + 1:
            needed = f"one sample needs model.max_seq_length + 1 = {max_seq_length + 1}"
            hint = "use more text, a smaller max_seq_length"
            hint += "" if name == "train" else f", or a larger data.{name}_fraction"
            raise DataError(f"{meta.source}: the {name} split has {split.tokens} tokens, {needed}; {hint}")


def _open_tokens(file: Path, split: SplitMeta, dtype: np.dtype, verify: bool, again: str) -> np.ndarray:
    try:
        size = file.stat().st_size
        expected = split.tokens * dtype.itemsize
        if size != expected:
            raise DataError(f"{file}: {size} bytes, meta.json says {quoted(expected)}: truncated or damaged; {again}")
        if verify and (digest := sha256(file)) != split.sha256:
            raise DataError(f"{file}: sha256 is {digest}, meta.json says {quoted(split.sha256)}: damaged; {again}")
        return np.memmap(file, dtype=dtype, mode="r", shape=(split.tokens,))
    except FileNotFoundError:
        raise DataError(f"{file}: missing; {again}") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error


def publish(building: Path, out_dir: Path) -> None:
    """Put the finished folder in its place, after `take_back`."""
    replace_folder(building, out_dir, _replaced(out_dir))


def take_back(out_dir: Path) -> None:
    """After a kill: give an earlier folder that made way its name back, if the new one never got it; else delete it."""
    put_back(_replaced(out_dir), out_dir)
    if (old := _replaced(out_dir)).exists():
        shutil.rmtree(old)


def _replaced(out_dir: Path) -> Path:
    return out_dir.with_name(f".{out_dir.name}.replaced")
