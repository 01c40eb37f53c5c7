"""One optimizer step on a DeepSpeedEngine: forward and backward of every micro-batch, the update, and steps that are
skipped because they are not finite.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from chatgot.deepspeed_json.batch import ACCUMULATION, MICRO
from chatgot.deepspeed_json.resolve import EngineConfig
from chatgot.engine import guards, zero_view
from chatgot.engine.optimizer import is_muon
from chatgot.errors import NumericsError


class TrainingEngine:
    """A DeepSpeedEngine with what has to happen around its step. It owns steps, optimizer, precision and micro-batch."""

    def __init__(self, engine: Any, config: EngineConfig, device: torch.device, notes: Sequence[str] = ()) -> None:
        self.engine = engine
        """The DeepSpeedEngine; untyped, because torch's Module answers any attribute."""
        self.config = config
        self.notes = list(notes)
        self.base_lrs = [float(group["lr"]) for group in engine.optimizer.param_groups]
        """The JSON's learning rate of every parameter group, before any schedule."""
        self.skips_in_a_row = 0
        """Skipped steps, not counting those with which dynamic loss scaling looks for its scale."""
        self.layer_grad_norms: dict[str, float] | None = None
        """Of the last step, if it was skipped: {'embed_tokens': ..., 'layers.0': ..., ...}, averaged over ranks,
        unclipped and without a loss scale."""
        self.before_step: Callable[[], None] | None = None
        """Called when the gradients of all micro-batches are reduced and the optimizer has not stepped yet."""
        self._device = device
        self._stage0 = guards.install(engine, is_muon(config), on_overflow=self._keep_layer_norms)

    def train_step(self, micro_batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """Forward and backward of every micro-batch, and the optimizer step after the last one.

        Args:
            micro_batches: as many (input_ids, targets), each (B, T), as there are accumulation steps.

        Returns:
            This rank's mean loss in nats per token, undivided by accumulation; a detached scalar on the device.

        Raises:
            NumericsError: fp16's loss scale is at its minimum.
        """
        self.layer_grad_norms = None
        losses = []
        for input_ids, targets in micro_batches:
            losses.append(self._forward_backward(input_ids, targets))
            if self.engine.is_gradient_accumulation_boundary():
                if self._stage0 is not None:
                    self._stage0.before_step()
                if self.before_step is not None:
                    self.before_step()
            self._step()
        if self.engine.was_step_applied():
            self.skips_in_a_row = 0
        elif not self.searches_scale:
            self.skips_in_a_row += 1
        return torch.stack(losses).mean()

    def _forward_backward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        """Add the gradients of one micro-batch (B, T) to the step's; its loss, detached."""
        input_ids = input_ids.to(self._device, non_blocking=True)
        loss = self.engine(input_ids, targets.to(self._device, non_blocking=True))
        self.engine.backward(poisoned_by(loss))
        return loss.detach()

    def _step(self) -> None:
        """DeepSpeed's step: counts the micro-batch, and updates the weights after the last one."""
        try:
            self.engine.step()
        except Exception as error:
            if "Current loss scale already at minimum" not in str(error):
                raise
            raise NumericsError(
                f"step {self.engine.global_steps}: the gradients overflow at the smallest loss scale "
                f"{self.loss_scale}; try bf16, a lower lr, or a lower fp16.min_loss_scale"
            ) from error

    def _keep_layer_norms(self) -> None:
        """The gradients are not finite and about to be dropped. Collective, once a step: DeepSpeed drops some twice."""
        if self.layer_grad_norms is None and not self.searches_scale:
            self.layer_grad_norms = zero_view.layer_grad_norms(self.engine)

    def set_micro_batch(self, micro_batch: int) -> None:
        """Between two steps: another micro-batch, and the accumulation that goes with it for the same global batch.

        DeepSpeed's own setters change its config only; its optimizers keep the accumulation, and the boundary is
        counted in micro steps since the start of the process.
        """
        engine, total = self.engine, self.config.train_batch_size
        engine.set_train_micro_batch_size(micro_batch)
        engine.set_train_batch_size(total)
        accumulation = engine.gradient_accumulation_steps()
        if hasattr(engine.optimizer, "gradient_accumulation_steps"):
            engine.optimizer.gradient_accumulation_steps = accumulation
        engine.micro_steps = 0
        given = {**self.config.deepspeed, MICRO: micro_batch, ACCUMULATION: accumulation}
        numbers = {"micro_batch_size": micro_batch, "accumulation": accumulation}
        self.config = dataclasses.replace(self.config, deepspeed=given, **numbers)

    def set_learning_rate(self, factor: float) -> None:
        """Learning rate of the coming step: the JSON's, of each group, times `factor`."""
        for group, base in zip(self.engine.optimizer.param_groups, self.base_lrs):
            group["lr"] = base * factor

    @property
    def learning_rate(self) -> float:
        """Learning rate in force of the first parameter group."""
        return float(self.engine.optimizer.param_groups[0]["lr"])

    @property
    def grad_norm(self) -> float | None:
        """Global norm of the last step's gradients before clipping; inf after a skipped step."""
        norm = self.raw_grad_norm
        return None if norm is None else float(norm)

    @property
    def raw_grad_norm(self) -> Tensor | float | None:
        """The same as DeepSpeed has it: at some stages a scalar on the device, which float() would wait for."""
        return self.engine.get_global_grad_norm()

    @property
    def loss_scale(self) -> float | None:
        """fp16's loss scale; None in other precisions."""
        return zero_view.loss_scale(self.engine) if self.config.precision.endswith("fp16") else None

    @property
    def searches_scale(self) -> bool:
        """Whether an overflow now only lowers fp16's dynamic loss scale; DeepSpeed ends that search at the minimum."""
        scale, fp16 = self.loss_scale, self.config.deepspeed.get("fp16", {})
        static = self.config.precision == "fp16" and fp16.get("loss_scale", 0) != 0
        return scale is not None and not static and scale > fp16.get("min_loss_scale", 1)


def poisoned_by(loss: Tensor) -> Tensor:
    """`loss`, bit for bit, but with gradients that are NaN where it is not finite.

    A loss can be lost while its gradients are finite (a NaN constant in it). DeepSpeed looks at gradients only, so they
    are made to tell: every rank then skips the step through the check that it has anyway, before weights are touched.
    """
    return loss * (1.0 + 0.0 * loss.detach())


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """What DeepSpeed's engine opens around a forward under torch_autocast; without effect in other precisions."""
    dtype = {"autocast_bf16": torch.bfloat16, "autocast_fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def mean_over_ranks(value: Tensor) -> float:
    """Mean of a scalar over all ranks, in fp32. Collective."""
    value = value.detach().clone().to(torch.float32)
    if dist.get_world_size() > 1:
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return float(value)


@dataclass(frozen=True)
class Diagnosis:
    """One rank's share of a skipped batch, computed again without dropout."""

    losses: list[float]
    """Of this rank's samples in order, nats per token."""
    gradients_finite: bool
    """Whether this rank's own gradients, not averaged with the others', are."""


def diagnose(training_engine: TrainingEngine, micro_batches: Iterable[tuple[Tensor, Tensor]]) -> Diagnosis:
    """Compute a skipped step's batch again, sample by sample and rank by rank: averaged gradients do not tell whose
    they were. Weights, counters and random state stay. Collective.

    The engine's own backward would count and reduce, so gradients are asked of torch directly; parameters' .grad stay
    as they are. Each gradient is looked at as it comes and given up at once: at ZeRO 2-3 there is no room for all.
    """
    module = training_engine.engine.module
    losses: list[float] = []
    finite: list[Tensor] = []

    def look(gradient: Tensor) -> Tensor:
        finite.append(torch.isfinite(gradient).all())
        return gradient.new_zeros(()).expand_as(gradient)  # takes no memory

    parameters = [p for p in module.parameters() if p.requires_grad]
    hooks = [parameter.register_hook(look) for parameter in parameters]
    was_training = module.training
    module.eval()
    try:
        for input_ids, targets in micro_batches:
            with autocast(training_engine.config.precision, input_ids.device):
                by_token = module(input_ids, targets, reduction="none")  # (B, T)
            losses += by_token.detach().mean(dim=1).tolist()
            torch.autograd.grad(by_token.mean(), parameters, allow_unused=True)
    finally:
        module.train(was_training)
        for hook in hooks:
            hook.remove()
    return Diagnosis(losses, all(map(bool, finite)))
