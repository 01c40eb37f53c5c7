"""Resuming a checkpoint: with the same settings through DeepSpeed's own load, with others parameter by parameter."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from chatgot.checkpoint import manifest
from chatgot.checkpoint.load import Found
from chatgot.checkpoint.manifest import MAY_CHANGE, ClientState
from chatgot.checkpoint.pickles import weights_only
from chatgot.checkpoint.portable import LOSS_SCALER_FIELDS, MOMENTUM, HyperParameters, PortableState, read_portable
from chatgot.distributed import ControlGroup
from chatgot.engine import zero_view
from chatgot.errors import CheckpointError, quoted

CHANGED = "changed since the checkpoint: "

_OFFLOADS = ("offload_optimizer", "offload_param")
_LAYOUT = (*_OFFLOADS, "sub_group_size", "round_robin_gradients", "parameter_alignment", "elastic_checkpoint")
_NOT_COMPARED = frozenset(
    ["params", "step", "name", "fused", "foreach", "capturable", "differentiable", "_ds_source_param_group_id"]
)
"""Keys of an optimizer group that do not change what is computed."""


def layout(deepspeed: dict[str, Any]) -> dict[str, Any]:
    """Name what, besides stage, ranks and precision, the resolved JSON says of the layout of DeepSpeed's files."""
    zero = deepspeed.get("zero_optimization")
    stated = {key: zero[key] for key in _LAYOUT if zero.get(key) is not None} if isinstance(zero, dict) else {}
    ratio = stated.get("offload_optimizer", {}).get("ratio", 1.0)
    for key in _OFFLOADS:
        if key in stated:
            stated[key] = stated[key].get("device", "none")
    if stated.get("offload_optimizer") == "cpu" and ratio < 1:
        stated["offload_optimizer.ratio"] = ratio
    stated["grad_accum_dtype"] = (deepspeed.get("data_types") or {}).get("grad_accum_dtype")
    return {key: value for key, value in stated.items() if value not in (None, "none", False)}


def refuse_layouts(found: Found, now: Mapping[str, Any]) -> None:
    """Refuse, before an engine is built, what cannot be read or filled parameter by parameter: a change of MAY_CHANGE
    where either side offloads to NVMe or only a part of the optimizer. Raises CheckpointError.
    """
    changed = manifest.differences(found.manifest, now, MAY_CHANGE)
    for whose, fields in (("the checkpoint's run", found.manifest), ("this run", now)):
        kept = fields.get("layout") or {}
        stated = [f"zero_optimization.{key}.device = nvme" for key in _OFFLOADS if kept.get(key) == "nvme"]
        if (ratio := kept.get("offload_optimizer.ratio")) is not None:
            stated.append(f"zero_optimization.offload_optimizer.ratio = {ratio}")
        if changed and stated:
            raise CheckpointError(
                f"{found.path}: {whose} has {stated[0]}, and such a run can be resumed with the same settings only, "
                f"but different are {', '.join(map(str, changed))}. Resume with the checkpoint's settings; to be free "
                "to move, offload to the CPU, with ratio 1"
            )


def resume(engine: Any, found: Found, now: Mapping[str, Any], ranks: ControlGroup) -> tuple[ClientState, list[str]]:
    """Load a checkpoint into a new engine, whatever its MAY_CHANGE fields are; `now` has those of this run. Collective.

    Returns:
        The client state that `Saver.begin` was given, and one line per change.

    Raises:
        CheckpointError: on all ranks, if any could not load.
    """
    changed = manifest.differences(found.manifest, now, MAY_CHANGE)
    announced = manifest.differences(found.manifest, now, manifest.ANNOUNCED)
    notes = [f"{CHANGED}{one}" for one in (*changed, *announced)]
    if not changed:
        client_state, more = load(engine, found, ranks)
        return client_state, [*notes, *more, *_restore_autocast_scale(engine, client_state)]
    state = ranks.on_every_rank(lambda: read_portable(found))
    write_portable(engine, state, ranks)
    _catch_up(engine)
    if state.groups:
        names = zero_view.parameter_names(engine)
        members = [(names[id(p)], group) for group, members in zero_view.grouped_parameters(engine) for p in members]
        pairs = ((state.groups[state.parameters[name].group], group) for name, group in members)
        notes += _hyper_parameter_changes(engine, pairs)
    scaler = zero_view.loss_scaler(engine)
    if scaler is not None and scaler.dynamic and state.loss_scaler is None:
        notes.append(f"fp16: the checkpoint has no loss scale; starting with {scaler.cur_scale:g}")
    return state.client_state, [*notes, *_restore_autocast_scale(engine, state.client_state)]


def _restore_autocast_scale(engine: Any, state: ClientState) -> list[str]:
    """Put back the loss scale of torch_autocast in float16; returns a note where the checkpoint has none."""
    scaler, saved = zero_view.autocast_scaler(engine), state.get("grad_scaler")
    if scaler is not None and saved is not None:
        scaler.load_state_dict({**scaler.state_dict(), **saved})
    elif scaler is not None:
        return [f"torch_autocast: the checkpoint has no loss scale; starting with {scaler.get_scale():g}"]
    return []


def load(engine: Any, found: Found, ranks: ControlGroup) -> tuple[ClientState, list[str]]:
    """Load weights, optimizer and counters of the same settings, and put the JSON's hyper-parameters back. Collective.

    DeepSpeed returns (None, None) with a warning where there is nothing to load, and its resumed optimizer has the
    checkpoint's learning rate, betas, weight decay and (ZeRO 1-2) clipping, whatever the JSON says.

    Returns and raises what `resume` does.
    """

    def deepspeed_loads() -> ClientState:
        try:
            # The BF16_Optimizer prints keys of the file. A checkpoint never runs code.
            with contextlib.redirect_stdout(io.StringIO()), weights_only():
                path, loaded = engine.load_checkpoint(str(found.folder), tag=found.tag, load_lr_scheduler_states=False)
        except Exception as error:  # files that nobody has checked: whatever torch and DeepSpeed raise
            raise CheckpointError(
                f"{found.path}: cannot be loaded: {quoted(f'{type(error).__name__}: {error}')}"
            ) from error
        if path is None or "chatgot" not in (loaded or {}):
            raise CheckpointError(f"{found.path}: DeepSpeed found nothing to load there")
        return loaded["chatgot"]

    wished = [{key: value for key, value in one.items() if key != "params"} for one in engine.optimizer.param_groups]
    client_state = ranks.on_every_rank(deepspeed_loads)
    groups = engine.optimizer.param_groups
    notes = _hyper_parameter_changes(engine, zip(groups, wished))
    for group, ours in zip(groups, wished):
        group.update(ours)
    if hasattr(engine.optimizer, "clip_grad"):
        engine.optimizer.clip_grad = engine.gradient_clipping()
    _catch_up(engine)
    return client_state, notes


def _hyper_parameter_changes(engine: Any, groups: Iterable[tuple[HyperParameters, HyperParameters]]) -> list[str]:
    """List hyper-parameters that are not the checkpoint's, a line for each, given its groups and this run's. What some
    schedule sets is left out: its saved value says nothing about the JSON's.
    """
    momentum = ("betas", "momentum") if getattr(engine.lr_scheduler, "cycle_momentum", False) else ()
    lines: dict[str, None] = {}
    for saved, group in groups:
        for key in sorted(saved.keys() & group.keys() - _NOT_COMPARED - {"lr", "initial_lr", *momentum}):
            before, now = (list(one) if isinstance(one, (list, tuple)) else one for one in (saved[key], group[key]))
            if before != now:
                label = group.get("name") or f"weight_decay {group.get('weight_decay')!r}"
                lines[f"optimizer group ({label}): {key} was {before!r}, is now {now!r} (from the JSON)"] = None
    return list(lines)


def _catch_up(engine: Any) -> None:
    """Bring a new engine's scheduler, if it has one, to the engine's step: it is stepped as often as the optimizer was.

    Its saved state is not used: torch's schedulers keep the JSON's numbers in it, so that it would undo a change of
    them, and go on from the optimizer's rate, which is the JSON's after a resume; DeepSpeed's own set the rate only
    after the next step.
    """
    if engine.lr_scheduler is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch expects a step of the optimizer before
        for _ in range(engine.global_steps - engine.skipped_steps):
            engine.lr_scheduler.step()


def parameter_groups(engine: Any) -> list[list[str]]:
    """Name the parameters in every group of an optimizer without ZeRO, whose state dict numbers them; [] with ZeRO."""
    if engine.zero_optimization():
        return []
    names = zero_view.parameter_names(engine)
    return [[names[id(p)] for p in members] for _, members in zero_view.grouped_parameters(engine)]


def write_portable(engine: Any, state: PortableState, ranks: ControlGroup) -> None:
    """Give a new engine the state's weights, optimizer state and counters, but no hyper-parameters. Collective; raises
    CheckpointError where the optimizer is not the checkpoint's. The parameters are, see `refuse_differences`, and what
    lies on NVMe was refused, see `refuse_layouts`.
    """
    owned = list(zero_view.owned_pieces(engine))
    ranks.on_every_rank(lambda: _write_optimizer_states(engine, owned, state))
    with torch.no_grad():
        for piece in owned:
            flat = piece.tensor.data.view(-1)
            for f in piece.fragments:
                flat[f.offset : f.offset + f.numel] = state.parameters[f.name].weight.read(f.start, f.numel)
        for name, buffer in engine.module.named_buffers():
            if name in state.buffers:
                buffer.copy_(state.buffers[name])
    zero_view.refresh_16_bit_copies(engine)
    engine.global_steps, engine.skipped_steps = state.global_steps, state.skipped_steps
    engine.global_samples = state.global_samples
    scaler = zero_view.loss_scaler(engine)
    if scaler is not None and scaler.dynamic and state.loss_scaler is not None:
        for key in LOSS_SCALER_FIELDS:
            setattr(scaler, key, state.loss_scaler[key])


def _write_optimizer_states(engine: Any, owned: list[zero_view.Owned], state: PortableState) -> None:
    if any(parameter.moments or parameter.scalars for parameter in state.parameters.values()):
        zero_view.create_optimizer_state(engine, owned)
        for piece in owned:
            _write_optimizer_state(engine, piece, state)


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
