"""What is asked of a plan: the two configurations, ranks, device; and planning it again with other overrides."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chatgot.config.overrides import parse_overrides
from chatgot.config.run import RunConfig, load_run_config
from chatgot.deepspeed_json.batch import TO_BE_FOUND
from chatgot.deepspeed_json.engine_config import read_engine_config
from chatgot.deepspeed_json.file import read_document
from chatgot.devices import Device, find_device
from chatgot.errors import ConfigError
from chatgot.model.shapes import count_parameters
from chatgot.plan.estimate import Estimate, estimate

CHARACTERS = 100
"""Vocabulary that is assumed for the char tokenizer, whose real one depends on the text."""


@dataclass(frozen=True)
class Request:
    """One JSON on one kind of device."""

    path: Path
    tree: dict[str, Any] = field(repr=False)
    """The JSON as read."""
    config: RunConfig
    vocab_size: int
    overrides: dict[str, Any]
    """Of the DeepSpeed JSON, without the leading 'ds.'."""
    world_size: int
    device: Device
    notes: tuple[str, ...] = ()

    def plan(self, extra: dict[str, Any] | None = None) -> Estimate:
        """The estimate, with more overrides or without.

        Raises:
            ConfigError: the JSON with these overrides is refused.
        """
        engine = read_engine_config(
            self.path,
            {**self.overrides, **(extra or {})},
            world_size=self.world_size,
            facts=self.device.facts,
            n_params=count_parameters(self.config.model, self.vocab_size),
            found_micro_batch=TO_BE_FOUND,
        )
        return estimate(self.config.model, self.vocab_size, engine, self.world_size, self.device)

    def given(self, key: str) -> bool:
        """Whether the file or an override states a top-level key."""
        return self.tree.get(key) is not None or self.overrides.get(key) is not None


def read_request(
    path: Path,
    config: str,
    world_size: int,
    device: str,
    overrides: list[str] | None = None,
    vocab_size: int | None = None,
) -> Request:
    """Read what the command line names.

    Raises:
        ConfigError: a file cannot be read, a name is not known, a number is out of range.
    """
    if world_size < 1:
        raise ConfigError(f"--world_size {world_size}: must be at least 1")
    if vocab_size is not None and vocab_size < 1:
        raise ConfigError(f"--vocab_size {vocab_size}: must be at least 1")
    run_overrides, ds_overrides = parse_overrides(overrides or [])
    run = load_run_config(config, run_overrides)
    notes: list[str] = []
    if vocab_size is None:
        vocab_size, note = _vocabulary(run)
        notes.append(note)
    found = find_device(device)
    if found.note:
        notes.append(f"{found.name}: {found.note}")
    return Request(path, read_document(path).tree, run, vocab_size, ds_overrides, world_size, found, tuple(notes))


def _vocabulary(run: RunConfig) -> tuple[int, str]:
    if run.data.tokenizer == "byte":
        return 256, "vocabulary 256: tokenizer byte"
    if run.data.tokenizer == "bpe":
        return run.data.bpe_vocab_size, f"vocabulary {run.data.bpe_vocab_size}: data.bpe_vocab_size"
    return CHARACTERS, f"vocabulary {CHARACTERS}: assumed for tokenizer char; --vocab_size says it exactly"
