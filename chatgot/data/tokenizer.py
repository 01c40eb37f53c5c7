"""Text to token ids and back, without loss: characters, UTF-8 bytes, or byte-level BPE, all in `tokenizer.json`."""

from __future__ import annotations

import codecs
import hashlib
import json
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from chatgot.data.byte_level import byte_level_alphabet, check_definition, tokenizers_library
from chatgot.errors import ConfigError, DataError, quoted
from chatgot.files import write_atomically
from chatgot.run_folder import read_bytes

FORMAT = "chatgot-tokenizer"
FORMAT_VERSION = 1
_BPE_PIECE = 1 << 17  # characters; the library keeps some hundred bytes for each token of a piece
_BPE_CUT = re.compile(r"\S\n(?=\S)")  # GPT-2's pre-tokenisation never joins what stands on the two sides

LARGEST = 64 << 20
"""Bytes of a tokenizer.json or meta.json that are read."""

MAX_VOCAB_SIZE = 1 << 20
"""Larger ones are mistakes; the largest of published models have 262,144."""


class Tokenizer(ABC):
    """A fixed vocabulary. `decode(encode(text)) == text` for every text that it can encode."""

    kind: str
    vocab_size: int

    @property
    def dtype(self) -> np.dtype:
        """Type of stored tokens, little-endian: uint8 up to 256 entries, uint16 up to 65,536, else uint32."""
        return np.dtype("u1" if self.vocab_size <= 1 << 8 else "<u2" if self.vocab_size <= 1 << 16 else "<u4")

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the vocabulary; equal for equal vocabularies on every machine."""
        canonical = json.dumps(self._content(), sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Token ids (n,) of `self.dtype`. Raises DataError for characters that the vocabulary lacks."""

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes of one token; a multi-byte character may span several tokens."""

    def _content(self) -> dict[str, Any]:
        """What defines the vocabulary, JSON-ready."""
        return {"kind": self.kind, "vocab_size": self.vocab_size}

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of token ids; ValueError for one outside the vocabulary. Bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(i) for i in self._checked(ids).tolist()).decode("utf-8", errors="replace")

    def encode_prompt(self, text: str) -> np.ndarray:
        """Like `encode`, for a prompt: raises ConfigError naming each character that cannot be encoded."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ConfigError(f"prompt {text!a}: not valid text at character {error.start}: {error.reason}") from None
        return self.encode(text)

    def save(self, path: Path | str) -> None:
        """Write the complete tokenizer as human-readable JSON; what was there stays whole until then."""
        tree = {"format": FORMAT, "format_version": FORMAT_VERSION, **self._content()}
        write_atomically(Path(path), json.dumps(tree, ensure_ascii=False, indent=1) + "\n")

    def _checked(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        array = np.asarray(ids, dtype=np.int64).reshape(-1)
        if array.size and not 0 <= int(array.min()) <= int(array.max()) < self.vocab_size:
            raise ValueError(f"token ids {array.min()}..{array.max()} are outside the vocabulary of {self.vocab_size}")
        return array


class StreamDecoder:
    """Text of a token stream; a character is given out once its last byte has come."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Text that this token completes, often one character, possibly none."""
        return self._decoder.decode(self._tokenizer.token_bytes(int(token_id)))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character, else nothing."""
        return self._decoder.decode(b"", final=True)


class CharTokenizer(Tokenizer):
    """Every distinct character of the text, in code point order."""

    kind = "char"

    def __init__(self, characters: Iterable[str]) -> None:
        """Raises DataError unless `characters` are 1 to MAX_VOCAB_SIZE distinct single characters, by code point."""
        self.characters = tuple(characters)
        for c in self.characters:
            if not isinstance(c, str) or len(c) != 1 or 0xD800 <= ord(c) <= 0xDFFF:
                raise DataError(f"character vocabulary: {quoted(c)} is not a single character")
        if list(self.characters) != sorted(set(self.characters)):
            raise DataError("character vocabulary: the characters are not distinct and in code point order")
        if not 1 <= len(self.characters) <= MAX_VOCAB_SIZE:
            allowed = f"allowed 1 to {MAX_VOCAB_SIZE}; use tokenizer: byte or bpe"
            raise DataError(f"character vocabulary: {len(self.characters)} characters, {allowed}")
        self.vocab_size = len(self.characters)
        self._code_points = np.array([ord(c) for c in self.characters], dtype="<u4")
        # code point -> id; the last entry stands for everything beyond
        self._ids = np.full(int(self._code_points[-1]) + 2, self.vocab_size, dtype=np.uint32)
        self._ids[self._code_points] = np.arange(self.vocab_size, dtype=np.uint32)
        self._known_ascii = "".join(c for c in self.characters if c.isascii()).encode("ascii")
        # ASCII sorts first, so its ids fit a byte
        self._ascii_table = bytes(self._known_ascii.find(i) % 256 for i in range(256))

    def encode(self, text: str) -> np.ndarray:
        if text.isascii():
            raw = text.encode("ascii")
            if raw.translate(None, self._known_ascii):
                raise DataError(describe_unknown(self.unknown(text), self))
            ids = np.frombuffer(raw.translate(self._ascii_table), dtype=np.uint8)
            return ids.astype(self.dtype, copy=False)
        code_points = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")
        ids = self._ids[np.minimum(code_points, len(self._ids) - 1)]
        if int(ids.max()) == self.vocab_size:
            raise DataError(describe_unknown(self.unknown(text), self))
        return ids.astype(self.dtype)

    def encode_prompt(self, text: str) -> np.ndarray:
        if unknown := self.unknown(text):
            raise ConfigError(f"prompt: {describe_unknown(unknown, self)}")
        return self.encode(text)

    def unknown(self, text: str) -> list[str]:
        """Distinct characters of `text` that the vocabulary lacks, sorted."""
        return sorted(set(text).difference(self.characters))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._code_points[self._checked(ids)].tobytes().decode("utf-32-le")

    def token_bytes(self, token_id: int) -> bytes:
        return self.characters[token_id].encode("utf-8")

    def _content(self) -> dict[str, Any]:
        return {**super()._content(), "characters": list(self.characters)}


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8."""

    kind = "byte"
    vocab_size = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._checked(ids).astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes((token_id,))


class BpeTokenizer(Tokenizer):
    """Byte-level byte-pair encoding through the library `tokenizers`: trained here with GPT-2's pre-tokenisation, or
    brought by a folder of GPT-2's or Qwen3's kind. Its added tokens stand for their own text.
    """

    kind = "bpe"

    def __init__(self, definition: dict[str, Any], vocab_size: int | None = None) -> None:
        """Read a definition.

        Args:
            definition: the library's own JSON.
            vocab_size: of the model, where that has more rows than there are tokens; a token beyond them is no text.

        Raises:
            DataError: it is refused.
            ConfigError: the library is missing.
        """
        self.definition = definition
        self.split = check_definition(definition)
        self._composed = bool(definition.get("normalizer"))
        library = tokenizers_library()
        try:
            self._bpe = library.Tokenizer.from_str(json.dumps(definition))
        except Exception as error:  # the library raises a bare Exception for what it cannot read
            why = quoted(str(error))
            raise DataError(f"bpe tokenizer: the library tokenizers cannot read its definition: {why}") from error
        self.added = {one.content: number for number, one in self._bpe.get_added_tokens_decoder().items()}
        added = {number: text.encode() for text, number in self.added.items()}
        vocabulary: dict[str, int] = self._bpe.get_vocab(with_added_tokens=False)
        byte_of = byte_level_alphabet()
        ids = vocabulary.values() | added.keys()
        spelled = {token for token, number in vocabulary.items() if number not in added}
        known = set().union(*spelled) <= byte_of.keys() <= vocabulary.keys()
        self._padded_from = None if vocab_size in (None, len(ids)) else len(ids)
        self.vocab_size = len(ids) if vocab_size is None else vocab_size
        if len(set(vocabulary.values())) < len(vocabulary) or not known:
            raise DataError("bpe tokenizer: not a byte-level vocabulary")
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            raise DataError(f"bpe tokenizer: ids {min(ids)}..{max(ids)} do not fit a vocabulary of {self.vocab_size}")
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise DataError(f"bpe tokenizer: vocabulary of {self.vocab_size}, allowed up to {MAX_VOCAB_SIZE}")
        self._bytes = [b""] * self.vocab_size
        for token in spelled:
            self._bytes[vocabulary[token]] = bytes(byte_of[c] for c in token)
        for number, text in added.items():
            self._bytes[number] = text

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> BpeTokenizer:
        """Learn at most `vocab_size` tokens (256 bytes included); memory grows with the distinct words of `texts`."""
        library = tokenizers_library()
        bpe = library.Tokenizer(library.models.BPE())
        bpe.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        bpe.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=[],
            show_progress=False,
        )
        bpe.train_from_iterator(texts, trainer)
        return cls(json.loads(bpe.to_str()))

    def encode(self, text: str) -> np.ndarray:
        if self._composed and not unicodedata.is_normalized("NFC", text):
            how = "uconv -x any-nfc, or unicodedata.normalize in Python, converts it"
            raise DataError(f"the text is not in Unicode's form NFC, and this tokenizer would change it: {how}")
        return np.array(self._bpe.encode(text, add_special_tokens=False).ids, dtype=self.dtype)

    def encode_prompt(self, text: str) -> np.ndarray:
        return super().encode_prompt(unicodedata.normalize("NFC", text) if self._composed else text)

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes[token_id]

    def _content(self) -> dict[str, Any]:
        padded = {} if self._padded_from is None else {"padded_from": self._padded_from}
        return {**super()._content(), **padded, "tokenizers": self.definition}


def bpe_pieces(texts: Iterable[str]) -> Iterator[str]:
    """Cut a text anew at line ends, about _BPE_PIECE characters a piece, so that tokens hardly depend on the cuts."""
    held = ""
    for text in texts:
        held += text
        begin = 0
        while len(held) - begin > 2 * _BPE_PIECE:
            cut = _BPE_CUT.search(held, begin + _BPE_PIECE, begin + 2 * _BPE_PIECE)
            end = cut.end() if cut else begin + 2 * _BPE_PIECE
            yield held[begin:end]
            begin = end
        held = held[begin:]
    if held:
        yield held


def read_own_json(
    path: Path, format_name: str, versions: Sequence[int], follow: bool, hint: str = ""
) -> dict[str, Any]:
    """Read a JSON file that has `format` and `format_version`. Raises DataError, whose message ends with the hint.

    Args:
        follow: a symbolic link, see `run_folder.open_file`.
    """
    try:
        tree = json.loads(read_bytes(path, LARGEST, follow))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file{hint}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: {error}{hint}") from error
    if not isinstance(tree, dict) or tree.get("format") != format_name:
        raise DataError(f"{path}: not a file of the format {format_name}{hint}")
    if tree.get("format_version") not in versions:
        theirs, readable = quoted(tree.get("format_version")), " and ".join(map(str, versions))
        raise DataError(f"{path}: format_version {theirs}, this program reads {readable}{hint}")
    return tree


def load_tokenizer(path: Path | str, follow: bool = False) -> Tokenizer:
    """Read a tokenizer.json. Raises DataError for a missing or damaged one, ConfigError for bpe without its library.

    Args:
        follow: a symbolic link, see `run_folder.open_file`.
    """
    path = Path(path)
    tree = read_own_json(path, FORMAT, (FORMAT_VERSION,), follow)
    try:
        tokenizer = _from_content(tree)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    if tokenizer.vocab_size != tree.get("vocab_size"):
        claimed = quoted(tree.get("vocab_size"))
        raise DataError(f"{path}: vocab_size = {claimed}, but the vocabulary has {tokenizer.vocab_size} entries")
    return tokenizer


def _from_content(tree: dict[str, Any]) -> Tokenizer:
    kind = tree.get("kind")
    if kind == "char" and isinstance(tree.get("characters"), list):
        return CharTokenizer(tree["characters"])
    if kind == "byte":
        return ByteTokenizer()
    if kind == "bpe" and isinstance(tree.get("tokenizers"), dict):
        size = tree.get("vocab_size") if "padded_from" in tree else None
        return BpeTokenizer(tree["tokenizers"], size if isinstance(size, int) else None)
    expected = "char (with its list 'characters'), byte, or bpe (with its mapping 'tokenizers')"
    raise DataError(f"kind = {quoted(kind)}: expected {expected}")


def describe_unknown(characters: Sequence[str], tokenizer: Tokenizer) -> str:
    """'2 characters are not in the vocabulary of 76: 'ē' (U+0113), ...', at most ten of them by name."""
    named = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in characters[:10])
    more = f" and {len(characters) - 10} more" if len(characters) > 10 else ""
    noun = "character is" if len(characters) == 1 else "characters are"
    return f"{len(characters)} {noun} not in the vocabulary of {tokenizer.vocab_size}: {named}{more}"
