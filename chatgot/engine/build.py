"""From a JSON and a plain PyTorch model to a DeepSpeedEngine, ready to train."""

from __future__ import annotations

from typing import Any, cast

import torch

from chatgot.deepspeed_json.engine_config import EngineConfig
from chatgot.engine import activation_checkpointing, guards
from chatgot.engine.optimizer import build_client_optimizer, is_muon, parameter_groups, weight_decay
from chatgot.engine.step import TrainingEngine
from chatgot.errors import ConfigError
from chatgot.model.gpt import GPT


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
    return TrainingEngine(engine, config, device, notes)


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
