"""One JSON planned for one kind of device, with and without other overrides; and the changes that make it fit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations, product
from pathlib import Path
from typing import Any

from chatgot.config.overrides import parse_overrides
from chatgot.config.run import RunConfig, load_run_config
from chatgot.deepspeed_json.read import Document, read_document
from chatgot.deepspeed_json.resolve import EngineConfig, resolve
from chatgot.deepspeed_json.schema import ACCUMULATION, MICRO, TOTAL
from chatgot.devices import Device, find_device
from chatgot.errors import ConfigError
from chatgot.model.shapes import count_parameters
from chatgot.plan.estimate import Estimate, estimate

CHARACTERS = 100
"""Vocabulary that is assumed for the char tokenizer, whose real one depends on the text."""

Overrides = dict[str, Any]
"""Of the DeepSpeed JSON, without the leading 'ds.'."""


@dataclass(frozen=True)
class Request:
    """One JSON on one kind of device."""

    document: Document = field(repr=False)
    """The JSON as read."""
    config: RunConfig
    vocab_size: int
    overrides: Overrides
    world_size: int
    device: Device
    notes: tuple[str, ...] = ()

    def engine_config(self, extra: Overrides) -> EngineConfig:
        """The JSON resolved for the device and the model, with more overrides.

        Raises:
            ConfigError: it is refused.
        """
        overrides, facts = {**self.overrides, **extra}, self.device.facts
        resolved = resolve(self.document, overrides, world_size=self.world_size, facts=facts)
        return resolved.complete(count_parameters(self.config.model, self.vocab_size)).engine_config()

    def plan(self, extra: Overrides | None = None) -> Estimate:
        """Estimate the run, with more overrides or without. Raises ConfigError as `engine_config`."""
        engine = self.engine_config(extra or {})
        return estimate(self.config.model, self.vocab_size, engine, self.world_size, self.device)

    def given(self, key: str) -> bool:
        """Whether the file or an override states a top-level key."""
        return self.document.tree.get(key) is not None or self.overrides.get(key) is not None


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
    for name, number in (("world_size", world_size), ("vocab_size", vocab_size)):
        if number is not None and number < 1:
            raise ConfigError(f"--{name} {number}: must be at least 1")
    run_overrides, ds_overrides = parse_overrides(overrides or [])
    run = load_run_config(config, run_overrides)
    notes: list[str] = []
    if vocab_size is None:
        vocab_size, note = _vocabulary(run)
        notes.append(note)
    kind = find_device(device)
    if kind.note:
        notes.append(f"{kind.name}: {kind.note}")
    return Request(read_document(path), run, vocab_size, ds_overrides, world_size, kind, tuple(notes))


def _vocabulary(run: RunConfig) -> tuple[int, str]:
    if run.data.tokenizer == "byte":
        return 256, "vocabulary 256: tokenizer byte"
    if run.data.tokenizer == "bpe":
        return run.data.bpe_vocab_size, f"vocabulary {run.data.bpe_vocab_size}: data.bpe_vocab_size"
    if run.data.tokenizer == "given":
        raise ConfigError("data.tokenizer = given: its vocabulary is not known here; --vocab_size says how large it is")
    return CHARACTERS, f"vocabulary {CHARACTERS}: assumed for tokenizer char; --vocab_size says it exactly"


@dataclass(frozen=True)
class Remedy:
    """Changes together, planned again."""

    overrides: Overrides
    plan: Estimate
    speed_ratio: float | None
    """Predicted tokens per second over those of the run as asked for; None where speed is not known."""

    def words(self) -> list[str]:
        """The changes as train.py and plan take them: ['ds.zero_optimization.stage=2']."""
        return words(self.overrides)


def words(overrides: Overrides) -> list[str]:
    """Overrides as a command line takes them."""
    return [f"ds.{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in overrides.items()]


def less_memory(engine: EngineConfig, n_layers: int | None = None, offload: bool = True) -> list[list[Overrides]]:
    """What needs less memory and is not in use yet, by kind: recomputation, ZeRO stage, offload; the mildest first.

    Args:
        n_layers: of the model; None: not known, so that recomputing every second block is left out.
        offload: whether the host's memory is another one than the device's.
    """
    recomputed: list[Overrides] = []
    every, key = engine.chatgot.activation_checkpointing.every_n_layers, "chatgot.activation_checkpointing"
    if engine.activation_backend is None:
        section: Overrides = {} if engine.activation_checkpointing is not None else {"activation_checkpointing": {}}
        if n_layers is not None and n_layers > 1:
            recomputed.append({**section, f"{key}.every_n_layers": 2})
        recomputed.append(section)
    elif every > 1:
        recomputed.append({f"{key}.every_n_layers": 1})
    stages: list[Overrides] = [{"zero_optimization.stage": stage} for stage in range(engine.zero_stage + 1, 4)]
    offloads: list[Overrides] = []
    optimizer: Overrides = {"zero_optimization.offload_optimizer.device": "cpu"}
    if engine.zero_stage == 0 or engine.offload_optimizer == "none":
        offloads.append(optimizer)
    else:
        optimizer = {}
    if engine.zero_stage < 3 or engine.offload_param == "none":
        offloads.append({**optimizer, "zero_optimization.offload_param.device": "cpu"})
    return [recomputed, stages, offloads if offload else []]


def find_remedies(request: Request, current: Estimate, limit: int = 5) -> list[Remedy]:
    """Smallest sets of changes that fit, by predicted speed, then by their number; empty where nothing helps.

    A change that is refused (16 bit at stage 0, offload with Muon) is left out, and so is a set that contains another
    one that fits.
    """
    engine = request.engine_config({})
    others = less_memory(engine, current.settings.model.n_layers, offload=current.device.on_cuda)
    knobs = [list(_micro_batches(request, current)), *others]
    remedies: list[Remedy] = []
    fitting: list[frozenset[int]] = []
    for count in range(1, len(knobs) + 1):
        for chosen in combinations(range(len(knobs)), count):
            if any(known <= set(chosen) for known in fitting):
                continue
            best = _best(request, current, [knobs[index] for index in chosen])
            if best is not None:
                remedies.append(best)
                fitting.append(frozenset(chosen))
    return sorted(remedies, key=_price)[:limit]


def _best(request: Request, current: Estimate, knobs: list[list[Overrides]]) -> Remedy | None:
    """The cheapest setting of these knobs that fits."""
    fitting: list[Remedy] = []
    for settings in product(*knobs):
        overrides = {key: value for setting in settings for key, value in setting.items()}
        try:
            plan = request.plan(overrides)
        except ConfigError:
            continue  # refused: no way to run it, so no remedy
        if plan.fits:
            ratio = plan.speed.tokens_per_sec / current.speed.tokens_per_sec if plan.speed and current.speed else None
            fitting.append(Remedy(overrides, plan, ratio))
    return min(fitting, key=_price, default=None)


def _price(remedy: Remedy) -> tuple[float, int]:
    """Speed lost, then the number of changes; of equals the first, which has the mildest setting of every knob."""
    return (-(remedy.speed_ratio or 0.0), len(remedy.overrides))


def _micro_batches(request: Request, current: Estimate) -> Iterator[Overrides]:
    """Every smaller micro batch that divides the present one; the global batch stays."""
    micro, accumulation = current.settings.micro_batch_size, current.settings.accumulation
    for smaller in range(micro // 2, 0, -1):
        if micro % smaller == 0:
            overrides: Overrides = {MICRO: smaller}
            if request.given(ACCUMULATION) or not request.given(TOTAL):
                overrides[ACCUMULATION] = accumulation * micro // smaller
            yield overrides
