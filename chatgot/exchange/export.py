"""`chatgot export`: a run folder's model for transformers or llama.cpp. Needs nothing but the run folder."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import chatgot.run_folder as run_folder
from chatgot.checkpoint.load import Found, find
from chatgot.checkpoint.manifest import model_of
from chatgot.checkpoint.portable import StoredTensor, read_portable
from chatgot.config.run import ModelConfig
from chatgot.data.tokenizer import Tokenizer, load_tokenizer
from chatgot.errors import CheckpointError, ConfigError
from chatgot.exchange import parity, weights
from chatgot.exchange.folder import CONFIG, open_folder
from chatgot.exchange.layout import transformers_config, transformers_parts
from chatgot.exchange.tokenizer import FILE, end_of_text, library_definition, tokenizer_config
from chatgot.exchange.weights import CHUNK, DTYPES, Read, Weights
from chatgot.files import write_atomically
from chatgot.model.shapes import count_parameters
from chatgot.observe.journal import read_journal
from chatgot.version import __version__

logger = logging.getLogger(__name__)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
LOADING = {
    "transformers": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
print(tokenizer.decode(model.generate(ids, max_new_tokens=200, do_sample=True, pad_token_id=0)[0]))
```""",
    "gguf": "    llama-cli -no-cnv -m model.gguf -p PROMPT",
}


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
        weights.gguf_library()
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
    stored = {name: parameter.weight for name, parameter in read_portable(found).parameters.items()}
    dtype = DTYPES[arguments.dtype]
    building = arguments.to.absolute().with_name(f".{arguments.to.absolute().name}.tmp-{os.getpid()}")
    try:
        building.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"--to {arguments.to}: cannot be made: {error.strerror}") from error
    try:
        if arguments.format == "gguf":
            path = building / weights.GGUF
            weights.write_gguf(path, config, tokenizer, stored, dtype, arguments.run.resolve().name)
            _check_weights(stored, weights.read_gguf(path, config, tokenizer.vocab_size), dtype, torch.float32)
        else:
            _write_transformers(building, config, tokenizer, stored, dtype)
            written = weights.read_folder(open_folder(building))
            _check_weights(stored, written, dtype, dtype)
            ours = parity.read_logits(config, tokenizer.vocab_size, written)
            run, data, length = arguments.run, found.manifest["data"], config.max_seq_length
            windows = parity.windows_of(run, data, tokenizer.vocab_size, length, arguments.data)
            for line in parity.prove(building, ours, tokenizer, windows, "the exported folder in transformers"):
                logger.info(line)
        write_atomically(building / "README.md", _model_card(arguments, found, config, tokenizer))
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
    folder: Path, config: ModelConfig, tokenizer: Tokenizer, stored: Weights, dtype: torch.dtype
) -> None:
    end = {"eos_token_id": end_of_text(tokenizer)}
    sampling = {"do_sample": True, "temperature": 0.8, "max_length": config.max_seq_length}
    files: dict[str, Any] = {
        CONFIG: transformers_config(config, tokenizer.vocab_size, str(dtype).removeprefix("torch.")) | end,
        "generation_config.json": sampling | {key: value for key, value in end.items() if value is not None},
        FILE: library_definition(tokenizer),
        "tokenizer_config.json": tokenizer_config(tokenizer, config.max_seq_length),
    }
    for name, tree in files.items():
        write_atomically(folder / name, json.dumps(tree, ensure_ascii=False, indent=1) + "\n")
    weights.write_safetensors(folder, list(transformers_parts(config, tokenizer.vocab_size)), stored, dtype)


def _check_weights(stored: Weights, written: Read, dtype: torch.dtype, of_vectors: torch.dtype) -> None:
    """Read the files back: our model computes with them what it computes with the rounded weights, to the bit.

    Args:
        dtype: of matrices in the files; `of_vectors`: of norms and biases.

    Raises:
        CheckpointError: naming the first parameter that is another one.
    """
    for name, parameter in stored.items():
        if not _same(parameter, written(name).reshape(-1), dtype if len(parameter.shape) == 2 else of_vectors):
            raise CheckpointError(f"{name}: what was written is not what the run has: nothing was exported")
    what = str(dtype).removeprefix("torch.")
    same = f"all {len(stored)} parameters are the run's in {what} to the bit, and so are our model's logits"
    logger.info(f"the exported files read back: {same}")


def _same(stored: StoredTensor, written: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether these elements, flattened, are the stored ones as the type has them."""
    chunks = zip(range(0, len(written), CHUNK), written.split(CHUNK))
    return len(written) == stored.shape.numel() and all(
        torch.equal(stored.read(at, len(chunk)).to(dtype).float(), chunk) for at, chunk in chunks
    )


def _model_card(arguments: ExportArguments, found: Found, config: ModelConfig, tokenizer: Tokenizer) -> str:
    """README.md: what is known; what an old or damaged run folder does not say is left out."""
    run, step = arguments.run, found.manifest["step"]
    facts: dict[str, Any] = {}
    try:
        facts = run_folder.read(run, run_folder.ENVIRONMENT)
    except ConfigError as error:
        logger.warning(f"the model card says less: {error}")
    data = facts.get("data") or {}
    latest: dict[str, Any] = {}
    if (run / run_folder.METRICS).is_file():
        for record in read_journal(run / run_folder.METRICS)[0]:
            if record.get("step", 0) <= step:
                latest |= {key: value for key, value in record.items() if value is not None}
    shape = f"{config.d_model} x {config.n_layers} x {config.n_head}, context {config.max_seq_length}"
    size = count_parameters(config, tokenizer.vocab_size)
    rows = {
        "started from": found.manifest.get("init_from"),
        "text": Path(str(data["spec"])).name if data.get("spec") else None,
        "architecture": f"{config.architecture}, {size:,} parameters (width x layers x heads {shape})",
        "tokenizer": f"{tokenizer.kind}, vocabulary of {tokenizer.vocab_size}",
        "weights": arguments.dtype,
        "optimizer steps": step,
        "tokens": latest.get("data/tokens"),
        "val/loss": latest.get("val/loss"),
        "bits per character": latest.get("val/bits_per_char"),
        "checkpoint": found.tag,
        "chatgot": __version__,
        **{name: facts.get(name) for name in ("torch", "deepspeed")},
    }
    table = "\n".join(f"| {name} | {_shown(value)} |" for name, value in rows.items() if value is not None)
    settings = "\n".join(f"    {key}: {value}" for key, value in config.model_dump().items())
    in_python = arguments.format == "transformers"
    load = LOADING[arguments.format].replace("PROMPT", repr(tokenizer.decode([0])) if in_python else '"..."')
    library = "library_name: transformers\n" if in_python else ""
    front = f"---\npipeline_tag: text-generation\n{library}tags: [chatgot]\n---\n\n"
    what = "A model trained from scratch with ChatGoT. It continues text; it was not taught to follow instructions."
    if origin := found.manifest.get("init_from"):
        what = f"The model of `{Path(origin).name}`, trained further with ChatGoT; that model's terms hold for it too."
    body = f"{what}\n\n| | |\n|---|---|\n{table}\n\n## Loading it\n\n{load}\n\n## Settings\n\n{settings}\n"
    return f"{front}# {run.resolve().name}\n\n{body}"


def _shown(value: Any) -> str:
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4f}"
    return f"{int(value):,}" if isinstance(value, (int, float)) else str(value)
