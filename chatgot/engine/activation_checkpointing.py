"""What the JSON's `activation_checkpointing` section means, wired into the model's own forward.

DeepSpeed does nothing with the section by itself (deepspeed.checkpointing.configure reads it, and only calls of
deepspeed.checkpointing.checkpoint obey it). Its presence turns recomputation on; each of its keys does what DeepSpeed says.
"""

from __future__ import annotations

import functools

from torch.utils.checkpoint import checkpoint as torch_checkpoint

from chatgot.config.deepspeed_json import EngineConfig
from chatgot.model.gpt import GPT

ONLY_DEEPSPEED = (
    "partition_activations",
    "cpu_checkpointing",
    "contiguous_memory_optimization",
    "synchronize_checkpoint_boundary",
    "profile",
)


def choose_backend(config: EngineConfig) -> tuple[str, str]:
    """'torch', 'deepspeed' or 'off', and the reason in one line."""
    section = config.activation_checkpointing
    if section is None:
        return "off", "activation checkpointing: off (no activation_checkpointing section in the JSON)"
    wished = config.chatgot.activation_checkpointing.backend
    asked = [key for key in ONLY_DEEPSPEED if section.get(key)]
    every = config.chatgot.activation_checkpointing.every_n_layers
    which = "every block" if every == 1 else f"every {every}. block"
    if wished == "deepspeed" or asked:
        reason = f"{', '.join(asked)} is DeepSpeed's" if asked else "chatgot.activation_checkpointing.backend"
        return "deepspeed", f"activation checkpointing: {which}, by deepspeed.checkpointing ({reason})"
    return "torch", f"activation checkpointing: {which}, by torch.utils.checkpoint (non-reentrant)"


def wire(model: GPT, config: EngineConfig) -> str:
    """Make `model` recompute the blocks that the JSON asks for; returns the line that says so. Needs the process group."""
    backend, reason = choose_backend(config)
    every = config.chatgot.activation_checkpointing.every_n_layers
    if backend == "torch":
        model.set_activation_checkpointing(functools.partial(torch_checkpoint, use_reentrant=False), every)
    elif backend == "deepspeed":
        import deepspeed

        deepspeed.checkpointing.configure(None, deepspeed_config=dict(config.deepspeed))
        model.set_activation_checkpointing(deepspeed.checkpointing.checkpoint, every)
    else:
        model.set_activation_checkpointing(None)
    return reason
