"""Text from a run folder: `chatgot sample`. Needs nothing but the folder."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch

from chatgot import run_folder
from chatgot.checkpoint.load import find
from chatgot.checkpoint.reading import fp32_weights
from chatgot.config.run import ModelConfig
from chatgot.data.tokenizer import Tokenizer, load_tokenizer
from chatgot.deepspeed_json.fields import read_section
from chatgot.errors import CheckpointError, ConfigError
from chatgot.model.generate import generate
from chatgot.model.gpt import GPT


@dataclass(frozen=True)
class SampleArguments:
    """The command line of `chatgot sample`."""

    run: Path
    prompt: str = "\n"
    max_new_tokens: int = 256
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    num_samples: int = 1
    greedy: bool = False
    tag: str | None = None
    device: str = "auto"


def load_run(run: Path, tag: str | None = None, device: str = "auto") -> tuple[GPT, Tokenizer]:
    """The model (fp32, evaluation mode) and the tokenizer of a run folder, from its newest or the named checkpoint.

    Args:
        device: cpu, cuda, or auto: cuda where there is one.

    Raises:
        CheckpointError: not a run folder, no complete checkpoint in it, or files that cannot be read.
        ConfigError: cuda was asked for and is not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this machine has no CUDA device; use --device cpu")
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    os.environ.setdefault(
        "DS_ACCELERATOR", chosen
    )  # reading ZeRO's files imports DeepSpeed, which announces a device it finds by itself
    found = find(run / run_folder.CHECKPOINTS, tag)
    if found is None:
        raise CheckpointError(
            f"{run}: no complete checkpoint in {run / 'checkpoints'}; is it a run folder of train.py?"
        )
    for note in found.notes:
        print(f"WARNING: {note}", file=sys.stderr)
    tokenizer = load_tokenizer(run / run_folder.TOKENIZER)
    if tokenizer.fingerprint != found.manifest["tokenizer"]:
        raise CheckpointError(
            f"{run / 'tokenizer.json'} is not the tokenizer that {found.path} was trained with (fingerprints differ)"
        )
    fields = dict(found.manifest["model"])
    model = GPT(
        read_section(ModelConfig, {k: v for k, v in fields.items() if k != "vocab_size"}, str(found.path)),
        fields["vocab_size"],
    )
    try:
        model.load_state_dict(fp32_weights(found), strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{found.path}: the weights do not fit the model in its manifest: {error}") from error
    return model.to(chosen).eval(), tokenizer


def sample(arguments: SampleArguments, to: TextIO | None = None) -> list[str]:
    """Write continuations of the prompt to `to` (default: stdout) as they are drawn, and return them.

    Several samples are drawn as one batch: the first streams, the others follow when they are complete.

    Raises:
        ConfigError: a prompt with unseen characters, or a setting out of range.
        CheckpointError: see `load_run`.
    """
    out: TextIO = sys.stdout if to is None else to
    if arguments.num_samples < 1:
        raise ConfigError(f"--num_samples {arguments.num_samples}: must be >= 1")
    if not 0 <= arguments.seed < 2**63:
        raise ConfigError(f"--seed {arguments.seed}: must be >= 0 and below 2**63")
    model, tokenizer = load_run(arguments.run, arguments.tag, arguments.device)
    ids = tokenizer.encode_prompt(arguments.prompt)
    if len(ids) == 0:
        raise ConfigError("--prompt: is empty; give at least one character")
    device = next(model.parameters()).device
    input_ids = torch.from_numpy(ids.astype("int64"))[None].repeat(arguments.num_samples, 1).to(device)
    decoder = tokenizer.stream()
    before = arguments.prompt  # written with the first token, when every setting has been accepted

    def stream(row: int, token: int) -> None:
        nonlocal before
        if row == 0:
            out.write(before + decoder.push(token))
            out.flush()
            before = ""

    try:
        rows = generate(
            model,
            input_ids,
            arguments.max_new_tokens,
            temperature=0.0 if arguments.greedy else arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            seed=arguments.seed,
            on_token=stream,
        )
    except ValueError as error:
        raise ConfigError(f"chatgot sample: {error}") from error
    out.write(decoder.flush() + "\n")
    texts = [arguments.prompt + tokenizer.decode(row) for row in rows]
    for number, text in enumerate(texts[1:], start=2):
        out.write(f"\n--- sample {number}\n{text}\n")
    return texts
