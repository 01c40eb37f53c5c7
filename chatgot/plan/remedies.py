"""Changes that make a run fit, the cheapest first: micro batch, activation checkpointing, ZeRO stage, offload."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

from chatgot.errors import ConfigError
from chatgot.plan.estimate import Estimate
from chatgot.plan.request import Request

Overrides = dict[str, Any]


@dataclass(frozen=True)
class Remedy:
    """Changes together, planned again."""

    overrides: Overrides
    """Of the DeepSpeed JSON, without the leading 'ds.'."""
    plan: Estimate
    speed_ratio: float | None
    """Predicted tokens per second over those of the run as asked for; None where speed is not known."""

    def words(self) -> list[str]:
        """As train.py and plan take them: ['ds.zero_optimization.stage=2']."""
        return [
            f"ds.{key}={value if isinstance(value, str) else json.dumps(value)}"
            for key, value in self.overrides.items()
        ]


def find_remedies(request: Request, current: Estimate, limit: int = 5) -> list[Remedy]:
    """Smallest sets of changes that fit, by predicted speed, then by their number; empty where nothing helps.

    A change that is refused (16 bit at stage 0, offload with Muon) is left out, and so is a set that contains another
    one that fits.
    """
    kinds = (_micro_batches(request, current), _recomputation(request, current), _stages(current), _offload(current))
    knobs = [list(kind) for kind in kinds]
    found: list[Remedy] = []
    fitting: list[frozenset[int]] = []
    for count in range(1, len(knobs) + 1):
        for chosen in combinations(range(len(knobs)), count):
            if any(known <= set(chosen) for known in fitting):
                continue
            best = _best(request, current, [knobs[index] for index in chosen])
            if best is not None:
                found.append(best)
                fitting.append(frozenset(chosen))
    return sorted(found, key=_price)[:limit]


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
    """Speed lost, then the number of changes; equals keep their order, in which the mildest setting of every knob comes
    first.
    """
    return (-(remedy.speed_ratio or 0.0), len(remedy.overrides))


def _micro_batches(request: Request, current: Estimate) -> Iterator[Overrides]:
    """Every smaller micro batch that divides the present one; the global batch stays."""
    micro, accumulation = current.settings.micro_batch_size, current.settings.accumulation
    for smaller in range(micro // 2, 0, -1):
        if micro % smaller == 0:
            overrides: Overrides = {"train_micro_batch_size_per_gpu": smaller}
            if request.given("gradient_accumulation_steps") or not request.given("train_batch_size"):
                overrides["gradient_accumulation_steps"] = accumulation * micro // smaller
            yield overrides


def _recomputation(request: Request, current: Estimate) -> Iterator[Overrides]:
    every = current.settings.recompute_every
    section: Overrides = {} if request.given("activation_checkpointing") else {"activation_checkpointing": {}}
    if every is None and current.settings.model.n_layers > 1:
        yield {**section, "chatgot.activation_checkpointing.every_n_layers": 2}
    if every is None:
        yield section
    elif every > 1:
        yield {"chatgot.activation_checkpointing.every_n_layers": 1}


def _stages(current: Estimate) -> Iterator[Overrides]:
    for stage in range(current.settings.stage + 1, 4):
        yield {"zero_optimization.stage": stage}


def _offload(current: Estimate) -> Iterator[Overrides]:
    if not current.device.on_cuda:
        return
    optimizer = {"zero_optimization.offload_optimizer.device": "cpu"}
    parameters = {"zero_optimization.offload_param.device": "cpu"}
    if not current.settings.offload_optimizer:
        yield optimizer
    if not current.settings.offload_param:
        yield parameters if current.settings.offload_optimizer else {**optimizer, **parameters}
