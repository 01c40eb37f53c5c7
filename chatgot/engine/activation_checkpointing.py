"""What the JSON's `activation_checkpointing` section means, wired into the model's own forward.

DeepSpeed does nothing with the section by itself (deepspeed.checkpointing.configure reads it, and only calls of
deepspeed.checkpointing.checkpoint obey it). Its presence turns recomputation on; each of its keys does what DeepSpeed
says.
"""

from __future__ import annotations

import functools

from torch.utils.checkpoint import checkpoint as torch_checkpoint

from chatgot.deepspeed_json.resolve import EngineConfig
from chatgot.errors import ConfigError
from chatgot.model.gpt import GPT


def wire(model: GPT, config: EngineConfig) -> str:
    """Make `model` recompute the blocks that the JSON asks for; returns the line that says so. Needs the process group.

    Raises:
        ConfigError: contiguous_memory_optimization has room for fewer blocks than are recomputed.
    """
    if config.activation_backend is None:
        model.set_activation_checkpointing(None)
        return "activation checkpointing: off (no activation_checkpointing section in the JSON)"
    every = config.chatgot.activation_checkpointing.every_n_layers
    which = "every block is" if every == 1 else f"one block in {every} is"
    if config.activation_backend == "torch":
        model.set_activation_checkpointing(functools.partial(torch_checkpoint, use_reentrant=False), every)
        return f"activation checkpointing: {which} recomputed, by torch.utils.checkpoint (non-reentrant)"
    import deepspeed

    _check_room(config, recomputed=len(range(0, len(model.layers), every)))
    deepspeed.checkpointing.configure(None, deepspeed_config=dict(config.deepspeed))
    model.set_activation_checkpointing(deepspeed.checkpointing.checkpoint, every)
    return f"activation checkpointing: {which} recomputed, by deepspeed.checkpointing"


def _check_room(config: EngineConfig, recomputed: int) -> None:
    section = config.activation_checkpointing or {}
    room = section.get("number_checkpoints") or 0
    # DeepSpeed allocates room for so many and fails at the next one, in the first step (checkpointing.py,
    # partition_activations).
    if section.get("contiguous_memory_optimization") and room < recomputed:
        raise ConfigError(
            f"{config.path}: activation_checkpointing.number_checkpoints = {room}: contiguous_memory_optimization "
            f"must have room for the "
            f"{recomputed} blocks that this model recomputes; write {recomputed}"
        )
