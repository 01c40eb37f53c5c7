"""Text -> tokens on disk, in bounded memory: one pass to check and collect characters, one to encode. The same text is
tokenized once on a machine, whatever runs use it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import chatgot.run_folder as run_folder
from chatgot.config.run import DataConfig, load_run_config
from chatgot.data.byte_level import tokenizers_library
from chatgot.data.corpus import Source, check_out_dir, resolve, scan
from chatgot.data.prepared import (
    FORMAT_VERSION,
    META_FILE,
    TOKENIZER_FILE,
    PreparedData,
    PreparedMeta,
    SplitMeta,
    check_block_size,
    open_prepared,
    publish,
    take_back,
    token_file,
)
from chatgot.data.reading import Part, RepeatDetector, check_encoding, noting_parts, plan_split, split_pieces
from chatgot.data.tokenizer import (
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    bpe_pieces,
    describe_unknown,
    load_tokenizer,
)
from chatgot.errors import ConfigError, DataError
from chatgot.files import take_lock, write_atomically

logger = logging.getLogger(__name__)

_SAY_SECONDS = 5.0
"""Between lines about the reading for bpe."""
Spec = str | os.PathLike | Sequence[str | os.PathLike]

WARN_SHARE = 0.05
"""Of the text, or of the validation text, that stands there twice."""


def prepare_cached(
    spec: Spec,
    config: DataConfig,
    cache_dir: Path | str | None = None,
    waiting: Callable[[], object] = lambda: None,
    tokenizer: Tokenizer | None = None,
) -> PreparedData:
    """The prepared form of `spec`: a prepared folder is opened, all else taken from or prepared into the cache.

    The cache is `cache_dir`, or $CHATGOT_CACHE, or ~/.cache/chatgot, folder `prepared`; its key is made of path, size
    and modification time of every file and of the settings. Processes that want the same entry wait for the one that
    makes it; a damaged entry is made anew.

    Args:
        waiting: called twice a second while another process makes it.
        tokenizer: the vocabulary to use; a prepared folder must have been made with it.

    Raises:
        DataError, ConfigError: as `prepare` and `open_prepared`.
    """
    source = resolve(spec)
    if source.kind == "prepared":
        assert source.path is not None
        data = open_prepared(source.path)
        what = f"source {data.meta.source}, {data.meta.tokenizer} vocabulary of {data.meta.vocab_size}"
        logger.info(f"opened prepared folder {source.path}: {what}")
        if tokenizer is not None and data.tokenizer.fingerprint != tokenizer.fingerprint:
            raise DataError(f"--data {spec}: was prepared with another vocabulary than the model's; name its text")
        return data
    cache = Path(cache_dir or os.environ.get("CHATGOT_CACHE") or os.path.expanduser("~/.cache/chatgot"))
    if cache.parts[:1] == ("~",):
        what = "HOME is not set, and this user has no home, where prepared texts are kept"
        raise DataError(f"--data {spec}: {what}; set CHATGOT_CACHE to a folder for them")
    if tokenizer is None and config.tokenizer == "given":
        where = "by train.py --init_from DIR, or by a run folder that was started so"
        raise ConfigError(f"data.tokenizer = given: the vocabulary is given {where}; else take char, byte or bpe")
    entry = cache / "prepared" / _cache_key(source, config, tokenizer)
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with entry.with_suffix(".lock").open("a") as lock:
            take_lock(lock, waiting, f"{source.name}: another process prepares it; waiting until it has done so")
            for left_by_a_kill in entry.parent.glob(f".{entry.name}.tmp-*"):
                shutil.rmtree(left_by_a_kill)
            take_back(entry)
            if entry.exists():
                try:
                    data = open_prepared(entry)
                    logger.info(f"{source.name}: prepared earlier, taken from {entry}")
                    return data
                except DataError as error:
                    logger.warning(f"the cached copy is damaged and is made anew: {error}")
                    shutil.rmtree(entry)
            data = prepare(spec, entry, config, tokenizer=tokenizer)
            if _cache_key(source, config, tokenizer) != entry.name:
                shutil.rmtree(entry)
                raise DataError(
                    f"{source.name}: changed while it was being prepared; try again when nothing writes to it"
                )
            return data
    except OSError as error:
        raise DataError(f"{entry}: the cache cannot be used: {error}; set CHATGOT_CACHE to another folder") from error


def _cache_key(source: Source, config: DataConfig, tokenizer: Tokenizer | None) -> str:
    """32 hex digits that change with the files (path, size, modification time), the settings and the format."""
    settings = config.model_dump()
    if tokenizer is not None:
        settings["given"] = tokenizer.fingerprint
    else:
        del settings["unknown_characters"]  # a vocabulary made from the text lacks none
    if config.tokenizer == "bpe":
        settings["tokenizers"] = tokenizers_library().__version__
    else:
        del settings["bpe_vocab_size"]
    files = []
    for file in source.files:
        try:
            status = file.path.stat()
        except OSError as error:
            raise DataError(f"{file.path}: cannot be read: {error.strerror or error}") from error
        files.append([str(file.path.resolve()), status.st_size, status.st_mtime_ns])
    key = json.dumps([FORMAT_VERSION, source.name, files, settings], sort_keys=True)
    return hashlib.sha256(key.encode()).hexdigest()[:32]


def recorded_data(run: Path, fingerprint: str, spec: str | None = None) -> tuple[str, PreparedData]:
    """Open the text that a run folder was trained on, from the cache or prepared again; returns what --data would call
    it, and the data.

    Args:
        fingerprint: of the data, as a checkpoint's manifest has it.
        spec: the text, as for --data; None: what environment.json says, here or where the run was started.

    Raises:
        DataError: it is not there any more, or gives other tokens.
        ConfigError: not a run folder.
    """
    if spec is None:
        environment = run_folder.read(run, run_folder.ENVIRONMENT)
        recorded = environment.get("data")
        spec = str(recorded.get("spec") if isinstance(recorded, dict) else None)
        elsewhere = Path(str(environment.get("cwd", ""))) / spec
        if not Path(spec).exists() and elsewhere.exists():
            spec = str(elsewhere)
    config = load_run_config(str(run / run_folder.RUN)).data
    given = load_tokenizer(run / run_folder.TOKENIZER) if config.tokenizer == "given" else None
    data = prepare_cached(spec, config, tokenizer=given)
    if data.fingerprint != fingerprint:
        prints = f"fingerprint {data.fingerprint[:12]}…, the checkpoint has {fingerprint[:12]}…"
        raise DataError(f"--data {spec}: is not the data that {run} was trained on ({prints})")
    return spec, data


def prepare(
    spec: Spec,
    out_dir: Path | str,
    config: DataConfig,
    *,
    block_size: int | None = None,
    tokenizer: Tokenizer | None = None,
) -> PreparedData:
    """Prepare a text: the same text and settings give the same bytes, and a kill leaves no half-written `out_dir`.

    Args:
        spec: text file, folder of text files, built-in corpus name, or several of them.
        out_dir: folder to write; an earlier prepared folder there is replaced, any other that is not empty is refused.
        block_size: refuse unless every split has block_size + 1 tokens.
        tokenizer: an existing vocabulary to use; config.unknown_characters says what to do with what it lacks.

    Raises:
        DataError: nothing to read, not text, too short, own output, or `out_dir` cannot be written.
        ConfigError: unknown encoding, impossible split, or bpe without the library `tokenizers`.
    """
    out_dir = Path(out_dir)
    source = resolve(spec)
    if source.kind == "prepared":
        instead = "train on it as it is, or name the text that it was made from"
        raise DataError(f"--data {source.path}: already prepared; {instead}")
    take_back(out_dir)
    check_out_dir(out_dir, source)
    for note in source.notes:
        logger.info(note)
    prefix = f".{out_dir.name}.tmp-"
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=prefix, dir=out_dir.parent, ignore_cleanup_errors=True) as building:
            meta = _build(source, Path(building), config, block_size, tokenizer)
            os.chmod(building, 0o755)  # a temporary folder has 0700
            publish(Path(building), out_dir)
    except OSError as error:
        raise DataError(f"{out_dir}: cannot be written: {error.strerror or error}") from error
    sizes = ", ".join(f"{name} {split.tokens:,}" for name, split in meta.splits.items())
    vocabulary = f"{meta.tokenizer} vocabulary of {meta.vocab_size}"
    logger.info(f"prepared {source.name}: {sizes} tokens, {vocabulary}, split by {meta.split_by} -> {out_dir}")
    return open_prepared(out_dir, verify=False)


def _build(
    source: Source, folder: Path, config: DataConfig, block_size: int | None, given: Tokenizer | None
) -> PreparedMeta:
    encoding = check_encoding(config.encoding)
    files, file_characters, characters = scan(source, encoding)
    plan = plan_split(file_characters, config)
    for (name, end), begin in zip(plan.ends, (0, plan.train_end, plan.val_end)):
        if end - begin < 2:
            what = f"the {name} split has {end - begin}, at least 2 are needed"
            raise DataError(f"{source.name}: {plan.total} characters are too few: {what}")
    if given is not None:
        tokenizer = given
    elif config.tokenizer == "char":
        tokenizer = CharTokenizer(characters)
    elif config.tokenizer == "byte":
        tokenizer = ByteTokenizer()
    else:
        pieces = split_pieces(source.text(encoding, files), plan)
        tokenizer = _train_bpe((text for name, text in pieces if name == "train"), config.bpe_vocab_size)
    if tokenizer.vocab_size == 1:
        logger.warning(f"{source.name}: one character, over and over: there is nothing to learn")
    unknown = tokenizer.unknown("".join(characters)) if isinstance(tokenizer, CharTokenizer) else []
    if unknown and config.unknown_characters == "error":
        times = sum(text.count(character) for text in source.text(encoding, files) for character in unknown)
        raise DataError(
            f"{source.name}: {describe_unknown(unknown, tokenizer)}; they stand {times:,} times in the text; set "
            f"data.unknown_characters: skip to leave them out, or make a new vocabulary"
        )
    repeats = RepeatDetector()
    parts: dict[str, list[Part]] = {}
    pieces = split_pieces(source.text(encoding, files), plan)
    splits = _encode(noting_parts(pieces, file_characters, "".join(unknown), parts), tokenizer, repeats, folder)
    skipped = plan.total - sum(split.characters for split in splits.values())
    if skipped:
        logger.warning(f"left out {skipped:,} characters: {describe_unknown(unknown, tokenizer)}")
    meta = PreparedMeta(
        source=source.name,
        files=files,
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
        repeated_share=round(repeats.repeated_share(), 4),
        val_in_train_share=round(repeats.val_in_train_share(), 4),
        parts=None if "\n" in unknown else {name: tuple(of_split) for name, of_split in parts.items()},
    )
    check_block_size(meta, 1 if block_size is None else block_size)
    _warn_of_repeats(meta)
    tokenizer.save(folder / TOKENIZER_FILE)
    write_atomically(folder / META_FILE, json.dumps(asdict(meta), ensure_ascii=False, indent=1) + "\n")
    return meta


def _noted(pieces: Iterable[str]) -> Iterator[str]:
    """Pass on what bpe reads, and say every few seconds how much that was."""
    size, said = 0, time.monotonic()
    for piece in pieces:
        yield piece
        size += len(piece)
        if time.monotonic() - said > _SAY_SECONDS:
            said = time.monotonic()
            logger.info(f"bpe: {size:,} characters read")
    logger.info(f"bpe: all {size:,} characters read; their pairs are merged")


def _train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    logger.info(f"bpe: learning {vocab_size} tokens from the training text")
    tokenizer = BpeTokenizer.train(_noted(bpe_pieces(texts)), vocab_size)
    logger.info(f"bpe: {tokenizer.vocab_size} tokens are learned; the text is encoded with them")
    if (got := tokenizer.vocab_size) < vocab_size:
        logger.info(f"bpe: the training text gave {got} tokens, data.bpe_vocab_size asked for {vocab_size}")
    return tokenizer


def _encode(
    text: Iterable[tuple[str, str]], tokenizer: Tokenizer, repeats: RepeatDetector, folder: Path
) -> dict[str, SplitMeta]:
    """Second pass, over (split, text): write the token files; returns each split's numbers."""
    splits: dict[str, SplitMeta] = {}
    for name, parts in groupby(text, key=itemgetter(0)):
        pieces = (piece for _, piece in parts if piece)
        tokens = characters = size = 0
        digest = hashlib.sha256()
        with (folder / token_file(name)).open("wb") as file:
            for piece in bpe_pieces(pieces) if tokenizer.kind == "bpe" else pieces:
                try:
                    ids = tokenizer.encode(piece)
                except DataError as error:
                    if tokenizer.kind == "bpe":
                        raise
                    # the first pass has seen to it that every character is known
                    raise DataError(f"the text changed while it was being prepared: {error}") from error
                raw = piece.encode("utf-8")
                file.write(ids.data)
                digest.update(ids.data)
                repeats.feed(raw, name)
                tokens += len(ids)
                characters += len(piece)
                size += len(raw)
            file.flush()
            os.fsync(file.fileno())
        splits[name] = SplitMeta(tokens, characters, size, digest.hexdigest())
    return splits


def _warn_of_repeats(meta: PreparedMeta) -> None:
    first_with: dict[str, str] = {}
    for file in meta.files:
        twin = first_with.setdefault(file.sha256, file.name)
        if twin != file.name and file.bytes:
            logger.warning(f"{file.name} has the same content as {twin}")
    if meta.repeated_share >= WARN_SHARE:
        share = f"about {meta.repeated_share:.0%} of the text"
        logger.warning(f"{share} repeats an earlier passage word for word; is something in it twice?")
    if meta.val_in_train_share >= WARN_SHARE:
        share = f"about {meta.val_in_train_share:.0%} of the validation text"
        logger.warning(f"{share} also stands in the training text; val/loss will look better than it is")
