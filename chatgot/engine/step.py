"""One optimizer step on a DeepSpeedEngine: forward and backward of every micro-batch, and the update or its skip."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from chatgot.deepspeed_json.resolve import EngineConfig
from chatgot.engine import guards, zero_view
from chatgot.engine.optimizer import is_muon
from chatgot.errors import NumericsError


class TrainingEngine:
    """A DeepSpeedEngine and what happens around its step. It owns steps, optimizer, precision and micro-batch."""

    def __init__(self, engine: Any, config: EngineConfig, device: torch.device, notes: Sequence[str] = ()) -> None:
        self.engine = engine
        """The DeepSpeedEngine; untyped, because torch's Module answers any attribute."""
        self.config = config
        self.notes = list(notes)
        self.base_lrs = [float(group["lr"]) for group in engine.optimizer.param_groups]
        """The JSON's learning rate of every parameter group, before any schedule."""
        scheduler, keys = engine.lr_scheduler, ("lr", "initial_lr", "betas", "momentum")
        groups = [{key: group[key] for key in keys if key in group} for group in engine.optimizer.param_groups]
        self._scheduler_start = copy.deepcopy((scheduler.state_dict(), groups)) if scheduler is not None else None
        self.skips_in_a_row = 0
        """Skipped steps, not counting those with which dynamic loss scaling looks for its scale."""
        self.step_rate = 0.0
        """Learning rate of the first parameter group in the last step. A stock scheduler has moved on since."""
        self.layer_grad_norms: dict[str, float] | None = None
        """Of the last step, if it was skipped: {'embed_tokens': ..., 'layers.0': ..., ...}, averaged over ranks,
        unclipped and without a loss scale."""
        self.device = device
        guards.refuse_overwritten_gradients(config, device)
        self._stage0 = guards.install(engine, is_muon(config), on_overflow=self._keep_layer_norms)

    def train_step(
        self, micro_batches: Iterable[tuple[Tensor, Tensor]], before_update: Callable[[], None] | None = None
    ) -> Tensor:
        """Forward and backward of every micro-batch, and the optimizer step after the last one.

        Args:
            micro_batches: as many (input_ids, targets), each (B, T), as there are accumulation steps.
            before_update: called when all gradients are reduced and the optimizer has not stepped yet.

        Returns:
            This rank's mean loss in nats per token, undivided by accumulation; a detached scalar on the device.

        Raises:
            NumericsError: fp16's loss scale is at its minimum.
        """
        self.layer_grad_norms, self.step_rate = None, self.learning_rate
        losses = []
        for input_ids, targets in micro_batches:
            losses.append(self._forward_backward(input_ids, targets))
            if self.engine.is_gradient_accumulation_boundary():
                if self._stage0 is not None:
                    self._stage0.before_step()
                if before_update is not None:
                    before_update()
            self._step()
        if self.engine.was_step_applied():
            self.skips_in_a_row = 0
        elif not self.searches_scale:
            self.skips_in_a_row += 1
        return torch.stack(losses).mean()

    def _forward_backward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        """Add the gradients of one micro-batch (B, T) to the step's; its loss, detached."""
        input_ids = input_ids.to(self.device, non_blocking=True)
        loss = self.engine(input_ids, targets.to(self.device, non_blocking=True))
        self.engine.backward(poisoned_by(loss))
        return loss.detach().clone()  # a CUDA graph (chatgot.compile.mode) writes its next loss to the same place

    def _step(self) -> None:
        """DeepSpeed's step: counts the micro-batch, and updates the weights after the last one."""
        try:
            self.engine.step()
        except Exception as error:  # DeepSpeed raises a bare one (fp16/loss_scaler.py); all others go on
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
        self.config = self.config.with_micro_batch(micro_batch, engine.dp_world_size)
        guards.refuse_overwritten_gradients(self.config, self.device)
        engine.set_train_micro_batch_size(micro_batch)
        engine.set_train_batch_size(total)
        accumulation = engine.gradient_accumulation_steps()
        if hasattr(engine.optimizer, "gradient_accumulation_steps"):
            engine.optimizer.gradient_accumulation_steps = accumulation
        engine.micro_steps = 0

    def set_learning_rate(self, factor: float) -> None:
        """Learning rate of the coming step: the JSON's, of each group, times `factor`."""
        for group, base in zip(self.engine.optimizer.param_groups, self.base_lrs):
            group["lr"] = base * factor

    def restart_scheduler(self) -> None:
        """Put a stock scheduler back to its beginning, from where a resume brings it to the checkpoint's step."""
        if self._scheduler_start is not None:
            state, groups = copy.deepcopy(self._scheduler_start)
            self.engine.lr_scheduler.load_state_dict(state)
            for group, start in zip(self.engine.optimizer.param_groups, groups):
                group.update(start)

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


def mean_over_ranks(value: Tensor) -> float:
    """Mean of a scalar over all ranks, in fp32. Collective."""
    value = value.detach().clone().to(torch.float32)
    if dist.get_world_size() > 1:
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return float(value)
