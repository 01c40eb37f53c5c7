"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from chatgot.deepspeed_json.chatgot_section import ScheduleConfig


def factor(step: int, max_steps: int, config: ScheduleConfig) -> float:
    """What the JSON's lr is multiplied with in optimizer step `step` (0 is the first one).

    Warm-up rises linearly and never has a step at rate 0: step 0 already has 1 / warmup_steps (DeepSpeed's own
    schedulers spend two steps at 0). The last step of all has min_lr_ratio; steps beyond max_steps keep it.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.type == "constant":
        return 1.0
    if config.type == "wsd":  # warm-up, stable, decay (MiniCPM, arXiv:2404.06395)
        start = max(config.warmup_steps, round(max_steps * (1 - config.decay_fraction)))
    else:
        start = config.warmup_steps
    progress = min(1.0, max(0.0, (step - start) / max(1, max_steps - 1 - start)))
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if config.type == "cosine" else 1 - progress
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape


def describe(max_steps: int, config: ScheduleConfig, lr: float) -> str:
    """One line for the log: the rate at the start, its peak and its end."""
    first, last = lr * factor(0, max_steps, config), lr * factor(max_steps - 1, max_steps, config)
    peak = lr * max(factor(s, max_steps, config) for s in (0, min(config.warmup_steps, max_steps - 1)))
    return f"learning rate: {config.type}, {first:.3g} -> {peak:.3g} over {config.warmup_steps} steps -> {last:.3g} at step {max_steps}"
