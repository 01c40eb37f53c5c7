"""Text -> tokens on disk, in bounded memory: one pass to check and collect characters, one to encode."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from chatgot.config.run import DataConfig
from chatgot.data.corpus import FILE_END, Source, SourceFile, check_out_dir, resolve
from chatgot.data.prepared import (
    FORMAT,
    FORMAT_VERSION,
    SPLITS,
    TOKENIZER_FILE,
    FileMeta,
    PreparedData,
    PreparedMeta,
    SplitMeta,
    check_split_size,
    open_prepared,
    publish,
    token_file,
    write_meta,
)
from chatgot.data.reading import TextReader, check_encoding
from chatgot.data.repeats import RepeatDetector
from chatgot.data.split import SplitPlan, plan_split, split_pieces
from chatgot.data.tokenizer import BpeTokenizer, ByteTokenizer, CharTokenizer, Tokenizer, bpe_pieces, describe_unknown
from chatgot.errors import DataError

logger = logging.getLogger(__name__)

Spec = str | os.PathLike | Sequence[str | os.PathLike]

WARN_REPEATED_SHARE = 0.05
WARN_VAL_IN_TRAIN_SHARE = 0.05
_ASCII = bytes(range(128))
_NOT_ASCII = bytes(range(128, 256))


def prepare(
    spec: Spec,
    out_dir: Path | str,
    config: DataConfig,
    *,
    block_size: int | None = None,
    tokenizer: Tokenizer | None = None,
) -> PreparedData:
    """Prepare a text; the same text and settings give the same bytes, and a killed run leaves no half-written folder at
    `out_dir`.

    Args:
        spec: text file, folder of text files, built-in corpus name, or several of them.
        out_dir: folder to write. An earlier prepared folder there is replaced; anything else that is not empty is
            refused.
        config: tokenizer, split and encoding.
        block_size: refuse unless every split has block_size + 1 tokens.
        tokenizer: an existing vocabulary to use instead of making one; config.unknown_characters says what to do with
            characters it lacks.

    Raises:
        DataError: nothing to read, not text, too short, own output, or `out_dir` cannot be written.
        ConfigError: unknown encoding, impossible split, or bpe without the library `tokenizers`.
    """
    out_dir = Path(out_dir)
    source = resolve(spec)
    if source.kind == "prepared":
        raise DataError(
            f"--data {source.path}: already prepared; train on it as it is, or name the text that it was made from"
        )
    check_out_dir(out_dir, source)
    for note in source.notes:
        logger.info(note)
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.tmp-", dir=out_dir.parent))
    except OSError as error:
        raise DataError(f"{out_dir}: cannot be written: {error.strerror or error}") from error
    try:
        meta = _build(source, building, config, block_size, tokenizer)
        building.chmod(0o755)  # mkdtemp gives 0700
        publish(building, out_dir)
    except OSError as error:
        raise DataError(f"{out_dir}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    sizes = ", ".join(f"{name} {split.tokens:,}" for name in SPLITS if (split := meta.split(name)))
    logger.info(
        f"prepared {source.name}: {sizes} tokens, {meta.tokenizer} vocabulary of {meta.vocab_size}, split by "
        f"{meta.split_by} -> {out_dir}"
    )
    return open_prepared(out_dir, verify=False)


@dataclass(frozen=True)
class _Scan:
    """What the first pass found."""

    files: tuple[FileMeta, ...]
    file_characters: tuple[int, ...]
    characters: tuple[str, ...]


def _build(
    source: Source, folder: Path, config: DataConfig, block_size: int | None, given: Tokenizer | None
) -> PreparedMeta:
    encoding = check_encoding(config.encoding)
    scan = _scan(source, encoding)
    plan = plan_split(scan.file_characters, config)
    for (name, end), begin in zip(plan.ends, (0, plan.train_end, plan.val_end)):
        if end - begin < 2:
            raise DataError(
                f"{source.name}: {plan.total} characters are too few: the {name} split has {end - begin}, at least 2 "
                f"are needed"
            )
    pieces = _unchanged_text(source, encoding, scan)
    tokenizer = given or _make_tokenizer(scan, plan, config, source, encoding)
    unknown = tokenizer.unknown("".join(scan.characters)) if isinstance(tokenizer, CharTokenizer) else []
    if unknown and config.unknown_characters == "error":
        raise DataError(
            f"{source.name}: {describe_unknown(unknown, tokenizer)}; they stand {_count(source, encoding, unknown):,} "
            f"times in the text; "
            f"set data.unknown_characters: skip to leave them out, or make a new vocabulary"
        )
    repeats = RepeatDetector()
    splits, skipped = _encode(pieces, plan, tokenizer, unknown, repeats, folder)
    if skipped:
        logger.warning(f"left out {skipped:,} characters: {describe_unknown(unknown, tokenizer)}")
    for name, split in splits.items():
        check_split_size(source.name, name, split.tokens, block_size if block_size is not None else 1)
    repeated = round(repeats.repeated_share(), 4)
    leaked = round(repeats.val_in_train_share(), 4)
    _warn_of_repeats(scan, repeated, leaked)
    tokenizer.save(folder / TOKENIZER_FILE)
    meta = PreparedMeta(
        format=FORMAT,
        format_version=FORMAT_VERSION,
        source=source.name,
        files=scan.files,
        encoding=encoding,
        tokenizer=tokenizer.kind,
        tokenizer_sha256=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        dtype=tokenizer.dtype.name,
        split_by=plan.split_by,
        train=splits["train"],
        val=splits["val"],
        test=splits.get("test"),
        skipped_characters=skipped,
        repeated_share=repeated,
        val_in_train_share=leaked,
    )
    write_meta(meta, folder)
    return meta


def _scan(source: Source, encoding: str) -> _Scan:
    """First pass: is it text, how long is it, which characters."""
    files: list[FileMeta] = []
    lengths: list[int] = []
    seen = _Characters()
    boms, crlf_files, crlf, empty = 0, 0, 0, []
    for file in source.files:
        reader = TextReader(file.path, encoding)
        length = 0
        for text in reader:
            length += len(text)
            seen.add(text.encode("utf-8"))
        if length and _file_end(source):
            length += len(FILE_END)
            seen.add(FILE_END.encode("ascii"))
        files.append(FileMeta(file.name, reader.bytes, reader.sha256))
        lengths.append(length)
        boms += reader.had_bom
        crlf += reader.crlf
        crlf_files += reader.crlf > 0
        if not length:
            empty.append(file.name)
        if reader.nul:
            logger.warning(f"{file.path}: {reader.nul:,} NUL characters; is it really a text file?")
    if not sum(lengths):
        raise DataError(f"--data {source.path or source.name}: the text is empty")
    if boms:
        logger.info(f"byte order mark removed ({boms} file{'s' * (boms > 1)})")
    if crlf:
        logger.info(f"{crlf:,} Windows line ends (CRLF) read as LF ({crlf_files} file{'s' * (crlf_files > 1)})")
    if empty:
        logger.warning(
            f"{len(empty)} empty file{'s' * (len(empty) > 1)} left out: "
            f"{', '.join(empty[:5])}{', ...' * (len(empty) > 5)}"
        )
    return _Scan(tuple(files), tuple(lengths), seen.sorted())


class _Characters:
    """The distinct characters of a text. Known ASCII is deleted from each piece in C first, which is fast."""

    def __init__(self) -> None:
        self._ascii = b""
        self._others: set[str] = set()

    def add(self, raw: bytes) -> None:
        new = raw.translate(None, self._ascii + _NOT_ASCII)
        if new:
            self._ascii += bytes(set(new))
        if not raw.isascii():
            self._others.update(raw.translate(None, _ASCII).decode("utf-8"))

    def sorted(self) -> tuple[str, ...]:
        return tuple(sorted(self._others.union(self._ascii.decode("ascii"))))


def _text(source: Source, encoding: str) -> Iterator[str]:
    """The whole text in pieces: every file, and FILE_END after each where there are several."""
    for file in source.files:
        yield from _file_text(source, file, TextReader(file.path, encoding))


def _unchanged_text(source: Source, encoding: str, scan: _Scan) -> Iterator[str]:
    """Like `_text`; raises DataError if a file is not what the first pass saw."""
    for file, found in zip(source.files, scan.files):
        reader = TextReader(file.path, encoding)
        yield from _file_text(source, file, reader)
        if reader.sha256 != found.sha256:
            raise DataError(f"{file.path}: changed while it was being prepared; try again when nothing writes to it")


def _file_text(source: Source, file: SourceFile, reader: TextReader) -> Iterator[str]:
    empty = True
    for text in reader:
        empty = False
        yield text
    if not empty and _file_end(source):
        yield FILE_END


def _file_end(source: Source) -> bool:
    return len(source.files) > 1


def _make_tokenizer(scan: _Scan, plan: SplitPlan, config: DataConfig, source: Source, encoding: str) -> Tokenizer:
    if config.tokenizer == "char":
        return CharTokenizer(scan.characters)
    if config.tokenizer == "byte":
        return ByteTokenizer()
    train = (text for name, text in split_pieces(_text(source, encoding), plan) if name == "train")
    tokenizer = BpeTokenizer.train(bpe_pieces(train), config.bpe_vocab_size)
    if tokenizer.vocab_size < config.bpe_vocab_size:
        logger.info(
            f"bpe: the training text gave {tokenizer.vocab_size} tokens, data.bpe_vocab_size asked for "
            f"{config.bpe_vocab_size}"
        )
    return tokenizer


def _encode(
    pieces: Iterable[str],
    plan: SplitPlan,
    tokenizer: Tokenizer,
    unknown: Sequence[str],
    repeats: RepeatDetector,
    folder: Path,
) -> tuple[dict[str, SplitMeta], int]:
    """Second pass: write the token files. Returns each split's numbers, and how many characters were left out."""
    splits: dict[str, SplitMeta] = {}
    skipped = 0
    without_unknown = str.maketrans(dict.fromkeys(unknown))
    stream = split_pieces(pieces, plan)
    held = next(stream, None)
    for name, _ in plan.ends:

        def of_this_split(name: str = name) -> Iterator[str]:
            nonlocal held, skipped
            while held is not None and held[0] == name:
                text = held[1]
                if unknown:
                    kept = text.translate(without_unknown)
                    skipped += len(text) - len(kept)
                    text = kept
                if text:
                    yield text
                held = next(stream, None)

        tokens = characters = size = 0
        digest = hashlib.sha256()
        with (folder / token_file(name)).open("wb") as file:
            for text in bpe_pieces(of_this_split()) if tokenizer.kind == "bpe" else of_this_split():
                try:
                    ids = np.ascontiguousarray(tokenizer.encode(text))
                except DataError as error:  # the first pass has seen to it that every character is known
                    raise DataError(f"the text changed while it was being prepared: {error}") from error
                file.write(ids.data)
                digest.update(ids.data)
                raw = text.encode("utf-8")
                repeats.feed(raw, name)
                tokens += len(ids)
                characters += len(text)
                size += len(raw)
            file.flush()
            os.fsync(file.fileno())
        splits[name] = SplitMeta(tokens, characters, size, digest.hexdigest())
    return splits, skipped


def _count(source: Source, encoding: str, characters: Sequence[str]) -> int:
    without = str.maketrans(dict.fromkeys(characters))
    return sum(len(text) - len(text.translate(without)) for text in _text(source, encoding))


def _warn_of_repeats(scan: _Scan, repeated: float, leaked: float) -> None:
    first_with: dict[str, str] = {}
    for file in scan.files:
        twin = first_with.setdefault(file.sha256, file.name)
        if twin != file.name and file.bytes:
            logger.warning(f"{file.name} has the same content as {twin}")
    if repeated >= WARN_REPEATED_SHARE:
        logger.warning(
            f"about {repeated:.0%} of the text repeats an earlier passage word for word; is something in it twice?"
        )
    if leaked >= WARN_VAL_IN_TRAIN_SHARE:
        logger.warning(
            f"about {leaked:.0%} of the validation text also stands in the training text; val/loss will look "
            f"better than it is"
        )
