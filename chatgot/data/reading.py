"""Text files as a stream of decoded pieces in bounded memory, with exact byte offsets for what cannot be decoded."""

from __future__ import annotations

import codecs
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from chatgot.errors import ConfigError, DataError

CHUNK_BYTES = 1 << 20


class TextReader:
    """Iterating yields the text of one file: BOM stripped, CRLF turned into LF, everything else as it is.

    After the iteration `bytes`, `sha256` (of the file as it lies on disk), `had_bom`, `crlf` and `nul` (how many) are
    set.
    """

    def __init__(self, path: Path, encoding: str = "utf-8", chunk_bytes: int = CHUNK_BYTES) -> None:
        self.path = path
        self.encoding = check_encoding(encoding)
        self.bytes = 0
        self.sha256 = ""
        self.had_bom = False
        self.crlf = 0
        self.nul = 0
        self._chunk_bytes = chunk_bytes

    def __iter__(self) -> Iterator[str]:
        """Raises DataError: not a regular file, unreadable, or not of the encoding (with the offset in the file)."""
        self.bytes, self.had_bom, self.crlf, self.nul = 0, False, 0, 0
        digest = hashlib.sha256()
        at_start, held = True, ""  # held: a carriage return whose line feed may open the next chunk
        for text in self._decoded(digest):
            if at_start and text:
                at_start = False
                if text[0] == "\ufeff":
                    self.had_bom = True
                    text = text[1:]
            text = held + text
            held = ""
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
                    digest.update(chunk)
                    held = len(decoder.getstate()[0])
                    try:
                        text = decoder.decode(chunk, final=not chunk)
                        text.encode("utf-8")  # some codecs let lone surrogates through
                    except UnicodeEncodeError as error:
                        raise DataError(
                            f"{self.path}: lone surrogate U+{ord(error.object[error.start]):04X} near byte "
                            f"{self.bytes}: not valid text"
                        ) from None
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
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0))
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise DataError(f"{path}: {describe_mode(mode)}, not a regular file; save the text in a file first")
    return os.fdopen(descriptor, "rb", buffering=0)


def describe_mode(mode: int) -> str:
    """'a FIFO', 'a character device', ..."""
    kinds = {
        stat.S_IFIFO: "a FIFO",
        stat.S_IFCHR: "a character device",
        stat.S_IFBLK: "a block device",
        stat.S_IFSOCK: "a socket",
        stat.S_IFDIR: "a folder",
        stat.S_IFREG: "a regular file",
    }
    return kinds.get(stat.S_IFMT(mode), "a special file")


def check_encoding(encoding: str) -> str:
    """The name of a text codec that can be read in pieces. Raises ConfigError otherwise."""
    try:
        codec = codecs.lookup(encoding)
    except LookupError:
        raise ConfigError(
            f"data.encoding = {encoding!r}: unknown encoding; allowed is what Python knows (utf-8, latin-1, cp1252, "
            f"utf-16, ...)"
        ) from None
    if not getattr(codec, "_is_text_encoding", True) or codec.incrementaldecoder is None:
        raise ConfigError(f"data.encoding = {encoding!r}: not an encoding of text")
    return "utf-8" if codec.name == "utf-8-sig" else codec.name
