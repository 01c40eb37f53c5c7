"""A text as a stream of pieces in bounded memory: decoded, with exact byte offsets for what cannot be, and cut into
training, validation and test, which are contiguous parts in reading order, before any windowing; and which file begins
at which byte of them, and in which line.
"""

from __future__ import annotations

import codecs
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal

from chatgot.config.run import DataConfig
from chatgot.errors import ConfigError, DataError

CHUNK_BYTES = 1 << 20

_NO_TEXT = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "a zip archive, as .docx and .epub are",
    b"PAR1\x15": "parquet",
    b"%PDF-": "PDF",
}
"""First bytes of files that a reader might be given as text."""

AUTO_TOLERANCE = 0.2
"""split_by: auto cuts at file boundaries if each held-out part is within this share of its wished size."""


class TextReader:
    """Iterating once yields the text of one file: BOM stripped, CRLF turned into LF, everything else as it is.

    After the iteration `bytes`, `sha256` (of the file as it lies on disk), `had_bom`, `crlf` and `nul` (how many) are
    set.
    """

    def __init__(self, path: Path, encoding: str = "utf-8", chunk_bytes: int = CHUNK_BYTES) -> None:
        self.path = path
        self.encoding = check_encoding(encoding)
        self.bytes = self.crlf = self.nul = 0
        self.sha256 = ""
        self.had_bom = False
        self._chunk_bytes = chunk_bytes

    def __iter__(self) -> Iterator[str]:
        """Raises DataError: not a regular file, unreadable, or not of the encoding (with the offset in the file)."""
        digest = hashlib.sha256()
        at_start, held = True, ""  # held: a carriage return whose line feed may open the next chunk
        for text in self._decoded(digest):
            if at_start and text:
                at_start = False
                self.had_bom = text[0] == "\ufeff"
                text = text.removeprefix("\ufeff")
            text, held = held + text, ""
            if "\r" in text:
                if text.endswith("\r"):
                    text, held = text[:-1], "\r"
                self.crlf += text.count("\r\n")
                text = text.replace("\r\n", "\n")
            self.nul += text.count("\0")
            if text:
                yield text
        if held:
            yield held
        self.sha256 = digest.hexdigest()

    def _decoded(self, digest: hashlib._Hash) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder(self.encoding)("strict")
        try:
            with open_regular(self.path) as file:
                while True:
                    chunk = file.read(self._chunk_bytes)
                    kinds = [] if self.bytes else [kind for first, kind in _NO_TEXT.items() if chunk.startswith(first)]
                    if kinds:
                        hint = "unpack it, or write its text into a file, and name that"
                        raise DataError(f"{self.path}: {kinds[0]} by its first bytes, not text; {hint}")
                    digest.update(chunk)
                    held = len(decoder.getstate()[0])
                    try:
                        text = decoder.decode(chunk, final=not chunk)
                        text.encode("utf-8")  # some codecs let lone surrogates through
                    except UnicodeEncodeError as error:
                        lone = f"lone surrogate U+{ord(error.object[error.start]):04X} near byte {self.bytes}"
                        raise DataError(f"{self.path}: {lone}: not valid text") from None
                    except UnicodeDecodeError as error:
                        raise DataError(self._describe(error, self.bytes - held + error.start)) from None
                    except UnicodeError as error:  # UTF-16 and UTF-32 without a byte order mark
                        raise DataError(f"{self.path}: not {self.encoding} near byte {self.bytes}: {error}") from None
                    self.bytes += len(chunk)
                    yield text
                    if not chunk:
                        return
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror or error}") from error

    def _describe(self, error: UnicodeDecodeError, offset: int) -> str:
        bad = error.object[error.start : error.start + 1]
        hint = "convert the file, or set data.encoding (latin-1, cp1252, utf-16, ...)"
        if offset == 0 and error.object[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            hint = "it begins like UTF-16: set data.encoding: utf-16"
        return f"{self.path}: not valid {self.encoding} at byte offset {offset} (0x{bad.hex()}, {error.reason}); {hint}"


def open_regular(path: Path):
    """Open a regular file for reading. Raises DataError, without waiting, for FIFOs, devices, sockets and folders."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(mode := os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DataError(not_regular(path, mode))
    return os.fdopen(descriptor, "rb", buffering=0)


def not_regular(what: object, mode: int) -> str:
    """Say which special file something is."""
    kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
    kinds |= {stat.S_IFCHR: "a character device", stat.S_IFBLK: "a block device"}
    kind = kinds.get(stat.S_IFMT(mode), "a special file")
    return f"{what}: {kind}, not a regular file; save the text in a file first"


def check_encoding(encoding: str) -> str:
    """The name of a text codec that can be read in pieces. Raises ConfigError otherwise."""
    try:
        codec = codecs.lookup(encoding)
    except (LookupError, ValueError):  # ValueError: a null character, a lone surrogate
        allowed = "allowed is what Python knows (utf-8, latin-1, cp1252, utf-16, ...)"
        raise ConfigError(f"data.encoding = {encoding!r}: unknown encoding; {allowed}") from None
    if not getattr(codec, "_is_text_encoding", True) or codec.incrementaldecoder is None:
        raise ConfigError(f"data.encoding = {encoding!r}: not an encoding of text")
    return "utf-8" if codec.name == "utf-8-sig" else codec.name


@dataclass(frozen=True)
class SplitPlan:
    """Character positions in the whole text: train [0, train_end), val [train_end, val_end), test [val_end, total)."""

    split_by: Literal["position", "file"]
    train_end: int
    val_end: int
    total: int

    @property
    def ends(self) -> list[tuple[str, int]]:
        """Name and end of every split that is not empty by intention, in order."""
        ends = [("train", self.train_end), ("val", self.val_end)]
        return ends if self.val_end == self.total else [*ends, ("test", self.total)]


def plan_split(file_characters: Sequence[int], config: DataConfig) -> SplitPlan:
    """Choose the cuts of a whole text, to which each file adds `file_characters`.

    Raises:
        ConfigError: nothing left for training, or split_by: file with too few files.
    """
    val, test = config.val_fraction, config.test_fraction
    if val + test >= 1.0:
        both = f"data.val_fraction = {val} and data.test_fraction = {test}"
        raise ConfigError(f"{both} leave nothing for training; their sum must be below 1")
    total = sum(file_characters)
    train_end, val_end = int(total * (1.0 - val - test)), int(total * (1.0 - test)) if test else total
    by_position = SplitPlan("position", train_end, val_end, total)
    held_out = 2 if test else 1
    if config.split_by == "file" and len(file_characters) <= held_out:
        got = f"got {len(file_characters)}; use position or auto"
        raise ConfigError(f"data.split_by: file needs at least {held_out + 1} text files, {got}")
    if config.split_by == "position" or len(file_characters) <= held_out:
        return by_position
    boundaries = list(accumulate(file_characters))[:-1]
    val_end = min(boundaries[1:], key=lambda b: abs(b - by_position.val_end)) if test else total
    train_end = min((b for b in boundaries if b < val_end), key=lambda b: abs(b - by_position.train_end), default=0)
    by_file = SplitPlan("file", train_end, val_end, total)
    wished, got = ((plan.val_end - plan.train_end, plan.total - plan.val_end) for plan in (by_position, by_file))
    close = all(abs(g - w) <= AUTO_TOLERANCE * w for w, g in zip(wished, got))
    return by_file if config.split_by == "file" or close else by_position


def split_pieces(pieces: Iterable[str], plan: SplitPlan) -> Iterator[tuple[str, str]]:
    """Cut a stream of text at the plan's positions: yields (split name, text). The last split takes the rest."""
    names, ends = zip(*plan.ends)
    current = position = 0
    for piece in pieces:
        while current + 1 < len(names) and position + len(piece) > ends[current]:
            head, piece = piece[: ends[current] - position], piece[ends[current] - position :]
            if head:
                yield names[current], head
            position = ends[current]
            current += 1
        if piece:
            yield names[current], piece
            position += len(piece)


@dataclass(frozen=True)
class Part:
    """What one file adds to one split. Its end is the beginning of the next part."""

    file: int
    """Index in the list of files."""
    begin: int
    """First byte, in the UTF-8 text of the split."""
    line: int
    """Line of the file, from 1, in which the part begins."""


def noting_parts(
    pieces: Iterable[tuple[str, str]], file_characters: Sequence[int], skipped: str, parts: dict[str, list[Part]]
) -> Iterator[tuple[str, str]]:
    """Pass on (split, text) without the characters of `skipped`, and fill `parts` on the way, by split.

    Args:
        pieces: the whole text; no piece is in two splits.
        file_characters: what each file adds to it.
    """
    without = str.maketrans("", "", skipped)
    lengths = iter(file_characters)
    file, left, line, size = -1, 0, 1, 0
    for name, piece in pieces:
        begins = name not in parts
        if begins:
            parts[name], size = [], 0
        while piece:
            while not left:
                file, left, line, begins = file + 1, next(lengths, len(piece)), 1, True  # longer: it changes
            text, piece = piece[:left], piece[left:]
            if begins:
                parts[name].append(Part(file, size, line))
                begins = False
            left -= len(text)
            line += text.count("\n")
            text = text.translate(without) if skipped else text
            size += len(text.encode("utf-8"))
            yield name, text


_ASCII = bytes(range(128))
_NOT_ASCII = bytes(range(128, 256))


class Characters:
    """The distinct characters of a text. Known ASCII is deleted from each piece in C first, which is fast."""

    def __init__(self) -> None:
        self._ascii = b""
        self._others: set[str] = set()

    def add(self, raw: bytes) -> None:
        """Note the characters of a piece, given as UTF-8."""
        self._ascii += bytes(set(raw.translate(None, self._ascii + _NOT_ASCII)))
        if not raw.isascii():
            self._others.update(raw.translate(None, _ASCII).decode("utf-8"))

    def sorted(self) -> list[str]:
        """All of them, by code point."""
        return sorted(self._others.union(self._ascii.decode("ascii")))
