"""Text from a run folder: `chatgot sample`. Needs nothing but the folder."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TextIO

import torch

import chatgot.run_folder as run_folder
from chatgot.checkpoint.load import MEANWHILE, Found, find
from chatgot.checkpoint.manifest import model_of
from chatgot.checkpoint.portable import fp32_weights
from chatgot.config.run import load_run_config
from chatgot.data.tokenizer import StreamDecoder, Tokenizer, load_tokenizer
from chatgot.errors import CheckpointError, ConfigError, NumericsError
from chatgot.inference.copied import listed, marked, training_text
from chatgot.model.generate import generate
from chatgot.model.gpt import GPT


@dataclass(frozen=True)
class SampleArguments:
    """The command line of `chatgot sample`."""

    run: Path
    prompt: str | None = None
    """None: the run's first sample prompt."""
    max_new_tokens: int = 256
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    num_samples: int = 1
    greedy: bool = False
    tag: str | None = None
    device: str = "auto"
    mark_copied: int | None = None
    """Mark passages of at least so many characters that stand in the training text; None: don't look for them."""
    data: str | None = None
    """The training text, as for --data of train.py; None: where the run had it."""


class LoadedModel(NamedTuple):
    """A model (fp32, evaluation mode), its tokenizer, and the checkpoint that it was read from."""

    gpt: GPT
    tokenizer: Tokenizer
    checkpoint: Found

    def continuations(
        self,
        prompt: str,
        max_new_tokens: int = 256,
        *,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        num_samples: int = 1,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[str]:
        """Draw `num_samples` continuations as one batch; returns the prompt with each. Temperature 0 is greedy;
        `on_token` is called with (sample, token) as tokens are drawn.

        Raises:
            ConfigError: a prompt with unseen characters, or a setting out of range.
        """
        if num_samples < 1:
            raise ConfigError(f"--num_samples {num_samples}: must be >= 1")
        if not 0 <= seed < 2**63:
            raise ConfigError(f"--seed {seed}: must be >= 0 and below 2**63")
        ids = self.tokenizer.encode_prompt(prompt)
        if len(ids) == 0:
            raise ConfigError("--prompt: is empty; give at least one character")
        device = next(self.gpt.parameters()).device
        input_ids = torch.from_numpy(ids.astype("int64"))[None].repeat(num_samples, 1).to(device)
        try:
            rows = generate(
                self.gpt,
                input_ids,
                max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                on_token=on_token,
            )
        except ValueError as error:
            raise ConfigError(f"chatgot sample: {error}") from error
        return [prompt + self.tokenizer.decode(row) for row in rows]


def load_run(run: Path, tag: str | None = None, device: str = "auto") -> LoadedModel:
    """Read model and tokenizer of a run folder from its newest or the named checkpoint, onto cpu, cuda or auto: cuda
    where there is one.

    Raises:
        CheckpointError: not a run folder, no complete checkpoint in it, or files that cannot be read.
        ConfigError: cuda was asked for and is not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this machine has no CUDA device; use --device cpu")
    here = "cuda" if torch.cuda.is_available() else "cpu"
    # Reading ZeRO's files imports DeepSpeed, which announces a device it finds by itself. It is told of this machine's,
    # and not of the one to sample on, because a training that follows in this process keeps it.
    os.environ.setdefault("DS_ACCELERATOR", here)
    notes = run_folder.linked_folders(run)
    checkpoint, weights = _newest_weights(run, tag)
    for note in (*notes, *checkpoint.notes):
        print(f"WARNING: {note}", file=sys.stderr)
    tokenizer = load_tokenizer(run / run_folder.TOKENIZER)
    if tokenizer.fingerprint != checkpoint.manifest["tokenizer"]:
        what = f"the tokenizer that {checkpoint.path} was trained with (fingerprints differ)"
        raise CheckpointError(f"{run / run_folder.TOKENIZER} is not {what}")
    config, vocab_size = model_of(checkpoint.manifest)
    if bad := [name for name, weight in weights.items() if not weight.isfinite().all()]:
        values = f"{bad[0]} and {len(bad) - 1} more have" if bad[1:] else f"{bad[0]} has"
        raise NumericsError(f"{checkpoint.path}: {values} values that are not finite; name an earlier one with --tag")
    model = GPT(config, vocab_size)
    model.load_state_dict(weights, strict=True)
    return LoadedModel(model.to(here if device == "auto" else device).eval(), tokenizer, checkpoint)


def first_prompt(run: Path, tokenizer: Tokenizer) -> str:
    """The first of the run's sample prompts that its vocabulary has; a line break or any token where it has none."""
    try:
        prompts = load_run_config(str(run / run_folder.RUN)).train.sample_prompts
    except ConfigError as error:
        print(f"WARNING: sample_prompts are not known: {error}", file=sys.stderr)
        prompts = ()
    for prompt in (*prompts, "\n"):
        with contextlib.suppress(ConfigError):
            if len(tokenizer.encode_prompt(prompt)):
                return prompt
    return tokenizer.decode([0])


def _newest_weights(run: Path, tag: str | None) -> tuple[Found, dict[str, torch.Tensor]]:
    """Read the weights of the newest or the named checkpoint, another one if a run deletes it meanwhile."""
    where = run / run_folder.CHECKPOINTS
    for _ in range(MEANWHILE):
        checkpoint = find(where, tag)
        if checkpoint is None:
            raise CheckpointError(f"{run}: no complete checkpoint in {where}; is it a run folder of train.py?")
        try:
            return checkpoint, fp32_weights(checkpoint)
        except CheckpointError:
            if checkpoint.path.exists():
                raise
    raise CheckpointError(f"{where}: its checkpoints are deleted faster than they can be read")


def sample(arguments: SampleArguments, to: TextIO | None = None) -> list[str]:
    """Write continuations of the prompt to `to` (default: stdout) as they are drawn, and return them.

    Several samples are drawn as one batch: the first streams, the others follow when they are complete. With
    `mark_copied` all of them do.

    Raises:
        ConfigError: a prompt with unseen characters, or a setting out of range.
        CheckpointError: see `load_run`.
        DataError: copies are to be marked, and the training text is not at hand.
    """
    out: TextIO = sys.stdout if to is None else to
    loaded = load_run(arguments.run, arguments.tag, arguments.device)
    marking = arguments.mark_copied
    source = None if marking is None else training_text(arguments.run, loaded.checkpoint, arguments.data)
    decoder = StreamDecoder(loaded.tokenizer)
    prompt = first_prompt(arguments.run, loaded.tokenizer) if arguments.prompt is None else arguments.prompt
    before = prompt  # written with the first token, when every setting has been accepted

    def stream(row: int, token: int) -> None:
        nonlocal before
        if row == 0 and source is None:
            out.write(before + decoder.push(token))
            out.flush()
            before = ""

    texts = loaded.continuations(
        prompt,
        arguments.max_new_tokens,
        temperature=0.0 if arguments.greedy else arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
        num_samples=arguments.num_samples,
        on_token=stream,
    )
    if source is None:
        out.write(decoder.flush() + "\n")
    for number, text in enumerate(texts, start=1):
        if number > 1:
            out.write(f"\n--- sample {number}\n")
        if source is not None and marking is not None:
            spans = source.spans(text, marking, after=len(prompt))
            below = listed(text, spans, marking, drawn=len(text) - len(prompt))
            out.write(f"{marked(text, spans, out)}\n\n{below}\n")
        elif number > 1:
            out.write(f"{text}\n")
    return texts
