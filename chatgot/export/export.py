"""`chatgot export`: a run folder's model for transformers or llama.cpp. Needs nothing but the run folder."""

from __future__ import annotations

import ctypes
import json
import logging
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import chatgot.run_folder as run_folder
from chatgot.checkpoint.load import find
from chatgot.checkpoint.manifest import model_of
from chatgot.checkpoint.portable import StoredTensor, read_portable
from chatgot.config.run import ModelConfig
from chatgot.data.tokenizer import Tokenizer, load_tokenizer
from chatgot.errors import CheckpointError, ConfigError
from chatgot.exchange import parity
from chatgot.exchange.folder import CONFIG, open_folder
from chatgot.exchange.layout import transformers_config, transformers_parts
from chatgot.exchange.tokenizer import FILE, end_of_text, library_definition, tokenizer_config
from chatgot.exchange.weights import Reader, reader
from chatgot.export import gguf_file
from chatgot.export.card import model_card
from chatgot.export.weights import CHUNK, DTYPES, Weights, write_safetensors
from chatgot.files import write_atomically

logger = logging.getLogger(__name__)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


@dataclass(frozen=True)
class ExportArguments:
    """The command line of `chatgot export`."""

    run: Path
    to: Path
    format: str = "transformers"
    dtype: str = "fp32"
    tag: str | None = None
    data: str | None = None
    """The run's text, for the comparison; None: where the run had it."""


def export(arguments: ExportArguments) -> None:
    """Write the folder, prove that it computes what the run's model does, and only then give it its name.

    Raises:
        ConfigError: the folder exists, or a library that the format needs is missing.
        CheckpointError: no complete checkpoint, or what was written does not compute the same; no folder is left.
    """
    if arguments.to.exists():
        raise ConfigError(f"--to {arguments.to}: exists already; name a folder that does not")
    if arguments.format == "gguf":
        gguf_file.gguf_library()
    _give_tensors_back()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # see inference.sample
    where = arguments.run / run_folder.CHECKPOINTS
    found = find(where, arguments.tag)
    if found is None:
        raise CheckpointError(f"{arguments.run}: no complete checkpoint in {where}; is it a run folder of train.py?")
    for note in (*run_folder.linked_folders(arguments.run), *found.notes):
        logger.warning(note)
    tokenizer = load_tokenizer(arguments.run / run_folder.TOKENIZER)
    if tokenizer.fingerprint != found.manifest["tokenizer"]:
        raise CheckpointError(f"{arguments.run / run_folder.TOKENIZER} is not the tokenizer of {found.path}")
    config, _ = model_of(found.manifest)
    weights = {name: parameter.weight for name, parameter in read_portable(found).parameters.items()}
    building = arguments.to.absolute().with_name(f".{arguments.to.absolute().name}.tmp-{os.getpid()}")
    try:
        building.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"--to {arguments.to}: cannot be made: {error.strerror}") from error
    try:
        if arguments.format == "gguf":
            dtype = DTYPES[arguments.dtype]
            name = arguments.run.resolve().name
            gguf_file.write_gguf(building / gguf_file.FILE, config, tokenizer, weights, dtype, name)
        else:
            _write_transformers(building, arguments, config, tokenizer, weights)
        _prove(building, arguments, config, tokenizer, weights, found.manifest["data"])
        card = model_card(arguments.run, found, config, tokenizer, arguments.dtype, arguments.format)
        write_atomically(building / "README.md", card)
        os.rename(building, arguments.to)
    except OSError as error:
        raise CheckpointError(f"--to {arguments.to}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    logger.info(f"exported step {found.manifest['step']} of {arguments.run} to {arguments.to}")


def _give_tensors_back() -> None:
    """Let this process return a tensor's memory when it is freed: glibc keeps such blocks once it has seen one."""
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            libc.mallopt(option, 1 << 17)


def _write_transformers(
    folder: Path, arguments: ExportArguments, config: ModelConfig, tokenizer: Tokenizer, weights: Weights
) -> None:
    vocab_size, dtype = tokenizer.vocab_size, DTYPES[arguments.dtype]
    end = {"eos_token_id": end_of_text(tokenizer)}
    sampling = {"do_sample": True, "temperature": 0.8, "max_length": config.max_seq_length}
    files: dict[str, Any] = {
        CONFIG: transformers_config(config, vocab_size, str(dtype).removeprefix("torch.")) | end,
        "generation_config.json": sampling | {key: value for key, value in end.items() if value is not None},
        FILE: library_definition(tokenizer),
        "tokenizer_config.json": tokenizer_config(tokenizer, config.max_seq_length),
    }
    for name, tree in files.items():
        write_atomically(folder / name, json.dumps(tree, ensure_ascii=False, indent=1) + "\n")
    write_safetensors(folder, list(transformers_parts(config, vocab_size)), weights, dtype)


def _prove(
    folder: Path,
    arguments: ExportArguments,
    config: ModelConfig,
    tokenizer: Tokenizer,
    weights: Weights,
    fingerprint: str,
) -> None:
    """Hold the files against the run's weights, rounded to the exported type, and transformers' model against ours with
    these, both computed in fp32. See `export`.

    Args:
        fingerprint: of the run's data.
    """
    dtype, vocab_size = DTYPES[arguments.dtype], tokenizer.vocab_size
    if arguments.format == "gguf":
        _check_weights(weights, gguf_file.reader(folder / gguf_file.FILE, config, vocab_size), dtype, torch.float32)
        return
    _check_weights(weights, reader(open_folder(folder)), dtype, dtype)
    theirs = parity.transformers_logits(folder)
    windows, texts = parity.windows_of(arguments.run, fingerprint, tokenizer, config.max_seq_length, arguments.data)
    if theirs is None:
        logger.warning("transformers is not installed: its own model was not compared (pip install transformers)")
    else:

        def rounded(name: str) -> torch.Tensor:
            tensor = weights[name].whole()
            for chunk in tensor.view(-1).split(CHUNK):
                chunk.copy_(chunk.to(dtype))
            return tensor

        ours = parity.read_logits(config, vocab_size, rounded)
        logger.info(parity.compare(ours, theirs, windows).required("the exported folder in transformers"))
    logger.info(parity.check_tokenizer(folder, tokenizer, texts))


def _check_weights(weights: Weights, written: Reader, dtype: torch.dtype, of_vectors: torch.dtype) -> None:
    """Read the files back: our model computes with them what it computes with the rounded weights, to the bit.

    Args:
        dtype: of matrices in the files; `of_vectors`: of norms and biases.

    Raises:
        CheckpointError: naming the first parameter that is another one.
    """
    for name, stored in weights.items():
        kind = dtype if len(stored.shape) == 2 else of_vectors
        if not _same(stored, written(name).reshape(-1), kind):
            raise CheckpointError(f"{name}: what was written is not what the run has: nothing was exported")
    what = str(dtype).removeprefix("torch.")
    same = f"all {len(weights)} parameters are the run's in {what} to the bit, and so are our model's logits"
    logger.info(f"the exported files read back: {same}")


def _same(stored: StoredTensor, written: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether these elements, flattened, are the stored ones as the type has them."""
    if len(written) != math.prod(stored.shape):
        return False
    chunks = zip(range(0, len(written), CHUNK), written.split(CHUNK))
    return all(torch.equal(stored.read(at, len(chunk)).to(dtype).float(), chunk) for at, chunk in chunks)
