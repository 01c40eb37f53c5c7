"""The model's fp32 weights out of any checkpoint, in one process, whatever ZeRO stage and number of ranks wrote it."""

from __future__ import annotations

import torch

from chatgot.checkpoint.load import Found
from chatgot.checkpoint.portable import read_portable


def fp32_weights(found: Found) -> dict[str, torch.Tensor]:
    """The model's state dict in fp32 on the CPU: parameters, tied ones under each of their names, and buffers.

    Of ZeRO's files the fp32 masters are taken. Optimizer state is not read.

    Raises:
        CheckpointError: the files cannot be read.
    """
    state = read_portable(found)
    weights = {name: parameter.weight.whole() for name, parameter in state.parameters.items()}
    for name, buffer in state.buffers.items():
        weights[name] = buffer.to(torch.float32 if buffer.is_floating_point() else buffer.dtype, copy=True)
    return weights | {name: weights[original] for name, original in state.tied.items()}
