"""Putting a PortableState into a new engine of any ZeRO stage, number of ranks, offload and precision, bit for bit."""

from __future__ import annotations

from typing import Any

import torch

from chatgot.checkpoint import lr_scheduler
from chatgot.checkpoint.portable import LOSS_SCALER_FIELDS, MOMENTUM, PortableState
from chatgot.distributed import ControlGroup
from chatgot.engine import zero_view
from chatgot.errors import CheckpointError

NOT_COMPARED = frozenset(
    ["params", "step", "name", "fused", "foreach", "capturable", "differentiable", "_ds_source_param_group_id"]
)
"""Keys of an optimizer group that do not change what is computed."""


def parameter_groups(engine: Any) -> list[list[str]]:
    """Names of the parameters in every group of an optimizer without ZeRO, whose state dict only numbers them; [] with
    ZeRO.
    """
    if engine.zero_optimization():
        return []
    names = zero_view.parameter_names(engine)
    return [[names[id(p)] for p in group["params"]] for group in engine.optimizer.param_groups]


def write_portable(engine: Any, state: PortableState, ranks: ControlGroup) -> None:
    """Give a new engine the state's weights, optimizer state and counters. Collective.

    The optimizer's hyper-parameters stay those of the engine; `hyper_parameter_changes` names what differs.

    Raises:
        CheckpointError: on all ranks; the engine's parameters or its optimizer are not the checkpoint's, or its state
            is not in memory.
    """
    error = None
    owned = list(zero_view.owned_pieces(engine))
    try:
        _check(engine, state)
        if any(parameter.moments or parameter.scalars for parameter in state.parameters.values()):
            zero_view.create_optimizer_state(engine, owned)
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
    zero_view.refresh_16_bit_copies(engine)
    engine.global_steps, engine.skipped_steps, engine.global_samples = (
        state.global_steps,
        state.skipped_steps,
        state.global_samples,
    )
    scaler = zero_view.loss_scaler(engine)
    if scaler is not None and scaler.dynamic and state.loss_scaler is not None:
        for key in LOSS_SCALER_FIELDS:
            setattr(scaler, key, state.loss_scaler[key])
    lr_scheduler.go_on(engine)


def hyper_parameter_changes(engine: Any, state: PortableState) -> list[str]:
    """One line per hyper-parameter of a parameter's group that is not the checkpoint's. Groups are matched by their
    parameters.
    """
    found: dict[str, None] = {}
    names = zero_view.parameter_names(engine)
    for group, members in zero_view.grouped_parameters(engine):
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


def _check(engine: Any, state: PortableState) -> None:
    shapes = zero_view.parameter_shapes(engine)
    theirs = {name: tuple(parameter.weight.shape) for name, parameter in state.parameters.items()}
    if shapes != theirs:
        name = next(n for n in sorted(shapes.keys() | theirs.keys()) if shapes.get(n) != theirs.get(n))
        raise CheckpointError(
            f"parameter {name}: shape {theirs.get(name)} in the checkpoint, {shapes.get(name)} in this run's model"
        )
    if setting := zero_view.out_of_reach(engine):
        raise CheckpointError(
            f"{setting}: a checkpoint of other settings cannot be resumed into it; offload to the CPU with ratio 1 first"
        )


def _write_optimizer_state(engine: Any, piece: zero_view.Owned, state: PortableState) -> None:
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
