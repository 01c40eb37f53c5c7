"""Parameter groups, the optimizer that the JSON's `optimizer` section names, and the learning rate of every step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from chatgot.deepspeed_json.resolve import EngineConfig, OptimizerConfig
from chatgot.deepspeed_json.settings import ScheduleConfig
from chatgot.errors import ConfigError

ONLY_DEEPSPEED = ("bias_correction", "fp32_optimizer_states")
"""Arguments of DeepSpeed's Adam whose value false torch's does not know."""


def parameter_groups(model: nn.Module, weight_decay: float, in_one: bool = False) -> list[dict[str, Any]]:
    """Split in two groups (GPT-2): matrices and embeddings decay; biases and norm gains, of one dimension, do not.

    Args:
        in_one: all in one group, which decays.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if in_one:
        return [{"params": trained, "weight_decay": weight_decay}]
    decay, no_decay = [p for p in trained if p.dim() >= 2], [p for p in trained if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def is_muon(config: EngineConfig) -> bool:
    """Whether the JSON asks for DeepSpeed's Muon."""
    return config.optimizer is not None and config.optimizer.type.lower() == "muon"


def state_kind(config: EngineConfig) -> str:
    """What decides which state an optimizer keeps: those of one kind can go on from each other's checkpoints."""
    if config.optimizer is None:
        return "none"
    if not _is_adam(config.optimizer):
        return config.optimizer.type.lower()
    return "adam with amsgrad" if config.optimizer.params.get("amsgrad") else "adam"


def weight_decay(config: EngineConfig) -> float:
    """The optimizer section's, else the default of what DeepSpeed would build: 0.01 for torch's AdamW, 0 for others."""
    assert config.optimizer is not None
    params = config.optimizer.params
    torchs = _is_adam(config.optimizer) and bool(params.get("torch_adam")) and _decoupled(config.optimizer)
    return float(params.get("weight_decay", 0.01 if torchs else 0.0))


def build_client_optimizer(
    config: EngineConfig, groups: list[dict[str, Any]]
) -> tuple[torch.optim.Optimizer | None, str]:
    """torch's fused AdamW for the Adam family; None for what DeepSpeed builds itself from the JSON.

    DeepSpeed's FusedAdam and CPUAdam compute the same update but are compiled at the first start, with nvcc or g++.
    `"torch_adam": false` in the JSON asks for them explicitly and gets them; so does false for an argument that only
    they have, and so do the keys with which DeepSpeed takes nothing but its CPUAdam.

    Returns:
        The optimizer or None, and one line that says what was chosen and why.

    Raises:
        ConfigError: torch refuses the parameters.
    """
    assert config.optimizer is not None
    params = dict(config.optimizer.params)
    asked = any(params.get(key) is False for key in ONLY_DEEPSPEED) and not params.get("torch_adam")
    if not _is_adam(config.optimizer) or asked or params.get("torch_adam") is False:
        return None, f"optimizer: {config.optimizer.type}, built by DeepSpeed from the JSON"
    if key := config.cpu_adam_key:
        return None, f"optimizer: DeepSpeed's CPUAdam, for {key}; compiled at the first start, which takes minutes"
    for theirs in ("torch_adam", "adam_w_mode", "set_grad_none", *ONLY_DEEPSPEED):
        params.pop(theirs, None)
    if "foreach" not in params:
        params.setdefault("fused", True)
    if "betas" in params:
        params["betas"] = tuple(params["betas"])
    kind = torch.optim.AdamW if _decoupled(config.optimizer) else torch.optim.Adam
    try:
        optimizer = kind(groups, **params)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{config.path}: optimizer.params = {config.optimizer.params}: {error}") from error
    what = f"torch.optim.{kind.__name__} ({'fused' if params.get('fused') else 'not fused'})"
    return optimizer, f"optimizer: {what}, the same update as DeepSpeed's, which needs a compiler at start"


def _is_adam(optimizer: OptimizerConfig) -> bool:
    return optimizer.type.lower() in ("adam", "adamw")


def _decoupled(optimizer: OptimizerConfig) -> bool:
    """DeepSpeed: "Adam" means AdamW unless adam_w_mode is false (engine.py, _configure_basic_optimizer)."""
    return optimizer.type.lower() == "adamw" or bool(optimizer.params.get("adam_w_mode", True))


def schedule_factor(step: int, max_steps: int, config: ScheduleConfig) -> float:
    """What the JSON's lr is multiplied with in optimizer step `step` (0 is the first one): a pure function of the step.

    Warm-up rises linearly and never has a step at rate 0: step 0 already has 1 / warmup_steps (DeepSpeed's own
    schedulers spend two steps at 0). The last step of all has min_lr_ratio; steps beyond max_steps keep it.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.type == "constant":
        return 1.0
    start = config.warmup_steps
    if config.type == "wsd":  # warm-up, stable, decay (MiniCPM, arXiv:2404.06395)
        start = max(start, round(max_steps * (1 - config.decay_fraction)))
    progress = min(1.0, max(0.0, (step - start) / max(1, max_steps - 1 - start)))
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if config.type == "cosine" else 1 - progress
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape


def describe_schedule(max_steps: int, config: ScheduleConfig, lr: float) -> str:
    """One line for the log: the rate at the start, its peak and its end."""
    warm, end = min(config.warmup_steps, max_steps - 1), max_steps - 1
    first, warmed, last = (lr * schedule_factor(step, max_steps, config) for step in (0, warm, end))
    rates = (
        f"{first:.3g} -> {max(first, warmed):.3g} over {config.warmup_steps} steps -> {last:.3g} at step {max_steps}"
    )
    return f"{config.type}, {rates}"
