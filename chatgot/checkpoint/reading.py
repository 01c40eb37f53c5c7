"""Reading DeepSpeed's files without running code, and of any ZeRO stage as a PortableState, by their layout only."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from chatgot.checkpoint.load import Found
from chatgot.checkpoint.portable import (
    LOSS_SCALER_FIELDS,
    MOMENTUM,
    HyperParameters,
    PortableParameter,
    PortableState,
    join,
    stored,
)
from chatgot.engine.zero_view import Fragment, cut_each, cut_group, whole
from chatgot.errors import CheckpointError


@contextlib.contextmanager
def weights_only() -> Iterator[None]:
    """Restrict every torch.load within it, also those of DeepSpeed, which ask for the opposite (weights_only=False).

    torch's own switch for that is an environment variable (torch/serialization.py, load). The classes are those that
    DeepSpeed 0.19.8 puts into its optimizer files; none of them does anything when it is made.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def read(path: Path) -> dict[str, Any]:
    """Load one file of a checkpoint without running code: tensors, plain containers and a few classes, nothing else.

    Its tensors are on the CPU and memory-mapped: their elements are read from the file when they are used. Only torch's zip format can be mapped; with checkpoint.checkpoint_serialization = false in the JSON, DeepSpeed
    writes the older one, which is read as a whole.
    """
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"  # as torch/serialization.py, _is_zipfile
    with weights_only():
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def explained(error: Exception) -> str:
    """Say what went wrong, without torch's advice to load the file with weights_only=False."""
    message = str(error)
    if "weights_only" in message or "Weights only" in message:
        name = re.search(r"(?:GLOBAL|class|function|global) ([\w.]+)", message)
        what = f" ({name.group(1)})" if name else f": {message.splitlines()[-1]}"
        return (
            f"refused: it holds more than tensors and plain values{what}; a checkpoint never needs that, and loading "
            "it could run code"
        )
    return f"{type(error).__name__}: {message}"


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
    except Exception as error:  # files that nobody has checked: whatever torch and their contents raise
        raise CheckpointError(f"{found.path}: cannot be read: {explained(error)}") from error


def _read_portable(found: Found) -> PortableState:
    at_stage_3 = found.path / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    model = read(at_stage_3 if at_stage_3.is_file() else found.path / "mp_rank_00_model_states.pt")
    loss_scaler = None
    if model.get("optimizer") is not None:
        parameters, groups = _without_zero(found, model)
    else:
        paths, ranks = sorted(found.path.glob("*_optim_states.pt"), key=_rank), model["dp_world_size"]
        if [_rank(path) for path in paths] != list(range(ranks)):
            names = ", ".join(path.name for path in paths) or "none"
            raise CheckpointError(f"{found.path}: {ranks} optimizer shards are needed, there are: {names}")
        shards = [read(path)["optimizer_state_dict"] for path in paths]
        parameters, groups = {}, _base_groups(shards[0])
        flats = _stage_3 if "fp32_flat_groups" in shards[0] else _flat_groups
        for flat in flats(model["param_shapes"], shards, groups):
            for name, parameter in flat.parameters():
                if name in parameters:
                    raise CheckpointError(f"{found.path}: parameter {name} is there twice")
                parameters[name] = parameter
        loss_scaler = _loss_scaler(shards[0].get("loss_scaler"))
    buffers = {name: model["module"][name] for name in model.get("buffer_names") or [] if name in model["module"]}
    shared = model.get("shared_params")
    return PortableState(
        parameters=parameters,
        groups=[{key: value for key, value in group.items() if key != "params"} for group in groups],
        buffers=buffers,
        tied=dict(shared) if shared is not None else _tied(model["module"], parameters, buffers),
        global_steps=model["global_steps"],
        skipped_steps=model["skipped_steps"],
        global_samples=model["global_samples"],
        loss_scaler=loss_scaler,
        client_state=model["chatgot"],
    )


def _without_zero(found: Found, model: dict[str, Any]) -> tuple[dict[str, PortableParameter], list[HyperParameters]]:
    """Stage 0: torch's own state dict. It knows parameters by number only; their names come from the client state."""
    names = model.get("chatgot", {}).get("parameter_groups")
    states, groups = model["optimizer"]["state"], model["optimizer"]["param_groups"]
    if names is None or [len(members) for members in names] != [len(group["params"]) for group in groups]:
        raise CheckpointError(
            f"{found.path}: does not say which parameters its optimizer's groups hold; it can be resumed with the "
            "same settings only"
        )
    parameters = {}
    for index, (members, group) in enumerate(zip(names, groups)):
        for name, number in zip(members, group["params"]):
            weight, state = model["module"][name], states.get(number, {})
            moments = {key: stored(value, weight.shape) for key, value in state.items() if not _is_scalar(value)}
            parameters[name] = PortableParameter(stored(weight, weight.shape), index, moments, _scalars(state, group))
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
        same = [p for p in alike if module[p].data_ptr() == copy.data_ptr()]
        same = same or [p for p in alike if torch.equal(module[p], copy)]
        if not same:
            raise ValueError(f"{name}: no parameter of the optimizer, no buffer, and no other name of a parameter")
        tied[name] = same[0]
    return tied


@dataclass(frozen=True)
class _Flat:
    """A flat tensor of a ZeRO optimizer, cut up among the ranks: what every rank holds, in rank order."""

    shapes: dict[str, torch.Size]
    group: int
    hyper_parameters: HyperParameters
    cuts: list[list[Fragment]]
    momentum_cuts: list[list[Fragment]]
    masters: list[torch.Tensor]
    states: list[dict[str, Any]]
    """The optimizer's for it."""

    def parameters(self) -> Iterator[tuple[str, PortableParameter]]:
        """The parameters in it, by name."""
        weights = join(self.shapes, self.cuts, self.cuts, self.masters)
        moments = {}
        for key in sorted({key for state in self.states for key, value in state.items() if not _is_scalar(value)}):
            held = self.momentum_cuts if key == MOMENTUM else self.cuts
            parts = [state.get(key, torch.empty(0)) for state in self.states]
            moments[key] = join(self.shapes, self.cuts, held, parts)
        scalars = _scalars(next((state for state in self.states if state), {}), self.hyper_parameters)
        for name, weight in weights.items():
            own = {key: tensors[name] for key, tensors in moments.items()}
            yield name, PortableParameter(weight, self.group, own, dict(scalars))


def _flat_groups(
    shapes_of_groups: list[dict[str, torch.Size]], shards: list[dict[str, Any]], groups: list[HyperParameters]
) -> Iterator[_Flat]:
    """ZeRO 1-2 and the BF16_Optimizer: one flat tensor per parameter group."""
    for index, shapes in enumerate(shapes_of_groups):
        masters = [shard["single_partition_of_fp32_groups"][index].detach() for shard in shards]
        size = masters[0].numel()
        if "zero_stage" in shards[0]:
            size += shards[0]["group_paddings"][index]  # which those files leave out
        numels = {name: shape.numel() for name, shape in shapes.items()}
        paddings = (shards[0].get("param_alignment_paddings") or [[]] * (index + 1))[index]
        cuts = [cut_group(list(numels.items()), size, rank, paddings) for rank in range(len(shards))]
        states = [_base_state(shard, index) for shard in shards]
        momentum_cuts = _momentum_cuts(cuts, states, numels, size)
        yield _Flat(shapes, index, groups[index] if groups else {}, cuts, momentum_cuts, masters, states)


def _momentum_cuts(
    cuts: list[list[Fragment]], states: list[dict[str, Any]], numels: dict[str, int], partition_size: int
) -> list[list[Fragment]]:
    """Muon's momentum is laid out like the weights with offloading or in a BF16_Optimizer, else by whole matrices."""
    if not any(MOMENTUM in state for state in states):
        return cuts
    held = [state[MOMENTUM].numel() if MOMENTUM in state else 0 for state in states]
    # Without padding, which zero_optimization.elastic_checkpoint leaves out.
    filled = [max((f.offset + f.numel for f in cut), default=0) for cut in cuts]
    if all(count in (partition_size, full) for count, full in zip(held, filled)):
        return cuts
    matrices = [whole(numels, cut) for cut in cuts]
    if [sum(f.numel for f in cut) for cut in matrices] != held:
        raise ValueError(f"{MOMENTUM}: {held} elements on the ranks fit no layout of {len(numels)} matrices")
    return matrices


def _stage_3(
    shapes_of_groups: list[dict[str, torch.Size]], shards: list[dict[str, Any]], groups: list[HyperParameters]
) -> Iterator[_Flat]:
    """ZeRO 3: one flat tensor per sub-group; `param_shapes` has one entry per sub-group too."""
    group_of = {number: index for index, group in enumerate(groups) for number in group["params"]}
    for number, shapes in enumerate(shapes_of_groups):
        masters = [shard["fp32_flat_groups"][number].detach() for shard in shards]
        numels = [(name, shape.numel()) for name, shape in shapes.items()]
        cuts = [cut_each(numels, len(shards), rank) for rank in range(len(shards))]
        states = [shard["optimizer_state_dict"]["state"].get(number, {}) for shard in shards]
        group = group_of[number]
        yield _Flat(shapes, group, groups[group], cuts, cuts, masters, states)


def _base_groups(shard: dict[str, Any]) -> list[HyperParameters]:
    base = shard.get("base_optimizer_state", shard.get("optimizer_state_dict"))
    return base["param_groups"] if isinstance(base, dict) else []


def _base_state(shard: dict[str, Any], group: int) -> dict[str, Any]:
    """The optimizer's state for a flat group; zero_optimization.elastic_checkpoint stores a list instead of a dict."""
    base = shard["base_optimizer_state"]
    if isinstance(base, dict):
        return base["state"].get(group, {})
    step = shard.get("base_optimizer_state_step")
    return {**base[group], **({} if step is None else {"step": step})}


def _is_scalar(value: Any) -> bool:
    return not isinstance(value, torch.Tensor) or value.dim() == 0


def _scalars(state: dict[str, Any], group: dict[str, Any]) -> dict[str, float | int]:
    scalars = {key: value for key, value in state.items() if _is_scalar(value)}
    if state and "step" in group:
        scalars.setdefault("step", group["step"])
    plain = {key: value.item() if isinstance(value, torch.Tensor) else value for key, value in scalars.items()}
    return {key: value for key, value in plain.items() if isinstance(value, (int, float))}


def _loss_scaler(scaler: Any) -> dict[str, float | int] | None:
    if scaler is None or not scaler.dynamic:
        return None
    return {key: getattr(scaler, key) for key in LOSS_SCALER_FIELDS}


def _rank(path: Path) -> int:
    match = re.search(r"zero_pp_rank_(\d+)_", path.name)
    return int(match.group(1)) if match else -1
