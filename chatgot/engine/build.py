"""From a JSON and a plain PyTorch model to a DeepSpeedEngine, and the optimizer step on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist

from chatgot.deepspeed_json.engine_config import EngineConfig
from chatgot.engine import activation_checkpointing, guards, numerics
from chatgot.engine.optimizer import (
    base_learning_rates,
    build_client_optimizer,
    is_muon,
    parameter_groups,
    weight_decay,
)
from chatgot.engine.out_of_memory import MemoryGuard
from chatgot.errors import ConfigError, NumericsError
from chatgot.model.gpt import GPT


@dataclass
class TrainingEngine:
    """The DeepSpeedEngine with what has to happen around its step. The engine owns steps, optimizer and precision: ask
    `.engine`.
    """

    engine: Any
    """The DeepSpeedEngine; untyped, because torch's Module answers any attribute."""
    config: EngineConfig
    base_lrs: list[float]
    memory: MemoryGuard
    notes: list[str] = field(default_factory=list)
    stage0: guards.Stage0Gradients | None = None
    norms: numerics.LayerNorms | None = None
    skips_in_a_row: int = 0
    """Steps that were skipped, not counting those with which dynamic loss scaling looks for its scale; the guard ends a
    run by it.
    """
    before_step: Callable[[], None] | None = None
    """Called when the gradients of all micro batches are reduced and the optimizer has not stepped yet."""

    def train_step(self, micro_batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """Forward and backward of every micro batch, and the optimizer step at the last one.

        Args:
            micro_batches: as many (input_ids, targets), each (B, T), as there are accumulation steps.

        Returns:
            This rank's mean loss over the micro batches in nats per token, undivided by accumulation; a scalar,
            detached, on the device.

        Raises:
            RanOut: on all ranks, if one ran out of memory; the step has left no trace but in the random state.
            NumericsError: fp16's loss scale is at its minimum.
        """
        engine = self.engine
        losses = []
        if self.norms is not None:
            self.norms.found = None
        for input_ids, targets in micro_batches:
            losses.append(self.memory.micro_step(input_ids, targets))
            if engine.is_gradient_accumulation_boundary():
                self.memory.agree()
                if self.stage0 is not None:
                    self.stage0.before_step()
                if self.before_step is not None:
                    self.before_step()
            try:
                engine.step()
            except Exception as error:
                if "Current loss scale already at minimum" not in str(error):
                    raise
                raise NumericsError(
                    f"step {engine.global_steps}: the gradients overflow at the smallest loss scale {self.loss_scale}; "
                    "try bf16, a lower lr, or a lower fp16.min_loss_scale"
                ) from error
        self._watch_skips()
        return torch.stack(losses).mean()

    @property
    def searches_scale(self) -> bool:
        """Whether an overflow now only lowers fp16's dynamic loss scale; DeepSpeed ends that search at the minimum."""
        scale, fp16 = self.loss_scale, self.config.deepspeed.get("fp16", {})
        static = self.config.precision == "fp16" and fp16.get("loss_scale", 0) != 0
        return scale is not None and not static and scale > fp16.get("min_loss_scale", 1)

    def _watch_skips(self) -> None:
        if self.engine.was_step_applied():
            self.skips_in_a_row = 0
        elif not self.searches_scale:
            self.skips_in_a_row += 1

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
    def raw_grad_norm(self) -> torch.Tensor | float | None:
        """The same as DeepSpeed has it: at some stages a scalar on the device, which float() would wait for."""
        return self.engine.get_global_grad_norm()

    @property
    def loss_scale(self) -> float | None:
        """fp16's loss scale; None in other precisions."""
        if self.config.precision not in ("fp16", "autocast_fp16"):
            return None
        scaler = getattr(self.engine, "torch_autocast_z0_gradscaler", None) or getattr(
            self.engine.optimizer, "torch_autocast_gradscaler", None
        )
        if scaler is not None:
            return float(scaler.get_scale())
        return float(self.engine.optimizer.loss_scale)


def build(model: GPT, config: EngineConfig, device: torch.device) -> TrainingEngine:
    """Wrap `model` in a DeepSpeedEngine. The process group must exist.

    Raises:
        ConfigError: the JSON's optimizer section is missing, or its parameters do not fit the optimizer.
    """
    import deepspeed

    if config.optimizer is None:
        raise ConfigError(f"{config.path}: optimizer: missing; without it there is nothing to train with")
    notes = [activation_checkpointing.wire(model, config)]
    groups = parameter_groups(model, weight_decay(config))
    optimizer, note = build_client_optimizer(config, groups)
    notes.append(note)
    given = dict(config.deepspeed)
    if optimizer is not None:
        given = {key: value for key, value in given.items() if key != "optimizer"}
        if config.offload_optimizer != "none" and given.get("zero_force_ds_cpu_optimizer", True):
            given["zero_force_ds_cpu_optimizer"] = False
            notes.append(
                "zero_force_ds_cpu_optimizer = false: torch's fused AdamW steps on the CPU as DeepSpeed's CPUAdam would"
            )
    if is_muon(config):
        notes.extend(_prepare_muon(given, device))
    guards.quiet_memory_report(config.deepspeed)
    guards.forget_autocast()
    try:
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            model_parameters=None
            if optimizer is not None
            else cast(Any, groups),  # annotated as a Module, takes groups
            config=given,
            dist_init_required=False,
        )
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f"{config.path}: DeepSpeed refuses it: {error}") from error
    if config.chatgot.compile.enabled:
        engine.compile(compile_kwargs={"mode": config.chatgot.compile.mode})
        notes.append(f"torch.compile: on (mode {config.chatgot.compile.mode}); the first steps take longer")
    memory = MemoryGuard(engine, device)
    stage0 = guards.install(engine, is_muon(config))
    found = TrainingEngine(engine, config, base_learning_rates(engine.optimizer), memory, notes, stage0)
    found.norms = numerics.LayerNorms(engine, stage0, wanted=lambda: not found.searches_scale)
    return found


def _prepare_muon(given: dict[str, Any], device: torch.device) -> list[str]:
    """Spare Muon the compilers: its Adam half becomes torch's, and on a CPU its Newton-Schulz iteration runs in eager
    PyTorch.
    """
    notes = []
    params = given["optimizer"].get("params") or {}
    if "torch_adam" not in params:
        given["optimizer"] = {**given["optimizer"], "params": {**params, "torch_adam": True}}
        notes.append(
            "optimizer.params.torch_adam = true: Muon's Adam half is torch's; DeepSpeed's is the same update, but "
            "needs a compiler"
        )
    if device.type == "cpu":
        guards.run_muon_uncompiled()
        notes.append("Muon: not compiled on a CPU, where compiling takes longer than it saves")
    return notes


def mean_over_ranks(value: torch.Tensor) -> float:
    """Mean of a scalar over all ranks, in fp64 on the CPU side. Collective."""
    value = value.detach().clone().to(torch.float32)
    if dist.get_world_size() > 1:
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return float(value)
