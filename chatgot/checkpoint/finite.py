"""A checkpoint with values that are not finite is worth nothing, and would push one that is worth something out of its
folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from chatgot.distributed import ControlGroup
from chatgot.errors import NumericsError

_MASTERS = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition")
"""fp32 weights that ZeRO 1-2, ZeRO 3 and the BF16_Optimizer step."""


def refuse_non_finite(engine: Any, ranks: ControlGroup) -> None:
    """Look at this rank's weights, fp32 masters and moments, one reduction over all of them. Collective.

    What is on NVMe is not looked at: it is not in memory.

    Raises:
        NumericsError: on all ranks, naming the first parameter or the part of the state.
    """
    bad = None
    named = list(_state(engine))
    by_kind: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for _, tensor in named:
        by_kind.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    # The largest magnitude of many tensors is NaN or inf exactly if an element is.
    largest = [torch.nn.utils.get_total_norm(tensors, norm_type=float("inf")) for tensors in by_kind.values()]
    if not all(bool(torch.isfinite(each)) for each in largest):
        bad = next(name for name, tensor in named if not bool(torch.isfinite(tensor).all()))
    error = None
    if bad is not None:
        error = NumericsError(
            f"step {engine.global_steps}: {bad} has values that are not finite, and such a state is never saved"
        )
    ranks.agree(error)


def _state(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in engine.module.named_parameters():
        yield from _usable(f"parameter {name}", getattr(parameter, "ds_tensor", parameter))
    optimizer = engine.optimizer
    for attribute in _MASTERS:
        for tensor in getattr(optimizer, attribute, None) or ():
            yield from _usable("an fp32 master weight", tensor)
    for state in getattr(optimizer, "optimizer", optimizer).state.values():
        for key, tensor in state.items():
            yield from _usable(f"the optimizer's {key}", tensor)


def _usable(name: str, tensor: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.numel():
        yield name, tensor.detach()
