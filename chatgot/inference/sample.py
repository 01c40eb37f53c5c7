"""Text from a run folder: `chatgot sample`. Needs nothing but the folder."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch

import chatgot.run_folder as run_folder
from chatgot.checkpoint.load import MEANWHILE, Found, find
from chatgot.checkpoint.manifest import model_of
from chatgot.checkpoint.portable import fp32_weights
from chatgot.config.run import load_run_config
from chatgot.data.tokenizer import StreamDecoder, Tokenizer, load_tokenizer
from chatgot.errors import CheckpointError, ConfigError, NumericsError
from chatgot.inference.copied import TrainingText, listed, marked
from chatgot.model.generate import check_settings, generate
from chatgot.model.gpt import GPT


@dataclass(frozen=True)
class RunArguments:
    """What `chatgot sample`, `chat` and `serve` open."""

    run: Path
    tag: str | None = None
    device: str = "auto"
    mark_copied: int | None = None
    """Say which passages of at least so many characters stand in the training text; None: don't look for them."""
    data: str | None = None
    """The training text, as for --data of train.py; None: where the run had it."""

    def open(self) -> tuple[LoadedModel, TrainingText | None]:
        """Read the model, and open its training text where copies are to be marked.

        Raises:
            CheckpointError: see `load_run`.
            DataError: the training text is not at hand.
        """
        model = load_run(self.run, self.tag, self.device)
        return model, None if self.mark_copied is None else TrainingText(self.run, model.checkpoint, self.data)


@dataclass(frozen=True)
class DrawArguments(RunArguments):
    """The command line of `chatgot chat`, and how `chatgot sample` draws."""

    max_new_tokens: int = 256
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    @property
    def drawing(self) -> dict[str, Any]:
        """What of it `LoadedModel.continuations` and `check_drawing` take."""
        return {name: getattr(self, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")}


@dataclass(frozen=True)
class SampleArguments(DrawArguments):
    """The command line of `chatgot sample`."""

    prompt: str | None = None
    """None: the run's first sample prompt."""
    num_samples: int = 1
    greedy: bool = False


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
        stop: Callable[[Sequence[int]], bool] | None = None,
    ) -> list[str]:
        """Draw `num_samples` continuations as one batch; returns the prompt with each. Temperature 0 is greedy;
        `on_token` is called with (sample, token) as tokens are drawn, then `stop` with all of a sample so far: whether
        it ends there.

        Raises:
            ConfigError: a prompt with unseen characters, or a setting out of range.
        """
        if num_samples < 1:
            raise ConfigError(f"--num_samples {num_samples}: must be >= 1")
        check_drawing(max_new_tokens, temperature, top_k, top_p, seed)
        ids = self.tokenizer.encode_prompt(prompt)
        if len(ids) == 0:
            raise ConfigError("--prompt: is empty; give at least one character")
        device = next(self.gpt.parameters()).device
        input_ids = torch.from_numpy(ids.astype("int64"))[None].repeat(num_samples, 1).to(device)
        rows = generate(
            self.gpt,
            input_ids,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            on_token=on_token,
            stop=stop,
        )
        return [prompt + self.tokenizer.decode(row) for row in rows]


class Reply:
    """The text of tokens as they are drawn, up to one of the texts `stops`, none of which is empty.

    Gives it out once it is sure that it stays: what may become a stop text is held back.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._stops = tuple(stops)
        self.text = ""
        """All text so far, without the stop text and what follows it."""
        self.given_out = 0
        """Characters of it that `push` and `flush` have returned."""
        self.decoded = 0
        """Characters of all tokens so far, those behind a stop text too."""
        self.ended = False
        """Whether a stop text has come."""

    def push(self, token: int) -> str:
        """Take the next token; returns the text that is sure since the last call."""
        self._add(self._decoder.push(token))
        return self._sure(len(self.text) if self.ended else self._unsure())

    def flush(self) -> str:
        """At the end of the tokens: the rest of the text."""
        self._add(self._decoder.flush())
        return self._sure(len(self.text))

    def _add(self, more: str) -> None:
        self.decoded += len(more)
        if self.ended:
            return
        before = len(self.text)
        self.text += more
        found = (self.text.find(stop, max(0, before - len(stop) + 1)) for stop in self._stops)
        if places := [place for place in found if place >= 0]:
            self.text, self.ended = self.text[: min(places)], True

    def _unsure(self) -> int:
        """Where the longest end of the text begins that is the beginning of a stop text."""
        lengths = (n for stop in self._stops for n in range(len(stop) - 1, 0, -1) if self.text.endswith(stop[:n]))
        return len(self.text) - max(lengths, default=0)

    def _sure(self, end: int) -> str:
        more, self.given_out = self.text[self.given_out : end], max(self.given_out, end)
        return more


def check_drawing(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None, seed: int) -> None:
    """Refuse a setting that is out of range; ConfigError."""
    try:
        check_settings(max_new_tokens, temperature, top_k, top_p)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed {seed}: must be >= 0 and below 2**63")


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
        CheckpointError, DataError: see `RunArguments.open`.
    """
    out: TextIO = sys.stdout if to is None else to
    loaded, source = arguments.open()
    decoder = StreamDecoder(loaded.tokenizer)
    prompt = first_prompt(arguments.run, loaded.tokenizer) if arguments.prompt is None else arguments.prompt
    before = prompt  # written with the first token, when every setting has been accepted

    def stream(row: int, token: int) -> None:
        nonlocal before
        if row == 0 and source is None:
            out.write(before + decoder.push(token))
            out.flush()
            before = ""

    drawing = replace(arguments, temperature=0.0 if arguments.greedy else arguments.temperature).drawing
    texts = loaded.continuations(prompt, **drawing, num_samples=arguments.num_samples, on_token=stream)
    if source is None:
        out.write(decoder.flush() + "\n")
    for number, text in enumerate(texts, start=1):
        if number > 1:
            out.write(f"\n--- sample {number}\n")
        if source is not None and (least := arguments.mark_copied) is not None:
            spans = source.spans(text, least, after=len(prompt))
            below = listed(text, spans, least, drawn=len(text) - len(prompt))
            out.write(f"{marked(text, spans, out)}\n\n{below}\n")
        elif number > 1:
            out.write(f"{text}\n")
    return texts
