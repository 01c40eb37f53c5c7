"""Resuming a checkpoint with the same settings, through DeepSpeed's own files, or with others, parameter by
parameter.
"""

from __future__ import annotations

from typing import Any

from chatgot.checkpoint import load, manifest
from chatgot.checkpoint.load import Found
from chatgot.checkpoint.portable import read_portable
from chatgot.checkpoint.portable_write import hyper_parameter_changes, write_portable
from chatgot.distributed import ControlGroup
from chatgot.engine import zero_view
from chatgot.errors import CheckpointError

CHANGED = "changed since the checkpoint: "

MAY_CHANGE = ("world_size", "zero_stage", "precision", "layout")
"""Fields of the manifest that decide what DeepSpeed's files look like."""

ANNOUNCED = ("learning_rates", "gradient_clipping")
"""Fields of the manifest that follow the JSON, and that not every stage's files hold as the JSON said them."""

_LAYOUT = (
    "offload_optimizer",
    "offload_param",
    "sub_group_size",
    "round_robin_gradients",
    "parameter_alignment",
    "elastic_checkpoint",
)


def layout(deepspeed: dict[str, Any]) -> dict[str, Any]:
    """What else, besides stage, ranks and precision, decides the layout of DeepSpeed's files: of a resolved JSON, for
    the manifest.
    """
    zero = deepspeed.get("zero_optimization")
    stated = {key: zero[key] for key in _LAYOUT if zero.get(key) is not None} if isinstance(zero, dict) else {}
    ratio = stated.get("offload_optimizer", {}).get("ratio", 1.0)
    for key in ("offload_optimizer", "offload_param"):
        if key in stated:
            stated[key] = stated[key].get("device", "none")
    if stated.get("offload_optimizer") == "cpu" and ratio < 1:
        stated["offload_optimizer.ratio"] = ratio
    stated["grad_accum_dtype"] = (deepspeed.get("data_types") or {}).get("grad_accum_dtype")
    return {key: value for key, value in stated.items() if value not in (None, "none", False)}


def refuse_layouts(found: Found, now: dict[str, Any]) -> None:
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
        nvme = [
            f"zero_optimization.{key}.device = nvme"
            for key in ("offload_optimizer", "offload_param")
            if kept.get(key) == "nvme"
        ]
        part = [f"zero_optimization.{key} = {kept[key]}" for key in ("offload_optimizer.ratio",) if key in kept]
        if stated := nvme + part:
            raise CheckpointError(
                f"{found.path}: {whose} has {stated[0]}, and such a run can be resumed with the same settings only, "
                f"but different are "
                + ", ".join(str(one).removeprefix("layout.") for one in changed)
                + ". Resume with the checkpoint's settings; to be free to move, offload to the CPU, with ratio 1"
            )


def resume(engine: Any, found: Found, now: dict[str, Any], ranks: ControlGroup) -> tuple[dict[str, Any], list[str]]:
    """Load a checkpoint into a new engine, whatever its MAY_CHANGE fields are. Collective.

    Args:
        now: the manifest's fields of this run.

    Returns:
        The client state that `save` was given, and one line per change.

    Raises:
        CheckpointError: on all ranks, if any could not load.
    """
    changed = manifest.differences(found.manifest, now, MAY_CHANGE)
    told = [f"{CHANGED}{one}" for one in manifest.differences(found.manifest, now, ANNOUNCED)]
    if not changed:
        client_state, notes = load.load(engine, found, ranks)
        return client_state, told + notes
    error, client_state = None, {}
    state = None
    try:
        state = read_portable(found)
        client_state = state.client_state
    except CheckpointError as caught:
        error = caught
    ranks.agree(error)
    assert state is not None
    write_portable(engine, state, ranks)
    notes = (
        [CHANGED + str(one).removeprefix("layout.") for one in changed] + told + hyper_parameter_changes(engine, state)
    )
    scaler = zero_view.loss_scaler(engine)
    if scaler is not None and scaler.dynamic and state.loss_scaler is None:
        notes.append(f"fp16: the checkpoint has no loss scale; starting with {scaler.cur_scale:g}")
    return client_state, notes
