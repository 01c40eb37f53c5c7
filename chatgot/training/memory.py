"""Prediction beside measurement: what the plan said of this run's memory, and what its second step really held."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from chatgot.config.run import ModelConfig
from chatgot.devices import GIB, DeviceFacts, device_of_machine
from chatgot.distributed import ControlGroup
from chatgot.engine.step import TrainingEngine
from chatgot.engine.zero_view import live_model_states
from chatgot.observe.meters import peak_memory_gib
from chatgot.plan.estimate import Estimate, estimate
from chatgot.plan.states import STATES

AT_STEP = 2
"""Of this process: at the first step the optimizer has no moments yet."""


@dataclass
class MemoryCheck:
    """Counts the live model states before the second optimizer step."""

    plan: Estimate
    engine: TrainingEngine
    live: dict[str, int] | None = None
    """Bytes by part, once seen."""
    _steps: int = 0

    def start(self) -> None:
        """Have the engine call us before its steps, until we have seen the second one."""
        self.engine.before_step = self._look

    def _look(self) -> None:
        self._steps += 1
        if self._steps == AT_STEP:
            self.live = live_model_states(self.engine.engine)
            self.engine.before_step = None

    def compare(self, ranks: ControlGroup) -> tuple[dict[str, Any], str] | None:
        """After the second step: the fields of the event `memory` in bytes, the most over ranks, and a line for the
        log. Collective.

        None at every other step. Model states are counted by their live tensors, before the optimizer step. The peak is
        what PyTorch's CUDA allocator had in use; on a CPU it is the process's resident set, and the plan's figure
        beside it includes the interpreter.
        """
        if self.live is None:
            return None
        live, self.live = self.live, None
        on_cuda = self.plan.device.on_cuda
        peak = round(peak_memory_gib("cuda" if on_cuda else "cpu") * GIB)
        everyone = ranks.gather({**{part: live[part] for part in STATES}, "peak": peak})
        measured = {part: max(rank[part] for rank in everyone) for part in everyone[0]}
        states = {part: self.plan.states.total(part) for part in STATES}
        predicted = {**states, "peak": self.plan.peak if on_cuda else self.plan.host}
        fields = {
            "predicted": {**predicted, "parts_at_peak": {part: size for part, size in self.plan.parts.items() if size}},
            "measured": measured,
            "peak_is": "torch.cuda.max_memory_allocated" if on_cuda else "resident set of the process",
        }
        ours, theirs = (sum(sizes[part] for part in STATES) / 2**20 for sizes in (predicted, measured))
        what = "peak in use" if on_cuda else "resident set"
        line = (
            f"memory, predicted / measured: model states {ours:.1f} / {theirs:.1f} MiB; "
            f"{what} {predicted['peak'] / GIB:.2f} / {measured['peak'] / GIB:.2f} GiB"
        )
        return fields, line


def check_memory(
    model: ModelConfig,
    vocab_size: int,
    engine: TrainingEngine,
    world_size: int,
    facts: DeviceFacts,
    device: torch.device,
) -> MemoryCheck:
    """The plan of the run that this engine is about to make."""
    here = device_of_machine(facts, device)
    check = MemoryCheck(estimate(model, vocab_size, engine.config, world_size, here), engine)
    check.start()
    return check
