"""The JSON's extra top-level section, "chatgot": what DeepSpeed lacks. DeepSpeed never sees it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from chatgot.deepspeed_json.fields import Number, Settings, Texts, Whole


class ScheduleConfig(Settings):
    """Learning-rate schedule: a pure function of the optimizer step over train.max_steps, multiplying the JSON's lr."""

    type: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """cosine, linear: from the peak down to min_lr_ratio; wsd: stays at the peak, falls over the last decay_fraction;
    constant: stays.
    """
    warmup_steps: Whole = Field(default=100, ge=0)
    """Steps over which the rate rises linearly to its peak; the first step already has lr / warmup_steps."""
    min_lr_ratio: Number = Field(default=0.1, ge=0.0, le=1.0)
    """Last learning rate over the peak."""
    decay_fraction: Number = Field(default=0.2, gt=0.0, le=1.0)
    """Share of max_steps that wsd decays over (wsd only)."""


class CheckpointConfig(Settings):
    """When to save, and what to keep."""

    every_steps: Whole | None = Field(default=100, ge=1)
    """Optimizer steps between saves; null: not by steps."""
    every_minutes: Number | None = Field(default=2.0, gt=0.0)
    """Minutes between saves (rank 0's clock); null: not by time."""
    keep_last: Whole = Field(default=3, ge=2)
    """Newest checkpoints kept; at least 2, because the newest one may be the broken one."""
    keep_best: Whole = Field(default=1, ge=0)
    """Checkpoints with the lowest val/loss that are kept besides."""
    keep_every_steps: Whole | None = Field(default=None, ge=1)
    """Checkpoints whose step is a multiple of this are kept for ever; null: none."""
    disk_budget_gb: Number | None = Field(default=None, gt=0.0)
    """GB (of 1e9 bytes) that the checkpoints folder may hold, the one being written included; before the keep_ rules.
    null: no limit.
    """
    async_: bool = Field(default=False, alias="async")
    """Write while training goes on, from a copy in CPU memory, which every rank keeps."""


class ActivationCheckpointingConfig(Settings):
    """Refines the DeepSpeed section activation_checkpointing, whose presence turns recomputation on."""

    backend: Literal["auto", "torch", "deepspeed"] = "auto"
    """torch: torch.utils.checkpoint (non-reentrant); deepspeed: its own; auto: torch, unless only DeepSpeed can."""
    every_n_layers: Whole = Field(default=1, ge=1)
    """Recompute every n-th block (1: all of them)."""


class GuardConfig(Settings):
    """When a run has diverged, and what happens then."""

    max_consecutive_skips: Whole = Field(default=5, ge=1)
    """Optimizer steps in a row that may be skipped for a non-finite loss or gradient before the run has diverged."""
    spike_zscore: Number | None = Field(default=None, gt=0.0)
    """The run has diverged when a step's loss lies this many standard deviations above the mean of the 50 steps before
    it; null: never.
    """
    spike_min_rise: Number = Field(default=0.5, ge=0.0)
    """Nats by which that loss must lie above the mean besides: where losses hardly vary, little is many deviations."""
    on_diverge: Literal["stop", "rollback"] = "stop"
    """stop: end with exit 5, naming the last good checkpoint; rollback: go back to it, leave out the data since, go
    on.
    """
    max_rollbacks: Whole = Field(default=3, ge=0)
    """Rollbacks of a run, resumes included; the next divergence stops it."""


class CompileConfig(Settings):
    """torch.compile through engine.compile()."""

    enabled: bool = False
    """Compile the model; the first step then takes longer."""
    mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"
    """torch.compile's mode."""


class WandbSettings(Settings):
    """What wandb is told beyond the JSON's own `wandb` section."""

    tags: Texts = ()
    """Tags of the run."""
    artifacts: Literal["none", "report", "checkpoint", "both"] = "none"
    """What is uploaded when the run is complete: report.html, the newest checkpoint, or both."""


class ChatGoTSection(Settings):
    """The whole "chatgot" section."""

    schedule: ScheduleConfig | None = None
    """null: the lr stays constant, or follows a stock `scheduler` section."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    activation_checkpointing: ActivationCheckpointingConfig = ActivationCheckpointingConfig()
    guard: GuardConfig = GuardConfig()
    compile: CompileConfig = CompileConfig()
    wandb: WandbSettings = WandbSettings()
