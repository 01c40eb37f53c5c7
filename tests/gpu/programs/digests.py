"""Weights as one short word per parameter, comparable between processes and devices."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from chatgot.checkpoint.load import find
from chatgot.checkpoint.portable import fp32_weights
from chatgot.training.loop import Loop


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


def parameter_digests(loop: Loop) -> dict[str, str]:
    """Of an fp32 engine's parameters (ZeRO 0-2, where they are whole)."""
    return {name: digest(parameter) for name, parameter in loop.engine.engine.module.named_parameters()}


def checkpoint_digests(out: Path, tag: str | None = None) -> dict[str, str]:
    """Of the fp32 weights in a run folder's checkpoint."""
    found = find(out / "checkpoints", tag)
    assert found is not None
    return {name: digest(tensor) for name, tensor in fp32_weights(found).items()}
