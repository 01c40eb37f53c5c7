"""Resuming a checkpoint with the same settings, through DeepSpeed's own files, or with others, parameter by
parameter.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Mapping
from typing import Any

from chatgot.checkpoint import manifest
from chatgot.checkpoint.load import Found
from chatgot.checkpoint.manifest import MAY_CHANGE, ClientState
from chatgot.checkpoint.portable import PortableState, write_portable
from chatgot.checkpoint.reading import explained, read_portable, weights_only
from chatgot.distributed import ControlGroup
from chatgot.engine import zero_view
from chatgot.errors import CheckpointError

CHANGED = "changed since the checkpoint: "

_OFFLOADS = ("offload_optimizer", "offload_param")
_LAYOUT = (*_OFFLOADS, "sub_group_size", "round_robin_gradients", "parameter_alignment", "elastic_checkpoint")
_NOT_COMPARED = frozenset(
    ["params", "step", "name", "fused", "foreach", "capturable", "differentiable", "_ds_source_param_group_id"]
)
"""Keys of an optimizer group that do not change what is computed."""


def layout(deepspeed: dict[str, Any]) -> dict[str, Any]:
    """Name what else, besides stage, ranks and precision, decides the layout of DeepSpeed's files; for the manifest.

    Args:
        deepspeed: the resolved JSON.
    """
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
    """Refuse what cannot be read or filled parameter by parameter, before an engine is built.

    Raises:
        CheckpointError: something of MAY_CHANGE differs, and the checkpoint or this run offloads to NVMe or a part of
            the optimizer only.
    """
    changed = manifest.differences(found.manifest, now, MAY_CHANGE)
    if not changed:
        return
    for whose, fields in (("the checkpoint's run", found.manifest), ("this run", now)):
        kept = fields.get("layout") or {}
        stated = [f"zero_optimization.{key}.device = nvme" for key in _OFFLOADS if kept.get(key) == "nvme"]
        if (ratio := kept.get("offload_optimizer.ratio")) is not None:
            stated.append(f"zero_optimization.offload_optimizer.ratio = {ratio}")
        if stated:
            raise CheckpointError(
                f"{found.path}: {whose} has {stated[0]}, and such a run can be resumed with the same settings only, "
                f"but different are {', '.join(map(str, changed))}. Resume with the checkpoint's settings; to be free "
                "to move, offload to the CPU, with ratio 1"
            )


def resume(engine: Any, found: Found, now: Mapping[str, Any], ranks: ControlGroup) -> tuple[ClientState, list[str]]:
    """Load a checkpoint into a new engine, whatever its MAY_CHANGE fields are. Collective.

    Args:
        now: the manifest's fields of this run.

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
        return client_state, notes + more
    error, state = None, None
    try:
        state = read_portable(found)
    except CheckpointError as caught:
        error = caught
    ranks.agree(error)
    assert state is not None
    write_portable(engine, state, ranks)
    _catch_up(engine)
    notes += _hyper_parameter_changes(engine, state)
    scaler = zero_view.loss_scaler(engine)
    if scaler is not None and scaler.dynamic and state.loss_scaler is None:
        notes.append(f"fp16: the checkpoint has no loss scale; starting with {scaler.cur_scale:g}")
    return state.client_state, notes


def load(engine: Any, found: Found, ranks: ControlGroup) -> tuple[ClientState, list[str]]:
    """Load weights, optimizer and counters of the same settings, and put the JSON's hyper-parameters back. Collective.

    DeepSpeed returns (None, None) with a warning where there is nothing to load, and its resumed optimizer has the
    checkpoint's learning rate, betas, weight decay and (ZeRO 1-2) clipping, whatever the JSON says.

    Returns:
        The client state that `Saver.begin` was given, and one line per hyper-parameter that differs from the
        checkpoint's.

    Raises:
        CheckpointError: on all ranks, if any could not load.
    """
    wished = [{key: value for key, value in one.items() if key != "params"} for one in engine.optimizer.param_groups]
    error, loaded = None, None
    try:
        # The BF16_Optimizer prints keys of the file. A checkpoint never runs code.
        with contextlib.redirect_stdout(io.StringIO()), weights_only():
            path, loaded = engine.load_checkpoint(str(found.folder), tag=found.tag, load_lr_scheduler_states=False)
        if path is None or "chatgot" not in (loaded or {}):
            error = CheckpointError(f"{found.path}: DeepSpeed found nothing to load there")
    except Exception as caught:  # noqa: BLE001  # files that nobody has checked: whatever torch and DeepSpeed raise
        error = CheckpointError(f"{found.path}: cannot be loaded: {explained(caught)}")
    ranks.agree(error)
    notes = _reapply(engine, wished)
    _catch_up(engine)
    assert loaded is not None
    return loaded["chatgot"], notes


def _reapply(engine: Any, wished: list[dict[str, Any]]) -> list[str]:
    notes = []
    for index, (group, ours) in enumerate(zip(engine.optimizer.param_groups, wished)):
        for key, value in ours.items():
            theirs = group.get(key)
            if _plain(theirs) != _plain(value) and key not in _scheduled(engine):
                notes.append(f"optimizer group {index}: {key} was {theirs!r}, is now {value!r} (from the JSON)")
            group[key] = value
    if hasattr(engine.optimizer, "clip_grad"):
        engine.optimizer.clip_grad = engine.gradient_clipping()
    return notes


def _hyper_parameter_changes(engine: Any, state: PortableState) -> list[str]:
    """One line per hyper-parameter of a parameter's group that is not the checkpoint's. Groups are matched by their
    parameters.
    """
    lines: dict[str, None] = {}
    names = zero_view.parameter_names(engine)
    for group, members in zero_view.grouped_parameters(engine):
        for parameter in members:
            saved = state.groups[state.parameters[names[id(parameter)]].group] if state.groups else {}
            for key in saved.keys() & group.keys() - _NOT_COMPARED - _scheduled(engine):
                before, now = _plain(saved[key]), _plain(group[key])
                if before != now:
                    label = group.get("name") or f"weight_decay {group.get('weight_decay')!r}"
                    lines[f"optimizer group ({label}): {key} was {before!r}, is now {now!r} (from the JSON)"] = None
    return list(lines)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def _scheduled(engine: Any) -> set[str]:
    """Keys of an optimizer group that some schedule sets, so that their saved values say nothing about the JSON's."""
    momentum = {"betas", "momentum"} if getattr(engine.lr_scheduler, "cycle_momentum", False) else set()
    return {"lr", "initial_lr"} | momentum


def _catch_up(engine: Any) -> None:
    """Bring a new engine's scheduler, if it has one, to the step that the engine has been brought to.

    It is stepped as often as the optimizer has been. Its saved state is not used: torch's schedulers keep the JSON's
    numbers in it, so that it would undo a change of them, and go on from the optimizer's rate, which is the JSON's
    after a resume; DeepSpeed's own set the rate only after the next step.
    """
    if engine.lr_scheduler is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch expects a step of the optimizer before
        for _ in range(engine.global_steps - engine.skipped_steps):
            engine.lr_scheduler.step()
