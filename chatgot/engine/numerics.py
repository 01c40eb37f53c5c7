"""What a step that is not finite leaves behind: gradient norms by layer, losses by sample, and the rank it came
from.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from chatgot.engine.guards import Stage0Gradients


def poisoned_by(loss: torch.Tensor) -> torch.Tensor:
    """`loss`, bit for bit, but with gradients that are NaN where it is not finite.

    A loss can be lost while its gradients are finite (a NaN constant in it). DeepSpeed looks at gradients only, so they
    are made to tell: every rank then skips the step through the check that it has anyway, before weights are touched.
    """
    return loss * (1.0 + 0.0 * loss.detach())


class LayerNorms:
    """Norms of the gradients, by layer, of a step that is being skipped: taken between DeepSpeed's overflow check and
    its clearing of them.

    They are those of the averaged gradients, all ranks together, and cost a good step nothing. At stage 0 the guard
    calls `take`; ZeRO 1-3 call _update_scale(overflow) there (stage_1_and_2.py and stage3.py, step), the BF16_Optimizer
    clear_hp_grads (bf16_optimizer.py, step). All ranks agree on the overflow by then, which `take` needs: at ZeRO it
    assembles one parameter's gradient after the other.
    """

    def __init__(self, engine: Any, stage0: Stage0Gradients | None, wanted: Callable[[], bool]) -> None:
        """
        Args:
            wanted: asked on all ranks whether this skip is worth the assembling.
        """
        self.found: dict[str, float] | None = None
        """Of the last step, if it was skipped: {'embed_tokens': ..., 'layers.0': ..., ...}, unclipped and without a
        loss scale.
        """
        self._engine, self._wanted = engine, wanted
        optimizer = engine.optimizer
        if stage0 is not None:
            stage0.on_overflow = self.take
        elif hasattr(optimizer, "_update_scale"):
            update = optimizer._update_scale

            def update_scale(has_overflow: bool = False) -> None:
                if has_overflow:
                    self.take()
                update(has_overflow)

            optimizer._update_scale = update_scale
        else:
            clear = optimizer.clear_hp_grads

            def clear_hp_grads(*args: Any, **kwargs: Any) -> None:
                if optimizer.overflow:
                    self.take()
                clear(*args, **kwargs)

            optimizer.clear_hp_grads = clear_hp_grads

    def take(self) -> None:
        """Once a step; DeepSpeed clears some gradients twice. Collective."""
        if self.found is not None or not self._wanted():
            return
        from deepspeed.utils import safe_get_full_grad

        zero = self._engine.zero_optimization()
        scale = (
            float(getattr(self._engine.optimizer, "loss_scale", 1.0)) if zero and self._engine.fp16_enabled() else 1.0
        )
        squares: dict[str, float] = {}
        for name, parameter in self._engine.module.named_parameters():
            gradient = safe_get_full_grad(parameter) if zero else parameter.grad
            if gradient is None:
                continue
            first, _, rest = name.partition(".")
            layer = f"{first}.{rest.partition('.')[0]}" if first == "layers" else first
            norm = float(torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32)) / scale
            squares[layer] = squares.get(layer, 0.0) + norm * norm
        self.found = {layer: math.sqrt(square) if square >= 0 else math.nan for layer, square in squares.items()}


@dataclass(frozen=True)
class Diagnosis:
    """One rank's share of a skipped batch, computed again without dropout; weights, counters and random state are
    untouched.
    """

    losses: list[float]
    """Of this rank's samples in order, nats per token."""
    gradients_finite: bool
    """Whether this rank's own gradients, not averaged with the others', are."""


def diagnose(training_engine: Any, micro_batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Diagnosis:
    """Compute a skipped step's batch again, sample by sample and rank by rank: averaged gradients do not tell whose
    they were. Collective.

    The engine's own backward would count and reduce, so gradients are asked of torch directly; parameters' .grad stay
    as they are. Each gradient is looked at as it comes and given up at once: at ZeRO 2-3 there is no room for all of
    them.
    """
    engine = training_engine.engine
    losses: list[float] = []
    finite: list[torch.Tensor] = []

    def look(gradient: torch.Tensor) -> torch.Tensor:
        finite.append(torch.isfinite(gradient).all())
        return gradient.new_zeros(()).expand_as(gradient)  # takes no memory

    dtypes = {"autocast_bf16": torch.bfloat16, "autocast_fp16": torch.float16}
    dtype = dtypes.get(training_engine.config.precision)
    parameters = [p for p in engine.module.parameters() if p.requires_grad]
    hooks = [parameter.register_hook(look) for parameter in parameters]
    was_training = engine.module.training
    engine.module.eval()
    try:
        for input_ids, targets in micro_batches:
            with torch.autocast(input_ids.device.type, dtype=dtype) if dtype is not None else contextlib.nullcontext():
                by_token = engine.module(input_ids, targets, reduction="none")  # (B, T)
            losses += by_token.detach().mean(dim=1).tolist()
            torch.autograd.grad(by_token.mean(), parameters, allow_unused=True)
    finally:
        engine.module.train(was_training)
        for hook in hooks:
            hook.remove()
    return Diagnosis(losses, all(map(bool, finite)))
