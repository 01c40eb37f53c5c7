"""A text as a stream of pieces in bounded memory: decoded, with exact byte offsets for what cannot be, and cut into
training, validation and test, which are contiguous parts in reading order, before any windowing; which file begins at
which byte of them, and in which line; and an estimate of how much of it stands there twice.
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

import numpy as np

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

PASSAGE_BYTES = 256
MAX_SAMPLES = 1 << 15
_FIRST_RATE = 16
"""At first one byte position in 16 is sampled."""
_BATCH_BYTES = 1 << 19
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
# all odd
_WEIGHTS = np.array([pow(int(_MULTIPLIER), 2 * j + 3, 1 << 64) for j in range(PASSAGE_BYTES // 8)], dtype=np.uint64)


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


class RepeatDetector:
    """Estimates how much of a text stands in it twice, in one pass and bounded memory: feed it the UTF-8 bytes of each
    split in order, then ask for shares.

    Passages are recognised by content: wherever the hash of 8 consecutive bytes falls under a threshold, the 256 bytes
    from there are hashed and counted. The same passage gives the same samples wherever it stands, so copies are found
    at any distance and any alignment. The threshold falls as distinct samples accumulate (adaptive sampling of distinct
    values), which keeps at most MAX_SAMPLES of them.
    """

    def __init__(self, max_samples: int = MAX_SAMPLES) -> None:
        self._max_samples = max_samples
        self._threshold = np.uint64((1 << 64) // _FIRST_RATE)
        self._split = ""
        self._pending = bytearray()
        # (5, n) uint64, one column a sample: passage hash, anchor hash, and how many in train, val and the rest
        self._known = np.empty((5, 0), np.uint64)
        self._new: list[np.ndarray] = []  # not yet merged

    def feed(self, chunk: bytes, split: str) -> None:
        """Take the next bytes, of any number, of the split 'train', 'val' or another."""
        if split != self._split:
            self._take_pending()
            self._split, self._pending = split, bytearray()
        self._pending += chunk
        if len(self._pending) >= _BATCH_BYTES:
            self._take_pending()

    def repeated_share(self) -> float:
        """Share of the text that repeats an earlier passage, 0 to 1."""
        self._finish()
        passages = int(self._known[2:].sum())
        return 1.0 - self._known.shape[1] / passages if passages else 0.0

    def val_in_train_share(self) -> float:
        """Share of the validation text that also stands in the training text, 0 to 1."""
        self._finish()
        train, val = self._known[2], self._known[3]
        return int(val[train > 0].sum()) / int(val.sum()) if val.any() else 0.0

    def _take_pending(self) -> None:
        data = bytes(self._pending)
        starts = len(data) - PASSAGE_BYTES + 1  # positions with a whole passage behind them
        if starts <= 0:
            return
        column = {"train": 2, "val": 3}.get(self._split, 4)
        for offset in range(min(8, starts)):
            words = np.frombuffer(data, dtype="<u8", count=(len(data) - offset) // 8, offset=offset)
            anchors = words[: (starts - offset + 7) // 8] * _MULTIPLIER
            at = np.flatnonzero(anchors < self._threshold)
            samples = np.zeros((5, len(at)), np.uint64)
            for j, weight in enumerate(_WEIGHTS):
                word = words[at + j]
                samples[0] += (word ^ (word >> np.uint64(29))) * weight
            samples[1] = anchors[at]
            samples[column] = 1
            self._new.append(samples)
        if sum(samples.shape[1] for samples in self._new) > self._max_samples:
            self._merge()
        del self._pending[:starts]

    def _finish(self) -> None:
        self._take_pending()
        self._merge()

    def _merge(self) -> None:
        samples = np.concatenate([self._known, *self._new], axis=1)
        self._new = []
        while True:
            _, first, which = np.unique(samples[0], return_index=True, return_inverse=True)
            merged = samples[:, first]
            for column in (2, 3, 4):
                merged[column] = np.bincount(which.reshape(-1), samples[column], len(first)).astype(np.uint64)
            if len(first) <= self._max_samples:
                break
            self._threshold //= np.uint64(2)
            samples = merged[:, merged[1] < self._threshold]
        self._known = merged
