"""Every reading of DeepSpeed 0.19.8's private layouts: where an engine keeps weights, masters, moments and gradients.

Sources: runtime/zero/stage_1_and_2.py, zero/stage3.py, bf16_optimizer.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# --- pieces of parameters in flat tensors ---


@dataclass(frozen=True)
class Fragment:
    """`numel` elements of a parameter, flattened, from `start` on; they lie at `offset` of one rank's flat tensor."""

    name: str
    start: int
    numel: int
    offset: int


def cut_group(
    numels: Sequence[tuple[str, int]], partition_size: int, rank: int, paddings: Sequence[int] = ()
) -> list[Fragment]:
    """ZeRO 1-2 and the BF16_Optimizer: the group's parameters one after the other, cut into equal parts by rank.

    Args:
        numels: (name, number of elements) in the order of the flat tensor.
        partition_size: elements of one rank's part, padding at the end of the last ones included.
        paddings: unused elements after each parameter (zero_optimization.parameter_alignment); none by default.
    """
    begin, end, position = rank * partition_size, (rank + 1) * partition_size, 0
    fragments = []
    for index, (name, numel) in enumerate(numels):
        left, right = max(position, begin), min(position + numel, end)
        if left < right:
            fragments.append(Fragment(name, left - position, right - left, left - begin))
        position += numel + (paddings[index] if paddings else 0)
    return fragments


def cut_each(numels: Iterable[tuple[str, int]], ranks: int, rank: int) -> list[Fragment]:
    """ZeRO 3: each parameter of a sub-group is cut into equal parts, the last padded; a rank has its parts in a row."""
    offset, fragments = 0, []
    for name, numel in numels:
        part = -(-numel // ranks)
        inside = min(part, numel - rank * part)
        if inside > 0:
            fragments.append(Fragment(name, rank * part, inside, offset))
        offset += part
    return fragments


def whole(numels: dict[str, int], fragments: Iterable[Fragment]) -> list[Fragment]:
    """ZeRO 1-2 with Muon: a rank keeps the whole momenta, in a row, of all matrices of which it has a piece."""
    offset, matrices = 0, []
    for fragment in fragments:
        matrices.append(Fragment(fragment.name, 0, numels[fragment.name], offset))
        offset += numels[fragment.name]
    return matrices


@dataclass(frozen=True)
class Owned:
    """A tensor that this rank's optimizer steps, and the pieces of parameters in it."""

    tensor: Tensor
    """fp32 weights: a rank's part of a group, or without ZeRO a parameter. The optimizer's state is found under it."""
    group: dict[str, Any]
    """The optimizer's parameter group."""
    fragments: list[Fragment]
    momentum: list[Fragment]
    """The same for Muon's momentum, where DeepSpeed lays it out differently."""
    momentum_numel: int


def owned_pieces(engine: Any) -> Iterator[Owned]:
    """The tensors that this rank's optimizer steps, with the pieces of parameters in them."""
    names, zero = parameter_names(engine), engine.optimizer
    if not engine.zero_optimization():
        for group in zero.param_groups:
            for parameter in group["params"]:
                fragments = [Fragment(names[id(parameter)], 0, parameter.numel(), 0)]
                yield Owned(parameter, group, fragments, fragments, parameter.numel())
        return
    rank, ranks = dist.get_rank(zero.dp_process_group), dist.get_world_size(zero.dp_process_group)
    if hasattr(zero, "bf16_groups"):
        for group, members, flat in zip(zero.param_groups, zero.bf16_groups, zero.fp32_groups_flat_partition):
            fragments = cut_group([(names[id(p)], p.numel()) for p in members], flat.numel(), rank)
            yield Owned(flat, group, fragments, fragments, flat.numel())
    elif hasattr(zero, "sub_group_to_group_id"):
        for number, flat in enumerate(zero.fp32_partitioned_groups_flat):
            fragments = cut_each([(names[id(p)], p.ds_numel) for p in zero.fp16_groups[number]], ranks, rank)
            yield Owned(flat, zero.param_groups[zero.sub_group_to_group_id[number]], fragments, fragments, flat.numel())
    else:
        for index, (group, members) in enumerate(zip(zero.param_groups, zero.round_robin_bit16_groups)):
            flat, numels = zero.single_partition_of_fp32_groups[index], {names[id(p)]: p.numel() for p in members}
            fragments = cut_group(list(numels.items()), flat.numel(), rank, zero.round_robin_bit16_padding[index])
            # On the CPU Muon's momentum lies like the weights (stage_1_and_2.py, _apply_muon_updates_cpu_offload).
            like_weights = zero.cpu_offload or not group.get("use_muon")
            momentum = fragments if like_weights else whole(numels, fragments)
            size = flat.numel() if like_weights else sum(f.numel for f in momentum)
            yield Owned(flat, group, fragments, momentum, size)


def parameter_names(engine: Any) -> dict[int, str]:
    """The name of every parameter of the model, by its id."""
    return {id(parameter): name for name, parameter in engine.module.named_parameters()}


def grouped_parameters(engine: Any) -> list[tuple[dict[str, Any], list[torch.nn.Parameter]]]:
    """The optimizer's parameter groups, each with the model's parameters in it."""
    optimizer, groups = engine.optimizer, engine.optimizer.param_groups
    if not engine.zero_optimization():
        return [(group, group["params"]) for group in groups]
    if hasattr(optimizer, "bf16_groups"):
        return list(zip(groups, optimizer.bf16_groups))
    if not hasattr(optimizer, "sub_group_to_group_id"):
        return list(zip(groups, optimizer.bit16_groups))
    members: list[list[torch.nn.Parameter]] = [[] for _ in groups]
    for number, group in enumerate(optimizer.fp16_groups):
        members[optimizer.sub_group_to_group_id[number]] += group
    return list(zip(groups, members))


# --- filling a new engine ---


def create_optimizer_state(engine: Any, owned: Sequence[Owned]) -> None:
    """Let the optimizer make its state itself, to be replaced: in a step with gradients and learning rate 0."""
    optimizer, groups = engine.basic_optimizer, engine.basic_optimizer.param_groups
    gradients = [piece.tensor.grad for piece in owned]
    before = [(group["lr"], group["params"]) for group in groups]
    for group in groups:
        group["lr"], group["params"] = 0.0, [piece.tensor for piece in owned if piece.group is group]
    try:
        for piece in owned:
            piece.tensor.grad = torch.zeros_like(piece.tensor)
        type(optimizer).step(optimizer)  # the class' own: at stage 0 the instance's is guarded
    finally:
        for piece, gradient in zip(owned, gradients):
            piece.tensor.grad = gradient
        for group, (rate, tensors) in zip(groups, before):
            group["lr"], group["params"] = rate, tensors


def refresh_16_bit_copies(engine: Any) -> None:
    """Copy fp32 weights that were written to `owned_pieces` into the weights that the model computes with."""
    zero = engine.optimizer
    if not engine.zero_optimization():
        return
    if not hasattr(zero, "sub_group_to_group_id"):
        zero.update_lp_params()
        return
    zero.checkpoint_event_prologue()
    for number in range(len(zero.fp32_partitioned_groups_flat)):
        zero._reassign_or_swap_out_partitioned_parameters(number)
    zero.checkpoint_event_epilogue()


def loss_scaler(engine: Any) -> Any:
    """fp16's scaler of a DeepSpeed optimizer; None where there is none."""
    return getattr(engine.optimizer, "loss_scaler", None)


def autocast_scaler(engine: Any) -> Any:
    """torch_autocast's GradScaler in float16, which DeepSpeed's checkpoints leave out; None where there is none."""
    scaler = getattr(engine, "torch_autocast_z0_gradscaler", None)
    return scaler or getattr(engine.optimizer, "torch_autocast_gradscaler", None)


def loss_scale(engine: Any) -> float:
    """fp16's loss scale, also that of torch_autocast's GradScaler."""
    scaler = autocast_scaler(engine)
    return float(engine.optimizer.loss_scale if scaler is None else scaler.get_scale())


def autocast_scale(engine: Any) -> dict[str, float] | None:
    """What changes of torch_autocast's GradScaler while it trains; None where there is none."""
    scaler = autocast_scaler(engine)
    return None if scaler is None else {key: scaler.state_dict()[key] for key in ("scale", "_growth_tracker")}


# --- what an engine holds ---

_MASTERS = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition")
"""fp32 weights that ZeRO 1-2, ZeRO 3 and the BF16_Optimizer step."""
_GRADIENTS = ("averaged_gradients", "all_grad_tensors", "grads_in_partition", "accumulated_grads_in_cpu")
_GRADIENTS += ("fp32_groups_gradients_flat", "grad_partitions_flat_buffer")
_BUFFERS = ("temp_grad_buffer_for_cpu_offload", "temp_grad_buffer_for_gpu_offload", "_muon_allgather_buffers")


def named_state(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """This rank's weights, fp32 masters and optimizer state as far as they are in memory: floating point, not empty."""
    named = [(f"parameter {name}", getattr(p, "ds_tensor", p)) for name, p in engine.module.named_parameters()]
    named += [("an fp32 master weight", tensor) for tensor in _attributes(engine.optimizer, _MASTERS)]
    for state in engine.basic_optimizer.state.values():
        named += [(f"the optimizer's {key}", value) for key, value in state.items() if isinstance(value, Tensor)]
    for name, tensor in named:
        if tensor.is_floating_point() and tensor.numel():
            yield name, tensor.detach()


def first_non_finite(engine: Any) -> str | None:
    """Name a part of this rank's `named_state` that has a value that is not finite; None: all are finite."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for _, tensor in named_state(engine):
        by_kind.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    # The largest magnitude of many tensors is NaN or inf exactly if an element is.
    largest = [torch.nn.utils.get_total_norm(tensors, norm_type=float("inf")) for tensors in by_kind.values()]
    if all(bool(torch.isfinite(each)) for each in largest):
        return None
    return next(name for name, tensor in named_state(engine) if not bool(torch.isfinite(tensor).all()))


def live_model_states(engine: Any) -> dict[str, int]:
    """Bytes of parameters, gradients, master_weights, optimizer_states and buffers that an engine holds on this rank.

    Device and host together, every storage once: a view costs nothing, and padding counts. The gradients are whole
    between the last backward and the step.
    """
    zero, parameters = engine.optimizer, list(engine.module.parameters())
    masters = list(_attributes(zero, _MASTERS))
    copies = _attributes(zero, ("lp_param_buffer", "param_buffer_of_bit16_for_cpu_offload_groups"))
    muon = [staged for staged, _ in getattr(zero, "_muon_pending_momentum", {}).values()]
    buckets = [getattr(bucket, "buffer", None) for bucket in getattr(zero, "ipg_buckets", {}).values()]
    gradients = [tensor.grad for tensor in (*parameters, *masters)]
    parts = {
        "parameters": [*parameters, *(getattr(p, "ds_tensor", None) for p in parameters), *copies],
        "master_weights": masters,
        "optimizer_states": [engine.basic_optimizer.state, muon],
        "buffers": [*buckets, *_attributes(zero, _BUFFERS)],
        "gradients": [
            *gradients,
            *(getattr(p, "grad_accum", None) for p in parameters),
            *_attributes(zero, _GRADIENTS),
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


def _attributes(owner: Any, names: Iterable[str]) -> Iterator[Tensor]:
    """All tensors in those attributes that `owner` has."""
    return _tensors([getattr(owner, name, None) for name in names])


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested lists and mappings."""
    if isinstance(value, Tensor):
        if not value.is_meta:
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def layer_grad_norms(engine: Any) -> dict[str, float]:
    """Norms of the averaged gradients by layer, {'embed_tokens': ..., 'layers.0': ...}, unclipped and unscaled.
    Collective: ZeRO assembles one parameter's gradient after the other.
    """
    from deepspeed.utils import safe_get_full_grad

    zero = engine.zero_optimization()
    scale = float(getattr(engine.optimizer, "loss_scale", 1.0)) if zero and engine.fp16_enabled() else 1.0
    squares: dict[str, float] = {}
    for name, parameter in engine.module.named_parameters():
        gradient = safe_get_full_grad(parameter) if zero else parameter.grad
        if gradient is None:
            continue
        first, _, rest = name.partition(".")
        layer = f"{first}.{rest.partition('.')[0]}" if first == "layers" else first
        norm = float(torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32)) / scale
        squares[layer] = squares.get(layer, 0.0) + norm * norm
    return {layer: math.sqrt(square) if square >= 0 else math.nan for layer, square in squares.items()}


def checkpointed_inputs(loss: Tensor) -> Iterator[Tensor]:
    """Inputs that DeepSpeed's checkpoint() keeps as attributes of the graph's nodes, where no saved-tensor hook sees
    them; partition and CPU modes move an input's contents to its attribute saved_data
    (runtime/activation_checkpointing/checkpointing.py, CheckpointFunction.forward).
    """
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting.extend(parent for parent, _ in node.next_functions)
        for tensor in getattr(node, "deepspeed_saved_tensors", None) or ():
            contents = getattr(tensor, "saved_data", None)
            yield tensor if contents is None else contents
