"""The Python API: train, and open a run folder to sample from it. torch is imported when it is needed first."""

from __future__ import annotations

import atexit
import json
from argparse import Namespace
from base64 import urlsafe_b64encode
from collections.abc import Mapping, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import chatgot.run_folder as run_folder
from chatgot.errors import EXIT_INTERRUPTED, RunAgainError

if TYPE_CHECKING:
    from chatgot.config.run import RunConfig
    from chatgot.inference.copied import Span, TrainingText
    from chatgot.inference.sample import LoadedModel


class Run:
    """A run folder: what was trained and how, what it measured, and the model in its newest checkpoint."""

    def __init__(self, path: str | PathLike[str], tag: str | None = None, device: str = "auto") -> None:
        """See `load`."""
        self.path, self.tag, self.device = Path(path), tag, device
        self._texts: dict[str | None, TrainingText] = {}
        run_folder.check(self.path)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def config(self) -> RunConfig:
        """What was trained, from run.yaml: `run.config.model.n_layers`."""
        from chatgot.config.run import load_run_config

        return load_run_config(str(self.path / run_folder.RUN))

    @property
    def deepspeed_config(self) -> dict[str, Any]:
        """How it was run: the resolved DeepSpeed JSON of the newest start."""
        return run_folder.read(self.path, run_folder.DS_CONFIG)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The whole lines of metrics.jsonl in the order of writing: metrics of logged steps, and a digest per step.

        After a resume from an older checkpoint, a step may stand there twice.
        """
        from chatgot.observe.journal import read_journal

        return read_journal(self.path / run_folder.METRICS)[0]

    @cached_property
    def model(self) -> LoadedModel:
        """The model and its tokenizer, read once and kept; `load` again for a checkpoint that was saved since.

        Raises:
            ChatGoTError: no complete checkpoint, or files that cannot be read.
        """
        from chatgot.inference.sample import load_run

        return load_run(self.path, self.tag, self.device)

    def sample(
        self,
        prompt: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> str:
        """The prompt (default: the run's first sample prompt) and its continuation, the text that `chatgot sample`
        prints with the same settings (see its help).

        Raises:
            ChatGoTError: a prompt with unseen characters, a setting out of range, or see `model`.
        """
        from chatgot.inference.sample import first_prompt

        text = first_prompt(self.path, self.model.tokenizer) if prompt is None else prompt
        return self.model.continuations(
            text, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
        )[0]

    def copies(
        self, text: str, min_characters: int = 40, data: str | PathLike[str] | None = None, after: int = 0
    ) -> list[Span]:
        """Which passages of a text stand verbatim in the training text, where, and which steps had fed them: what
        `chatgot sample --mark_copied` marks.

        Args:
            min_characters: shorter passages are left out.
            data: the training text, as for --data; None: where the run had it.
            after: leave out what ends within the first so many characters, such as a prompt.

        Raises:
            ChatGoTError: the training text is not at hand, or see `model`.
        """
        spec = None if data is None else str(data)
        if spec not in self._texts:
            from chatgot.inference.copied import TrainingText

            self._texts[spec] = TrainingText(self.path, self.model.checkpoint, spec)
        return self._texts[spec].spans(text, min_characters, after)


def load(path: str | PathLike[str], tag: str | None = None, device: str = "auto") -> Run:
    """Open a run folder. Weights are read at the first `sample`.

    Args:
        tag: the checkpoint to use; default: the newest complete one.
        device: cpu, cuda, or auto: cuda where there is one.

    Raises:
        ChatGoTError: it is no run folder.
    """
    return Run(path, tag, device)


def train(
    deepspeed_config: str | PathLike[str] | Mapping[str, object] | None,
    out_dir: str | PathLike[str],
    config: str | PathLike[str] = "tiny",
    data: str | PathLike[str] = "wars_of_the_roses",
    resume_from: str = "auto",
    allow_data_change: bool = False,
    allow_batch_change: bool = False,
    run_name: str | None = None,
    overrides: Sequence[str] | Mapping[str, object] = (),
    strict: bool = False,
    max_minutes: float | None = None,
    hang_timeout: float = 0.0,
    init_from: str | PathLike[str] | None = None,
) -> Run:
    """Train in this process, as `python launch/train.py` does with the same arguments; returns the finished run.

    Args:
        deepspeed_config: a JSON, or the name of a shipped one (`chatgot configs`); a mapping, or base64 of its JSON;
            None: the device decides.
        config: a preset's name (`chatgot presets`), or a run YAML.
        overrides: {"train.max_steps": 200, "ds.optimizer.params.lr": 3e-4}, or the same as texts, "KEY=VALUE".
        strict: whether a warning about the JSON refuses the run.
        max_minutes: after which the run is saved and ends with RunAgainError.
        hang_timeout: seconds without progress after which this process is ended (exit 6); 0: never.
        init_from: a folder of GPT-2 or Qwen3 in transformers' layout, that a new run starts from.

    Raises:
        RunAgainError: a signal or the time limit ended the run, which is saved, or memory ran out: the same call
            goes on.
        ChatGoTError: every other refusal; its exit_code is the command's.
    """
    given = Namespace(**locals())  # as from a command line
    given.config, given.data, given.out_dir = str(config), str(data), Path(out_dir)
    given.init_from = None if init_from is None else str(init_from)
    if isinstance(overrides, Mapping):
        given.overrides = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
    if isinstance(deepspeed_config, Mapping):
        given.deepspeed_config = urlsafe_b64encode(json.dumps(dict(deepspeed_config)).encode()).decode()
    from chatgot.launcher.arguments import given_to
    from chatgot.launcher.entry import refuse_wrong_settings, settle_environment

    given.deepspeed_config = given_to(refuse_wrong_settings, given)
    settle_environment()
    from chatgot.training.run import TrainArguments, leave
    from chatgot.training.run import train as run

    code = run(given_to(TrainArguments, given))
    atexit.unregister(leave)
    atexit.register(leave)  # of several ranks, one that the interpreter tears down while gloo's threads run aborts
    if code == EXIT_INTERRUPTED:
        raise RunAgainError(f"{out_dir}: interrupted and saved; the same call goes on")
    return Run(out_dir)
