"""Prepared texts by source and settings: the same text is tokenized once on a machine, whatever runs use it."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
from pathlib import Path

from chatgot.config.run import DataConfig
from chatgot.data.corpus import Source, resolve
from chatgot.data.prepare import Spec, prepare
from chatgot.data.prepared import FORMAT_VERSION, PreparedData, open_prepared
from chatgot.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


def prepare_cached(spec: Spec, config: DataConfig, cache_dir: Path | str | None = None) -> PreparedData:
    """The prepared form of `spec`: opened if it is a prepared folder, else taken from the cache, else prepared into the
    cache.

    The cache is `cache_dir`, or $CHATGOT_CACHE, or ~/.cache/chatgot, folder `prepared`; its key is made of path, size
    and modification time of every file and of the settings. Processes that want the same entry wait for the one that
    makes it; a damaged entry is made anew.

    Raises:
        DataError, ConfigError: as `prepare` and `open_prepared`.
    """
    source = resolve(spec)
    if source.kind == "prepared":
        assert source.path is not None
        data = open_prepared(source.path)
        logger.info(
            f"opened prepared folder {source.path}: source {data.meta.source}, {data.meta.tokenizer} vocabulary of "
            f"{data.meta.vocab_size}"
        )
        return data
    root = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    entry = root / "prepared" / cache_key(source, config)
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(entry.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise DataError(
            f"{entry.parent}: the cache cannot be written ({error.strerror}); set CHATGOT_CACHE to a folder that can"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released by the kernel when this process ends, however it ends
        for left_by_a_kill in entry.parent.glob(f".{entry.name}.tmp-*"):
            shutil.rmtree(left_by_a_kill)
        if entry.exists():
            try:
                data = open_prepared(entry)
                logger.info(f"{source.name}: prepared earlier, taken from {entry}")
                return data
            except DataError as error:
                logger.warning(f"the cached copy is damaged and is made anew: {error}")
                shutil.rmtree(entry)
        return prepare(spec, entry, config)
    except OSError as error:
        raise DataError(f"{entry}: the cache cannot be used: {error}; set CHATGOT_CACHE to another folder") from error
    finally:
        os.close(lock)


def default_cache_dir() -> Path:
    """$CHATGOT_CACHE, or ~/.cache/chatgot."""
    return Path(os.environ.get("CHATGOT_CACHE") or Path.home() / ".cache" / "chatgot")


def cache_key(source: Source, config: DataConfig) -> str:
    """32 hex digits that change with the files (path, size, modification time), the settings and the format."""
    settings = config.model_dump()
    del settings["unknown_characters"]  # a vocabulary made from the text lacks none
    if config.tokenizer == "bpe":
        try:
            settings["tokenizers"] = importlib.metadata.version("tokenizers")
        except importlib.metadata.PackageNotFoundError:
            raise ConfigError(
                "tokenizer: bpe needs the library tokenizers; pip install tokenizers, or use tokenizer: char or byte"
            ) from None
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
