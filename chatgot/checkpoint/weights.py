"""The model's fp32 weights out of any checkpoint, in one process, whatever ZeRO stage and number of ranks wrote it."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatgot.checkpoint import pickles
from chatgot.checkpoint.load import Found
from chatgot.config.errors import CheckpointError

if TYPE_CHECKING:
    import torch


def fp32_weights(found: Found) -> dict[str, torch.Tensor]:
    """The model's state dict in fp32 on the CPU.

    Stage 0 has it in one file. ZeRO's fp32 masters are put together by DeepSpeed's own zero_to_fp32, which does not know the files of
    its BF16_Optimizer (bf16, stage 1, fp32 accumulation): those are put together here.

    Raises:
        CheckpointError: the files cannot be read.
    """
    try:
        if found.manifest["zero_stage"] == 0:
            return {name: tensor.float() for name, tensor in pickles.read(found.path / "mp_rank_00_model_states.pt")["module"].items()}
        shards = sorted(found.path.glob("*_optim_states.pt"), key=_rank)
        if shards and "zero_stage" not in (state := pickles.read(shards[0])["optimizer_state_dict"]):
            return _join_bf16_optimizer(found.path, [state, *(pickles.read(path)["optimizer_state_dict"] for path in shards[1:])])
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        # It prints its progress to both streams.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), pickles.weights_only():
            return dict(get_fp32_state_dict_from_zero_checkpoint(str(found.folder), tag=found.tag) or {})
    except Exception as error:
        raise CheckpointError(f"{found.path}: the weights cannot be read: {pickles.explained(error)}") from error


def _join_bf16_optimizer(folder: Path, states: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Every parameter group is one flat tensor, cut into equal parts by rank, its parameters in the order of `param_shapes`."""
    import torch

    model = pickles.read(folder / "mp_rank_00_model_states.pt")
    if len(states) != model["dp_world_size"]:
        raise FileNotFoundError(f"{len(states)} optimizer shards of {model['dp_world_size']}")
    weights: dict[str, torch.Tensor] = {}
    for index, shapes in enumerate(model["param_shapes"]):
        flat = torch.cat([state["single_partition_of_fp32_groups"][index].detach() for state in states])
        offset = 0
        for name, shape in shapes.items():
            weights[name] = flat[offset : offset + shape.numel()].view(shape).float().clone()
            offset += shape.numel()
    for copy, original in model["shared_params"].items():
        weights[copy] = weights[original]
    return weights


def _rank(path: Path) -> int:
    match = re.search(r"zero_pp_rank_(\d+)_", path.name)
    return int(match.group(1)) if match else 0
