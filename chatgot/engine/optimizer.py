"""Parameter groups, and the optimizer that the JSON's `optimizer` section names."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from chatgot.deepspeed_json.engine_config import EngineConfig
from chatgot.errors import ConfigError

ADAM_NAMES = ("adam", "adamw")
ONLY_DEEPSPEED = ("bias_correction", "fp32_optimizer_states")
"""Arguments of DeepSpeed's Adam whose value false torch's does not know."""


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices and embeddings decay; biases and norm gains, all of one dimension, do not (GPT-2,
    nanoGPT).
    """
    decay = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    no_decay = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def is_muon(config: EngineConfig) -> bool:
    """Whether the JSON asks for DeepSpeed's Muon."""
    return config.optimizer is not None and config.optimizer.type.lower() == "muon"


def state_kind(config: EngineConfig) -> str:
    """What decides which state an optimizer keeps for a parameter: optimizers of one kind can go on from each other's
    checkpoints.
    """
    if config.optimizer is None:
        return "none"
    if not _is_adam(config):
        return config.optimizer.type.lower()
    return "adam with amsgrad" if config.optimizer.params.get("amsgrad") else "adam"


def weight_decay(config: EngineConfig) -> float:
    """The optimizer section's; not stated, the default of the optimizer that DeepSpeed would build (0.01 for torch's
    AdamW, else 0).
    """
    assert config.optimizer is not None
    params = config.optimizer.params
    torchs = _is_adam(config) and bool(params.get("torch_adam")) and _decoupled(config)
    return float(params.get("weight_decay", 0.01 if torchs else 0.0))


def _is_adam(config: EngineConfig) -> bool:
    assert config.optimizer is not None
    return config.optimizer.type.lower() in ADAM_NAMES


def _decoupled(config: EngineConfig) -> bool:
    """DeepSpeed: "Adam" means AdamW unless adam_w_mode is false (engine.py, _configure_basic_optimizer)."""
    assert config.optimizer is not None
    return config.optimizer.type.lower() == "adamw" or bool(config.optimizer.params.get("adam_w_mode", True))


def build_client_optimizer(
    config: EngineConfig, groups: list[dict[str, Any]]
) -> tuple[torch.optim.Optimizer | None, str]:
    """torch's fused AdamW for the Adam family; None for what DeepSpeed builds itself from the JSON.

    DeepSpeed's FusedAdam and CPUAdam compute the same update but are compiled at the first start, with nvcc or g++.
    `"torch_adam": false` in the JSON asks for them explicitly and gets them; so does false for an argument that only
    they have.

    Args:
        config: with an `optimizer` section.
        groups: from `parameter_groups`.

    Returns:
        The optimizer or None, and one line that says what was chosen and why.
    """
    assert config.optimizer is not None
    name, params = config.optimizer.type, dict(config.optimizer.params)
    own = params.get("torch_adam") is False or (
        not params.get("torch_adam") and any(params.get(key) is False for key in ONLY_DEEPSPEED)
    )
    if not _is_adam(config) or own:
        return None, f"optimizer: {name}, built by DeepSpeed from the JSON"
    decoupled = _decoupled(config)
    for theirs in ("torch_adam", "adam_w_mode", "set_grad_none", *ONLY_DEEPSPEED):
        params.pop(theirs, None)
    if "foreach" not in params:
        params.setdefault("fused", True)
    if "betas" in params:
        params["betas"] = tuple(params["betas"])
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    try:
        optimizer = kind(groups, **params)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{config.path}: optimizer.params = {config.optimizer.params}: {error}") from error
    how = "fused" if params.get("fused") else "not fused"
    return (
        optimizer,
        f"optimizer: torch.optim.{kind.__name__} ({how}), the same update as DeepSpeed's, which needs a compiler at "
        f"start",
    )
