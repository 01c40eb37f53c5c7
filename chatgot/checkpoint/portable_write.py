"""Putting a PortableState into a new engine of any ZeRO stage, number of ranks, offload and precision, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from chatgot.checkpoint import lr_scheduler
from chatgot.checkpoint.portable import LOSS_SCALER_FIELDS, MOMENTUM, PortableState
from chatgot.checkpoint.shards import Fragment, cut_each, cut_group, whole
from chatgot.distributed import ControlGroup
from chatgot.errors import CheckpointError

NOT_COMPARED = frozenset(
    ["params", "step", "name", "fused", "foreach", "capturable", "differentiable", "_ds_source_param_group_id"]
)
"""Keys of an optimizer group that do not change what is computed."""


@dataclass(frozen=True)
class Owned:
    """A tensor that this rank's optimizer steps, and the pieces of parameters in it."""

    tensor: torch.Tensor
    """The optimizer's state is found under it."""
    group: dict[str, Any]
    """The optimizer's parameter group."""
    fragments: list[Fragment]
    momentum: list[Fragment]
    """The same for Muon's momentum, where DeepSpeed lays it out differently."""
    momentum_numel: int


def parameter_groups(engine: Any) -> list[list[str]]:
    """Names of the parameters in every group of an optimizer without ZeRO, whose state dict only numbers them; [] with
    ZeRO.
    """
    if engine.zero_optimization():
        return []
    names = _names(engine)
    return [[names[id(p)] for p in group["params"]] for group in engine.optimizer.param_groups]


def write_portable(engine: Any, state: PortableState, ranks: ControlGroup) -> None:
    """Give a new engine the state's weights, optimizer state and counters. Collective.

    The optimizer's hyper-parameters stay those of the engine; `hyper_parameter_changes` names what differs.

    Raises:
        CheckpointError: on all ranks; the engine's parameters or its optimizer are not the checkpoint's, or its state
            is not in memory.
    """
    error = None
    owned = list(owned_pieces(engine))
    try:
        _check(engine, state)
        if any(parameter.moments or parameter.scalars for parameter in state.parameters.values()):
            _create_optimizer_state(engine, owned)
            for piece in owned:
                _write_optimizer_state(engine, piece, state)
    except CheckpointError as caught:
        error = caught
    ranks.agree(error)
    with torch.no_grad():
        for piece in owned:
            flat = piece.tensor.data.view(-1)
            for f in piece.fragments:
                flat[f.offset : f.offset + f.numel] = state.parameters[f.name].weight.read(f.start, f.numel)
        for name, buffer in engine.module.named_buffers():
            if name in state.buffers:
                buffer.copy_(state.buffers[name])
    _refresh_16_bit_copies(engine)
    engine.global_steps, engine.skipped_steps, engine.global_samples = (
        state.global_steps,
        state.skipped_steps,
        state.global_samples,
    )
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is not None and scaler.dynamic and state.loss_scaler is not None:
        for key in LOSS_SCALER_FIELDS:
            setattr(scaler, key, state.loss_scaler[key])
    lr_scheduler.go_on(engine)


def hyper_parameter_changes(engine: Any, state: PortableState) -> list[str]:
    """One line per hyper-parameter of a parameter's group that is not the checkpoint's. Groups are matched by their
    parameters.
    """
    found: dict[str, None] = {}
    names = _names(engine)
    for group, members in zip(*_groups(engine)):
        for parameter in members:
            saved = state.groups[state.parameters[names[id(parameter)]].group] if state.groups else {}
            for key in saved.keys() & group.keys() - NOT_COMPARED - lr_scheduler.moved(engine):
                before, now = _plain(saved[key]), _plain(group[key])
                if before != now:
                    label = group.get("name") or f"weight_decay {group.get('weight_decay')!r}"
                    found[f"optimizer group ({label}): {key} was {before!r}, is now {now!r} (from the JSON)"] = None
    return list(found)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def _names(engine: Any) -> dict[int, str]:
    return {id(parameter): name for name, parameter in engine.module.named_parameters()}


def _groups(engine: Any) -> tuple[list[dict[str, Any]], list[list[torch.nn.Parameter]]]:
    """The optimizer's parameter groups, and the model's parameters in each."""
    optimizer = engine.optimizer
    if not engine.zero_optimization():
        return optimizer.param_groups, [group["params"] for group in optimizer.param_groups]
    if hasattr(optimizer, "bf16_groups"):
        return optimizer.param_groups, optimizer.bf16_groups
    if not hasattr(optimizer, "sub_group_to_group_id"):
        return optimizer.param_groups, optimizer.bit16_groups
    members: list[list[torch.nn.Parameter]] = [[] for _ in optimizer.param_groups]
    for number, group in enumerate(optimizer.fp16_groups):
        members[optimizer.sub_group_to_group_id[number]] += group
    return optimizer.param_groups, members


def _check(engine: Any, state: PortableState) -> None:
    shapes = {
        name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters() if p.requires_grad
    }
    theirs = {name: tuple(parameter.weight.shape) for name, parameter in state.parameters.items()}
    if shapes != theirs:
        name = next(n for n in sorted(shapes.keys() | theirs.keys()) if shapes.get(n) != theirs.get(n))
        raise CheckpointError(
            f"parameter {name}: shape {theirs.get(name)} in the checkpoint, {shapes.get(name)} in this run's model"
        )
    zero = engine.optimizer
    if getattr(zero, "swap_optimizer", False) or getattr(zero, "params_in_nvme_and_cpu", False):
        raise CheckpointError(
            "offloading to NVMe: a checkpoint of other settings cannot be resumed into it; offload to the CPU first"
        )
    if getattr(zero, "offload_optimizer", False) and any(
        device != "cpu" for device in zero.subgroup_to_device.values()
    ):
        raise CheckpointError(
            "zero_optimization.offload_optimizer.ratio below 1: a checkpoint of other settings cannot be resumed into "
            "it"
        )


def owned_pieces(engine: Any) -> Iterator[Owned]:
    """The tensors that this rank's optimizer steps, with the pieces of parameters in them."""
    names, zero = _names(engine), engine.optimizer
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
            # Muon's update on the CPU keeps its momentum like the weights (stage_1_and_2.py,
            # _apply_muon_updates_cpu_offload).
            like_weights = zero.cpu_offload or not group.get("use_muon")
            momentum = fragments if like_weights else whole(numels, fragments)
            size = flat.numel() if like_weights else sum(f.numel for f in momentum)
            yield Owned(flat, group, fragments, momentum, size)


def _create_optimizer_state(engine: Any, owned: list[Owned]) -> None:
    """Let the optimizer make its state itself, in a step without gradients and with a learning rate of 0; its values
    are replaced later.
    """
    optimizer = engine.basic_optimizer
    groups = optimizer.param_groups
    gradients = [piece.tensor.grad for piece in owned]
    rates = [group["lr"] for group in groups]
    members = [group["params"] for group in groups]
    for group in groups:
        group["lr"] = 0.0
        group["params"] = [piece.tensor for piece in owned if piece.group is group]
    try:
        for piece in owned:
            piece.tensor.grad = torch.zeros_like(piece.tensor)
        type(optimizer).step(optimizer)  # the class' own: at stage 0 the instance's is guarded
    finally:
        for piece, gradient in zip(owned, gradients):
            piece.tensor.grad = gradient
        for group, rate, tensors in zip(groups, rates, members):
            group["lr"], group["params"] = rate, tensors


def _write_optimizer_state(engine: Any, piece: Owned, state: PortableState) -> None:
    target = engine.basic_optimizer.state[piece.tensor]
    if not piece.fragments:
        return  # a part that is all padding
    if piece.group.get("use_muon") and target.get(MOMENTUM) is None:
        target[MOMENTUM] = torch.zeros(piece.momentum_numel, dtype=torch.float32, device=piece.tensor.device)
    kept = {key for key, value in target.items() if isinstance(value, torch.Tensor) and value.dim() > 0}
    for name in dict.fromkeys(f.name for f in piece.fragments):
        saved = state.parameters[name].moments.keys()
        if kept != saved:
            raise CheckpointError(
                f"parameter {name}: the checkpoint's optimizer keeps {', '.join(sorted(saved)) or 'nothing'}, "
                f"this run's {', '.join(sorted(kept)) or 'nothing'}; give the same optimizer"
            )
    for key in kept:
        flat = target[key].view(-1)
        for f in piece.momentum if key == MOMENTUM else piece.fragments:
            flat[f.offset : f.offset + f.numel] = state.parameters[f.name].moments[key].read(f.start, f.numel)
    scalars = state.parameters[piece.fragments[0].name].scalars
    for key, value in scalars.items():
        if isinstance(target.get(key), torch.Tensor):
            target[key].fill_(value)
        elif key in target:
            target[key] = type(target[key])(value)
    if "step" in scalars and "step" in piece.group:
        piece.group["step"] = type(piece.group["step"])(scalars["step"])


def _refresh_16_bit_copies(engine: Any) -> None:
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
