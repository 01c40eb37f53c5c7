"""A rank that runs out of memory in a step must not leave the others waiting in a collective, nor leave a trace in the
weights.

Forward and backward: the rank goes on with a batch of one token in place of its own, so that every collective of the
step takes place (engine/collectives.py). Before the weights are touched all ranks ask whether anybody ran out; then all
drop the step's gradients and raise `RanOut`, and the loop repeats the step with smaller micro-batches. Optimizer step:
the update is tried again on that rank alone.
"""

from __future__ import annotations

from typing import Any

import torch

from chatgot.distributed import ControlGroup
from chatgot.engine import numerics, partial_step
from chatgot.engine.collectives import Collectives
from chatgot.errors import MachineError

_CPU_AND_LIBRARIES = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python could not allocate: the device's, or on a CPU the host's memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _CPU_AND_LIBRARIES)


class RanOut(Exception):
    """Memory ran out on some rank. Raised on all ranks together; weights and optimizer are those before the step, its
    gradients dropped.
    """

    def __init__(self, where: dict[int, str]) -> None:
        super().__init__(f"out of memory: {where}")
        self.where = where
        """{rank: 'forward', 'backward' or 'optimizer step'}"""


class MemoryGuard:
    """Forward and backward of every micro-batch, and the base optimizer's update, of one engine; every rank has one."""

    def __init__(self, engine: Any, device: torch.device) -> None:
        self.engine = engine
        self.device = device
        self.retried = False
        """This rank's optimizer ran out of memory in the last step, and worked at the second try."""
        self.lost = False
        """This rank's optimizer could not make its update: the weights are no longer of one step."""
        self._ran_out: str | None = None
        self._phase = ""
        self._ranks = ControlGroup()
        self._collectives = Collectives.of_process()
        self._hooked = engine.zero_optimization_stage() == 3
        if (
            self._hooked
        ):  # after ZeRO-3's own hook, which is older: what it communicates while it records a trace is not counted
            engine.module.register_forward_pre_hook(lambda *_: self._collectives.begin())
        self._watch_optimizer()

    def micro_step(self, input_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Forward and backward of one micro-batch (B, T); its loss, detached. Never raises for want of memory, if one
        token fits.
        """
        if self._ran_out is None:
            then = partial_step.before(self.engine)
            try:
                return self._forward_backward(input_ids, targets)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._ran_out = self._phase
                issued = self._collectives.issued
            partial_step.repair(self.engine, then)
            self._collectives.muted, self._collectives.left_out = self._hooked, issued
        token = torch.zeros((1, 1), dtype=torch.long)
        try:
            loss = self._forward_backward(token, token)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._collectives.muted, self._collectives.left_out = False, 0
            raise MachineError(
                f"rank {self._ranks.rank}: out of memory in {self._ran_out}, and again with a batch of one token: "
                f"{_first_line(error)}"
            ) from error
        if self._collectives.left_out:
            raise RuntimeError(
                f"{self._collectives.left_out} collectives of the abandoned micro-batch had no counterpart"
            )
        return loss

    def _forward_backward(self, input_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self._phase = "forward"
        self._collectives.issued = 0
        input_ids, targets = input_ids.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)
        loss = self.engine(input_ids, targets)
        self._phase = "backward"
        self.engine.backward(numerics.poisoned_by(loss))
        return loss.detach()

    def agree(self) -> None:
        """After the last backward of a step, before its gradients are used. Collective.

        Raises:
            RanOut: on all ranks, if any ran out of memory.
        """
        if not self._ranks.any(self._ran_out is not None)[0]:
            return
        found = self._ranks.gather(self._ran_out)
        self._ran_out = None
        partial_step.discard(self.engine)
        raise RanOut({rank: where for rank, where in enumerate(found) if where is not None})

    def _watch_optimizer(self) -> None:
        base = getattr(self.engine.optimizer, "optimizer", None) or self.engine.optimizer
        update = base.step

        def step(*args: Any, **kwargs: Any) -> Any:
            before, initialised = _versions(base), set(base.state)
            for attempt in (1, 2):
                try:
                    return update(*args, **kwargs)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                for parameter in base.state.keys() - initialised:  # moments of which some could not be allocated
                    del base.state[parameter]
                self.retried, self.lost = True, attempt == 2 or _versions(base) != before
                if self.lost:
                    return None  # the others wait in the collectives that follow; all ranks end after them
                partial_step.free_memory()

        base.step = step


def _versions(optimizer: Any) -> list[int]:
    """How often each tensor of an optimizer that exists has been written in place: a broken update is repeated only if
    it wrote none.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]
    return [tensor._version for tensor in (*parameters, *states)]


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
