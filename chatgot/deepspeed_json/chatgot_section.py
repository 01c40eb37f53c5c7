"""The JSON's extra top-level section, "chatgot": what DeepSpeed lacks. It is removed before DeepSpeed sees the
configuration.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from chatgot.deepspeed_json.fields import ranged


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning-rate schedule: a pure function of the optimizer step over train.max_steps, multiplying the JSON's lr."""

    type: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """cosine, linear: from the peak down to min_lr_ratio; wsd: stays at the peak, falls over the last decay_fraction;
    constant: stays.
    """
    warmup_steps: int = ranged(100, low=0)
    """Steps over which the rate rises linearly to its peak; the first step already has lr / warmup_steps."""
    min_lr_ratio: float = ranged(0.1, low=0.0, high=1.0)
    """Last learning rate over the peak."""
    decay_fraction: float = ranged(0.2, above=0.0, high=1.0)
    """Share of max_steps that wsd decays over (wsd only)."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and what to keep."""

    every_steps: int | None = ranged(100, low=1)
    """Optimizer steps between saves; null: not by steps."""
    every_minutes: float | None = ranged(2.0, above=0.0)
    """Minutes between saves (rank 0's clock); null: not by time."""
    keep_last: int = ranged(3, low=2)
    """Newest checkpoints kept; at least 2, because the newest one may be the broken one."""
    keep_best: int = ranged(1, low=0)
    """Checkpoints with the lowest val/loss that are kept besides."""
    keep_every_steps: int | None = ranged(None, low=1)
    """Checkpoints whose step is a multiple of this are kept for ever; null: none."""
    disk_budget_gb: float | None = ranged(None, above=0.0)
    """GB (of 1e9 bytes) that the checkpoints folder may hold, the checkpoint being written included; it comes before
    the keep_ rules.
    null: no limit."""
    async_: bool = False
    """Write while training goes on, from a copy in CPU memory, which every rank keeps; the key in the JSON is
    "async".
    """


@dataclass(frozen=True)
class ActivationCheckpointingConfig:
    """Refines the DeepSpeed section activation_checkpointing, whose presence turns recomputation on."""

    backend: Literal["auto", "torch", "deepspeed"] = "auto"
    """torch: torch.utils.checkpoint (non-reentrant); deepspeed: deepspeed.checkpointing; auto: torch, unless only
    DeepSpeed can do it.
    """
    every_n_layers: int = ranged(1, low=1)
    """Recompute every n-th block (1: all of them)."""


@dataclass(frozen=True)
class GuardConfig:
    """When a run has diverged, and what happens then."""

    max_consecutive_skips: int = ranged(5, low=1)
    """Optimizer steps in a row that may be skipped for a non-finite loss or gradient before the run has diverged."""
    spike_zscore: float | None = ranged(None, above=0.0)
    """The run has diverged when a step's loss lies this many standard deviations above the mean of the 50 steps before
    it; null: never.
    """
    on_diverge: Literal["stop", "rollback"] = "stop"
    """stop: end with exit 5, naming the last good checkpoint; rollback: go back to it, leave out the data since, go
    on.
    """
    max_rollbacks: int = ranged(3, low=0)
    """Rollbacks of a run, resumes included; the next divergence stops it."""


@dataclass(frozen=True)
class CompileConfig:
    """torch.compile through engine.compile()."""

    enabled: bool = False
    """Compile the model; the first step then takes longer."""
    mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"
    """torch.compile's mode."""


@dataclass(frozen=True)
class ChatGoTSection:
    """The whole "chatgot" section."""

    schedule: ScheduleConfig | None = None
    """null: the lr stays constant, or follows a stock `scheduler` section."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    activation_checkpointing: ActivationCheckpointingConfig = field(default_factory=ActivationCheckpointingConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
