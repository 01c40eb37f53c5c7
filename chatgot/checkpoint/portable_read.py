"""Reading DeepSpeed's files of any ZeRO stage as a PortableState. Only the layout is read here, no elements."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from chatgot.checkpoint import pickles
from chatgot.checkpoint.load import Found
from chatgot.checkpoint.portable import (
    LOSS_SCALER_FIELDS,
    MOMENTUM,
    PortableParameter,
    PortableState,
    join,
    stored,
)
from chatgot.engine.zero_view import Fragment, cut_each, cut_group, whole
from chatgot.errors import CheckpointError


def fp32_weights(found: Found) -> dict[str, torch.Tensor]:
    """The model's state dict in fp32 on the CPU: parameters, tied ones under each of their names, and buffers.

    Of ZeRO's files the fp32 masters are taken. Optimizer state is not read.

    Raises:
        CheckpointError: the files cannot be read.
    """
    state = read_portable(found)
    weights = {name: parameter.weight.whole() for name, parameter in state.parameters.items()}
    for name, buffer in state.buffers.items():
        weights[name] = buffer.to(torch.float32 if buffer.is_floating_point() else buffer.dtype, copy=True)
    return weights | {name: weights[original] for name, original in state.tied.items()}


def read_portable(found: Found) -> PortableState:
    """Open every file of a checkpoint and find each parameter's pieces in them.

    Raises:
        CheckpointError: a file is missing, cannot be read, or does not fit the others: the pieces must be all elements,
            each once.
    """
    try:
        return _read_portable(found)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{found.path}: cannot be read: {pickles.explained(error)}") from error


def _read_portable(found: Found) -> PortableState:
    at_stage_3 = found.path / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    model = pickles.read(at_stage_3 if at_stage_3.is_file() else found.path / "mp_rank_00_model_states.pt")
    loss_scaler = None
    if model.get("optimizer") is not None:
        parameters, groups = _without_zero(found, model)
    else:
        paths = sorted(found.path.glob("*_optim_states.pt"), key=_rank)
        if [_rank(path) for path in paths] != list(range(model["dp_world_size"])):
            names = ", ".join(path.name for path in paths) or "none"
            raise CheckpointError(
                f"{found.path}: {model['dp_world_size']} optimizer shards are needed, there are: {names}"
            )
        shards = [pickles.read(path)["optimizer_state_dict"] for path in paths]
        parameters, groups = (_stage_3 if "fp32_flat_groups" in shards[0] else _flat_groups)(
            found, model["param_shapes"], shards
        )
        loss_scaler = _loss_scaler(shards[0].get("loss_scaler"))
    buffers = {name: model["module"][name] for name in model.get("buffer_names") or [] if name in model["module"]}
    shared = model.get("shared_params")
    return PortableState(
        parameters=parameters,
        groups=groups,
        buffers=buffers,
        tied=dict(shared) if shared is not None else _tied(model["module"], parameters, buffers),
        global_steps=model["global_steps"],
        skipped_steps=model["skipped_steps"],
        global_samples=model["global_samples"],
        loss_scaler=loss_scaler,
        client_state=model["chatgot"],
    )


def _without_zero(found: Found, model: dict[str, Any]) -> tuple[dict[str, PortableParameter], list[dict[str, Any]]]:
    """Stage 0: torch's own state dict. It knows parameters by number only, so their names come from the client
    state.
    """
    names = model.get("chatgot", {}).get("parameter_groups")
    states, groups = model["optimizer"]["state"], _hyper_parameters(model["optimizer"]["param_groups"])
    numbers = [group["params"] for group in model["optimizer"]["param_groups"]]
    if names is None or [len(group) for group in names] != [len(group) for group in numbers]:
        raise CheckpointError(
            f"{found.path}: does not say which parameters its optimizer's groups hold; it can be resumed with the "
            f"same settings only"
        )
    parameters = {}
    for index, (group, members) in enumerate(zip(names, numbers)):
        for name, number in zip(group, members):
            weight = model["module"][name]
            parameter = parameters[name] = PortableParameter(stored(weight, weight.shape), index)
            for key, value in states.get(number, {}).items():
                if not _is_scalar(value):
                    parameter.moments[key] = stored(value, weight.shape)
            parameter.scalars = _scalars(states.get(number, {}), model["optimizer"]["param_groups"][index])
    return parameters, groups


def _tied(
    module: dict[str, torch.Tensor], parameters: dict[str, PortableParameter], buffers: dict[str, torch.Tensor]
) -> dict[str, str]:
    """Without ZeRO DeepSpeed does not list the names of tied weights; they are the names left over, with the values of
    a parameter.
    """
    tied = {}
    for name in module.keys() - parameters.keys() - buffers.keys():
        copy, alike = module[name], [p for p in parameters if module[p].shape == module[name].shape]
        same = [p for p in alike if module[p].data_ptr() == copy.data_ptr()] or [
            p for p in alike if torch.equal(module[p], copy)
        ]
        if not same:
            raise ValueError(
                f"{name}: neither a parameter of the optimizer, nor a buffer, nor another name of a parameter"
            )
        tied[name] = same[0]
    return tied


def _flat_groups(
    found: Found, shapes_of_groups: list[dict[str, torch.Size]], shards: list[dict[str, Any]]
) -> tuple[dict[str, PortableParameter], list[dict[str, Any]]]:
    """ZeRO 1-2 and the BF16_Optimizer: one flat tensor per parameter group."""
    parameters: dict[str, PortableParameter] = {}
    hyper_parameters = _base_groups(shards[0])
    for index, shapes in enumerate(shapes_of_groups):
        masters = [shard["single_partition_of_fp32_groups"][index].detach() for shard in shards]
        size = masters[0].numel()
        if "zero_stage" in shards[0]:
            size += shards[0]["group_paddings"][index]  # which those files leave out
        numels = {name: shape.numel() for name, shape in shapes.items()}
        paddings = (shards[0].get("param_alignment_paddings") or [[]] * (index + 1))[index]
        cuts = [cut_group(list(numels.items()), size, rank, paddings) for rank in range(len(shards))]
        states = [_base_state(shard, index) for shard in shards]
        _assemble(
            found,
            parameters,
            shapes,
            index,
            cuts,
            masters,
            states,
            hyper_parameters[index] if hyper_parameters else {},
            lambda key, cuts=cuts, states=states, numels=numels, size=size: (
                _momentum_cuts(cuts, states, numels, size) if key == MOMENTUM else cuts
            ),
        )
    return parameters, _hyper_parameters(hyper_parameters)


def _momentum_cuts(
    cuts: list[list[Fragment]], states: list[dict[str, Any]], numels: dict[str, int], partition_size: int
) -> list[list[Fragment]]:
    """Muon's momentum is laid out like the weights with offloading or in a BF16_Optimizer, else by whole matrices."""
    held = [states[rank][MOMENTUM].numel() if MOMENTUM in states[rank] else 0 for rank in range(len(states))]
    # Without padding, which zero_optimization.elastic_checkpoint leaves out.
    filled = [max((f.offset + f.numel for f in cut), default=0) for cut in cuts]
    if all(count in (partition_size, full) for count, full in zip(held, filled)):
        return cuts
    found = [whole(numels, cut) for cut in cuts]
    if [sum(f.numel for f in cut) for cut in found] != held:
        raise ValueError(f"{MOMENTUM}: {held} elements on the ranks fit no layout of {len(numels)} matrices")
    return found


def _stage_3(
    found: Found, shapes_of_groups: list[dict[str, torch.Size]], shards: list[dict[str, Any]]
) -> tuple[dict[str, PortableParameter], list[dict[str, Any]]]:
    """ZeRO 3: one flat tensor per sub-group; `param_shapes` has one entry per sub-group too."""
    parameters: dict[str, PortableParameter] = {}
    hyper_parameters = _base_groups(shards[0])
    group_of = {number: index for index, group in enumerate(hyper_parameters) for number in group["params"]}
    for number, shapes in enumerate(shapes_of_groups):
        masters = [shard["fp32_flat_groups"][number].detach() for shard in shards]
        numels = [(name, shape.numel()) for name, shape in shapes.items()]
        cuts = [cut_each(numels, len(shards), rank) for rank in range(len(shards))]
        states = [shard["optimizer_state_dict"]["state"].get(number, {}) for shard in shards]
        _assemble(
            found,
            parameters,
            shapes,
            group_of[number],
            cuts,
            masters,
            states,
            hyper_parameters[group_of[number]],
            lambda key, cuts=cuts: cuts,
        )
    return parameters, _hyper_parameters(hyper_parameters)


def _assemble(
    found: Found,
    parameters: dict[str, PortableParameter],
    shapes: dict[str, torch.Size],
    group: int,
    cuts: list[list[Fragment]],
    masters: list[torch.Tensor],
    states: list[dict[str, Any]],
    hyper_parameters: dict[str, Any],
    cuts_of: Callable[[str], list[list[Fragment]]],
) -> None:
    """Add the parameters of one flat tensor, of which every rank has a part in `masters` and the same of the
    optimizer's in `states`.
    """
    first = next((state for state in states if state), {})
    tensors = {"": join(shapes, cuts, cuts, masters)}
    for key in sorted({key for state in states for key, value in state.items() if not _is_scalar(value)}):
        tensors[key] = join(shapes, cuts, cuts_of(key), [state.get(key, torch.empty(0)) for state in states])
    scalars = _scalars(first, hyper_parameters)
    for name in shapes:
        if name in parameters:
            raise CheckpointError(f"{found.path}: parameter {name} is there twice")
        moments = {key: values[name] for key, values in tensors.items() if key}
        parameters[name] = PortableParameter(tensors[""][name], group, moments, dict(scalars))


def _base_groups(shard: dict[str, Any]) -> list[dict[str, Any]]:
    base = shard.get("base_optimizer_state", shard.get("optimizer_state_dict"))
    return base["param_groups"] if isinstance(base, dict) else []


def _base_state(shard: dict[str, Any], group: int) -> dict[str, Any]:
    """The optimizer's state for a flat group; zero_optimization.elastic_checkpoint stores a list of them instead of a
    state dict.
    """
    base = shard["base_optimizer_state"]
    if isinstance(base, dict):
        return base["state"].get(group, {})
    step = shard.get("base_optimizer_state_step")
    return {**base[group], **({} if step is None else {"step": step})}


def _hyper_parameters(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in groups]


def _is_scalar(value: Any) -> bool:
    return not isinstance(value, torch.Tensor) or value.dim() == 0


def _scalars(state: dict[str, Any], group: dict[str, Any]) -> dict[str, float | int]:
    found = {
        key: value.item() if isinstance(value, torch.Tensor) else value
        for key, value in state.items()
        if _is_scalar(value)
    }
    if state and "step" not in found and "step" in group:
        found["step"] = group["step"]
    return {key: value for key, value in found.items() if isinstance(value, (int, float))}


def _loss_scaler(scaler: Any) -> dict[str, float | int] | None:
    if scaler is None or not scaler.dynamic:
        return None
    return {key: getattr(scaler, key) for key in LOSS_SCALER_FIELDS}


def _rank(path: Path) -> int:
    match = re.search(r"zero_pp_rank_(\d+)_", path.name)
    return int(match.group(1)) if match else -1
