"""What the memory plan says of a probe: one that is sure not to fit is not started."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from chatgot.config.run import ModelConfig
from chatgot.deepspeed_json.engine_config import build_engine_config
from chatgot.devices import DeviceFacts
from chatgot.model.shapes import count_parameters
from chatgot.plan.devices import GIB, Device, find_device
from chatgot.plan.estimate import estimate

CERTAIN = 1.5
"""A probe is left out if the plan's peak is this many times what there is: far beyond what the plan errs by
(BENCHMARKS.md).
"""


def this_device(facts: DeviceFacts) -> Device:
    """The device of this rank, as plans know devices."""
    if facts.kind == "cuda":
        return Device(facts.name or "cuda", torch.cuda.mem_get_info()[1], facts)
    return find_device("cpu")


@dataclass(frozen=True)
class Forecast:
    """Plans of one model on one kind of device."""

    model: dict[str, Any]
    vocab_size: int
    world_size: int
    device: Device

    def beyond(self, tree: dict[str, Any]) -> str | None:
        """Why a probe of this JSON, its batch numbers resolved, need not be started; None: it may fit."""
        model = ModelConfig(**self.model)
        n_params = count_parameters(model, self.vocab_size)
        config = build_engine_config(
            tree, "probe", world_size=self.world_size, facts=self.device.facts, n_params=n_params
        )
        plan = estimate(model, self.vocab_size, config, self.world_size, self.device)
        needed = plan.needed - plan.margin
        if needed <= CERTAIN * plan.capacity:
            return None
        return f"not tried: chatgot plan says {needed / GIB:.2f} GiB, of {plan.capacity / GIB:.2f} GiB"
