"""The model states that an engine really holds, counted by their storages: what a plan's prediction is held against."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

_GRADIENTS = (
    "averaged_gradients",
    "all_grad_tensors",
    "grads_in_partition",
    "accumulated_grads_in_cpu",
    "fp32_groups_gradients_flat",
    "grad_partitions_flat_buffer",
)
_MASTERS = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat")
_BUFFERS = ("temp_grad_buffer_for_cpu_offload", "temp_grad_buffer_for_gpu_offload", "_muon_allgather_buffers")


def live_model_states(engine: Any) -> dict[str, int]:
    """Bytes of parameters, gradients, master_weights, optimizer_states and buffers that a DeepSpeedEngine holds on this
    rank.

    Device and host together, every storage once: a view costs nothing, and padding counts. The gradients are whole
    between the last backward and the step. Attribute names are those of DeepSpeed 0.19.8 (zero/stage_1_and_2.py,
    zero/stage3.py, bf16_optimizer.py).
    """
    zero = engine.optimizer
    optimizer = getattr(zero, "optimizer", zero)
    parameters = list(engine.module.parameters())
    masters = [tensor for name in _MASTERS for tensor in _tensors(getattr(zero, name, None))]
    buckets = [getattr(bucket, "buffer", None) for bucket in getattr(zero, "ipg_buckets", {}).values()]
    parts = {
        "parameters": [
            *parameters,
            *(getattr(p, "ds_tensor", None) for p in parameters),
            getattr(zero, "lp_param_buffer", None),
            getattr(zero, "param_buffer_of_bit16_for_cpu_offload_groups", None),
        ],
        "master_weights": masters,
        "optimizer_states": [
            optimizer.state,
            [staged for staged, _ in getattr(zero, "_muon_pending_momentum", {}).values()],
        ],
        "buffers": [*buckets, *(getattr(zero, name, None) for name in _BUFFERS)],
        "gradients": [
            *(p.grad for p in parameters),
            *(getattr(p, "grad_accum", None) for p in parameters),
            *(master.grad for master in masters),
            *(getattr(zero, name, None) for name in _GRADIENTS),
        ],
    }
    seen: set[int] = set()
    return {part: _bytes(tensors, seen) for part, tensors in parts.items()}


def _bytes(tensors: Iterable[Any], seen: set[int]) -> int:
    total = 0
    for tensor in _tensors(tensors):
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested lists and mappings."""
    if isinstance(value, torch.Tensor):
        if not value.is_meta:
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
