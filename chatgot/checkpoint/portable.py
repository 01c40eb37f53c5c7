"""A checkpoint as weights and optimizer state per parameter, whatever ZeRO stage, number of ranks, offload and
precision wrote it: read from DeepSpeed's files by their layout.

Elements stay in the memory-mapped files until somebody asks a StoredTensor for a range of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from chatgot.checkpoint.load import Found
from chatgot.checkpoint.manifest import ClientState
from chatgot.checkpoint.pickles import read
from chatgot.engine.zero_view import Fragment, cut_each, cut_group, whole
from chatgot.errors import CheckpointError, quoted

MOMENTUM = "momentum_buffer"
LOSS_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
HyperParameters = dict[str, Any]
"""A parameter group of an optimizer."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor whose elements stay in the files until they are read."""

    shape: torch.Size
    pieces: tuple[tuple[Fragment, torch.Tensor], ...]
    """Each of its elements once, in order, and the flat tensor that a fragment lies in."""

    def read(self, start: int, numel: int) -> torch.Tensor:
        """Read elements [start, start + numel) of the flattened tensor: a new fp32 tensor (numel,) on the CPU."""
        if start < 0 or numel < 0 or start + numel > self.shape.numel():
            raise ValueError(f"elements [{start}, {start + numel}) of a tensor of {self.shape.numel()}")
        elements = torch.empty(numel, dtype=torch.float32)
        for piece, source in self.pieces:
            left, right = max(start, piece.start), min(start + numel, piece.start + piece.numel)
            if left < right:
                offset = piece.offset + left - piece.start
                elements[left - start : right - start] = source[offset : offset + right - left]
        return elements

    def whole(self) -> torch.Tensor:
        """Read all of it: a new fp32 tensor of its shape on the CPU."""
        return self.read(0, self.shape.numel()).view(self.shape)


def stored(tensor: torch.Tensor, shape: torch.Size) -> StoredTensor:
    """Make a StoredTensor of a tensor that lies in one piece; ValueError: it does not fill `shape`."""
    if tensor.numel() != shape.numel():
        raise ValueError(f"{tensor.numel()} elements in the file, {tuple(shape)} has {shape.numel()}")
    return StoredTensor(shape, ((Fragment("", 0, tensor.numel(), 0), tensor.detach().reshape(-1)),))


def join(
    shapes: dict[str, torch.Size], owned: list[list[Fragment]], held: list[list[Fragment]], parts: list[torch.Tensor]
) -> dict[str, StoredTensor]:
    """Put every rank's parts together, without reading their elements.

    Args:
        owned: by rank, the pieces that it is the owner of; together they are all elements, each once.
        held: by rank, the pieces that its part holds; the owned ones or more.
        parts: by rank, its flat tensor.

    Raises:
        ValueError: the pieces are not all elements, each once, or a part is too short for its pieces.
    """
    pieces: dict[str, list[tuple[Fragment, torch.Tensor]]] = {name: [] for name in shapes}
    for rank, (own, have, part) in enumerate(zip(owned, held, parts)):
        place = {fragment.name: fragment for fragment in have}
        for fragment in own:
            source = place[fragment.name]
            offset = source.offset + fragment.start - source.start
            end, ends = offset + fragment.numel, fragment.start + fragment.numel
            if offset < 0 or ends > source.start + source.numel or end > part.numel():
                shard = f"rank {rank}'s shard, which has {part.numel()}"
                raise ValueError(f"{fragment.name}: elements [{offset}, {end}) of {shard}")
            pieces[fragment.name].append((replace(fragment, offset=offset), part.detach().reshape(-1)))
    for name, ordered in pieces.items():
        ordered.sort(key=lambda one: one[0].start)
        end = 0
        for piece, _ in ordered:
            if piece.start != end:
                at = f"a shard continues with element {piece.start}, the ones before it end at {end}"
                raise ValueError(f"{name}: {at}")
            end += piece.numel
        if end != shapes[name].numel():
            raise ValueError(f"{name}: the shards have {end} of {shapes[name].numel()} elements")
    return {name: StoredTensor(shapes[name], tuple(ordered)) for name, ordered in pieces.items()}


@dataclass
class PortableParameter:
    """One parameter. Its tensors have the parameter's shape."""

    weight: StoredTensor
    """The fp32 master weight where there is one."""
    group: int
    """Index into PortableState.groups."""
    moments: dict[str, StoredTensor] = field(default_factory=dict)
    """By the optimizer's own names: exp_avg, exp_avg_sq, momentum_buffer."""
    scalars: dict[str, float | int] = field(default_factory=dict)
    """The optimizer's single numbers for this parameter: step."""


@dataclass
class PortableState:
    """All that a resumed run needs of a checkpoint."""

    parameters: dict[str, PortableParameter]
    """By name, each tied weight once."""
    groups: list[HyperParameters]
    """The optimizer's hyper-parameters; empty where zero_optimization.elastic_checkpoint did not keep them."""
    buffers: dict[str, torch.Tensor]
    tied: dict[str, str]
    """Other names of parameters in the model's state dict: name -> the parameter's."""
    global_steps: int
    skipped_steps: int
    global_samples: int
    loss_scaler: dict[str, float | int] | None
    """LOSS_SCALER_FIELDS of fp16's dynamic loss scaler; None where there was none."""
    client_state: ClientState


def fp32_weights(found: Found) -> dict[str, torch.Tensor]:
    """Read the model's state dict in fp32 (masters, where there are) on the CPU: parameters, tied ones under each of
    their names, and buffers. Raises what `read_portable` does.
    """
    state = read_portable(found)
    weights = {name: parameter.weight.whole() for name, parameter in state.parameters.items()}
    for name, buffer in state.buffers.items():
        weights[name] = buffer.to(torch.float32 if buffer.is_floating_point() else buffer.dtype, copy=True)
    return weights | {name: weights[original] for name, original in state.tied.items()}


def read_portable(found: Found) -> PortableState:
    """Open every file of a checkpoint and find each parameter's pieces in them.

    Raises:
        CheckpointError: a file is missing, cannot be read, or the pieces are not all elements, each once.
    """
    try:
        return _read_portable(found)
    except CheckpointError:
        raise
    except Exception as error:  # files that nobody has checked: whatever torch and their contents raise
        raise CheckpointError(f"{found.path}: cannot be read: {quoted(f'{type(error).__name__}: {error}')}") from error


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
        base = shards[0].get("base_optimizer_state", shards[0].get("optimizer_state_dict"))
        parameters, groups = {}, base["param_groups"] if isinstance(base, dict) else []
        flat_tensors = _stage_3 if "fp32_flat_groups" in shards[0] else _flat_groups
        for name, parameter in flat_tensors(model["param_shapes"], shards, groups):
            if name in parameters:
                raise CheckpointError(f"{found.path}: parameter {name} is there twice")
            parameters[name] = parameter
        scaler = shards[0].get("loss_scaler")
        if scaler is not None and scaler.dynamic:
            loss_scaler = {key: getattr(scaler, key) for key in LOSS_SCALER_FIELDS}
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
        unnamed = (
            "does not say which parameters its optimizer's groups hold; it can be resumed with the same settings only"
        )
        raise CheckpointError(f"{found.path}: {unnamed}")
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
    """Find tied weights without ZeRO, where nothing lists them: the names left over, with a parameter's values."""
    tied = {}
    for name in module.keys() - parameters.keys() - buffers.keys():
        copy, alike = module[name], [p for p in parameters if module[p].shape == module[name].shape]
        same = [p for p in alike if module[p].data_ptr() == copy.data_ptr()]
        if not (same := same or [p for p in alike if torch.equal(module[p], copy)]):
            raise ValueError(f"{name}: no parameter of the optimizer, no buffer, and no other name of a parameter")
        tied[name] = same[0]
    return tied


def _parameters(
    shapes: dict[str, torch.Size],
    group: tuple[int, HyperParameters],
    cuts: list[list[Fragment]],
    momentum_cuts: list[list[Fragment]],
    masters: list[torch.Tensor],
    states: list[dict[str, Any]],
) -> Iterator[tuple[str, PortableParameter]]:
    """Find the parameters in a flat tensor that is cut up: cuts, masters and optimizer states by rank."""
    index, hyper_parameters = group
    weights = join(shapes, cuts, cuts, masters)
    moments = {}
    for key in sorted({key for state in states for key, value in state.items() if not _is_scalar(value)}):
        parts = [state.get(key, torch.empty(0)) for state in states]
        moments[key] = join(shapes, cuts, momentum_cuts if key == MOMENTUM else cuts, parts)
    scalars = _scalars(next((state for state in states if state), {}), hyper_parameters)
    for name, weight in weights.items():
        own = {key: tensors[name] for key, tensors in moments.items()}
        yield name, PortableParameter(weight, index, own, dict(scalars))


def _flat_groups(
    shapes_of_groups: list[dict[str, torch.Size]], shards: list[dict[str, Any]], groups: list[HyperParameters]
) -> Iterator[tuple[str, PortableParameter]]:
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
        group = (index, groups[index] if groups else {})
        yield from _parameters(shapes, group, cuts, _momentum_cuts(cuts, states, numels, size), masters, states)


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
) -> Iterator[tuple[str, PortableParameter]]:
    """ZeRO 3: one flat tensor per sub-group; `param_shapes` has one entry per sub-group too."""
    group_of = {number: index for index, group in enumerate(groups) for number in group["params"]}
    for number, shapes in enumerate(shapes_of_groups):
        masters = [shard["fp32_flat_groups"][number].detach() for shard in shards]
        numels = [(name, shape.numel()) for name, shape in shapes.items()]
        cuts = [cut_each(numels, len(shards), rank) for rank in range(len(shards))]
        states = [shard["optimizer_state_dict"]["state"].get(number, {}) for shard in shards]
        group = (group_of[number], groups[group_of[number]])
        yield from _parameters(shapes, group, cuts, cuts, masters, states)


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


def _rank(path: Path) -> int:
    match = re.search(r"zero_pp_rank_(\d+)_", path.name)
    return int(match[1]) if match else -1
