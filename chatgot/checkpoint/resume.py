"""Resuming a checkpoint with the same settings, through DeepSpeed's own files, or with others, parameter by parameter."""

from __future__ import annotations

from typing import Any

from chatgot.checkpoint import load
from chatgot.checkpoint.load import Found
from chatgot.checkpoint.portable import read_portable
from chatgot.checkpoint.portable_write import hyper_parameter_changes, write_portable
from chatgot.checkpoint.ranks import Ranks
from chatgot.config.errors import CheckpointError

MAY_CHANGE = ("world_size", "zero_stage", "precision", "layout")
"""Fields of the manifest that decide what DeepSpeed's files look like."""

_LAYOUT = ("offload_optimizer", "offload_param", "sub_group_size", "round_robin_gradients", "parameter_alignment", "elastic_checkpoint")


def layout(deepspeed: dict[str, Any]) -> dict[str, Any]:
    """What else, besides stage, ranks and precision, decides the layout of DeepSpeed's files: of a resolved JSON, for the manifest."""
    zero = deepspeed.get("zero_optimization")
    stated = {key: zero[key] for key in _LAYOUT if zero.get(key) is not None} if isinstance(zero, dict) else {}
    for key in ("offload_optimizer", "offload_param"):
        if key in stated:
            stated[key] = stated[key].get("device", "none")
    stated["grad_accum_dtype"] = (deepspeed.get("data_types") or {}).get("grad_accum_dtype")
    return {key: value for key, value in stated.items() if value not in (None, "none", False)}


def changes(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One line per field of MAY_CHANGE that differs: 'world_size: 2 -> 1'."""
    lines = []
    for field in MAY_CHANGE:
        before, after = saved.get(field), now.get(field)
        if isinstance(before, dict) and isinstance(after, dict):
            for key in sorted(before.keys() | after.keys()):
                if before.get(key) != after.get(key):
                    lines.append(f"{key}: {_shown(before.get(key))} -> {_shown(after.get(key))}")
        elif before != after:
            lines.append(f"{field}: {_shown(before)} -> {_shown(after)}")
    return lines


def _shown(value: Any) -> str:
    return "not given" if value is None else str(value)


def resume(engine: Any, found: Found, now: dict[str, Any], ranks: Ranks) -> tuple[dict[str, Any], list[str]]:
    """Load a checkpoint into a new engine, whatever its MAY_CHANGE fields are. Collective.

    Args:
        now: the manifest's fields of this run.

    Returns:
        The client state that `save` was given, and one line per change.

    Raises:
        CheckpointError: on all ranks, if any could not load.
    """
    notes = changes(found.manifest, now)
    if not notes:
        return load.load(engine, found, ranks)
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
    notes = [f"changed since the checkpoint: {line}" for line in notes] + hyper_parameter_changes(engine, state)
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is not None and scaler.dynamic and state.loss_scaler is None:
        notes.append(f"fp16: the checkpoint has no loss scale; starting with {scaler.cur_scale:g}")
    return client_state, notes
