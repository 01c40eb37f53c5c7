"""A checkpoint as weights and optimizer state per parameter, whatever ZeRO stage, number of ranks, offload and precision
wrote it, and putting it into a new engine of any of these, bit for bit.

Elements stay in the memory-mapped files until somebody asks a StoredTensor for a range of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from chatgot.checkpoint.manifest import ClientState
from chatgot.distributed import ControlGroup
from chatgot.engine import zero_view
from chatgot.engine.zero_view import Fragment
from chatgot.errors import CheckpointError

MOMENTUM = "momentum_buffer"
LOSS_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
HyperParameters = dict[str, Any]
"""A parameter group of an optimizer."""


@dataclass(frozen=True)
class Piece:
    """`numel` elements of a tensor, flattened, from `start` on: those of `source` (1-D) from `offset` on."""

    start: int
    numel: int
    source: torch.Tensor
    offset: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor whose elements stay in the files until they are read. The pieces hold each of them once, in order."""

    shape: torch.Size
    pieces: tuple[Piece, ...]

    def read(self, start: int, numel: int) -> torch.Tensor:
        """Read elements [start, start + numel) of the flattened tensor: a new fp32 tensor (numel,) on the CPU.

        Raises:
            ValueError: the range is not inside the tensor.
        """
        if start < 0 or numel < 0 or start + numel > self.shape.numel():
            raise ValueError(f"elements [{start}, {start + numel}) of a tensor of {self.shape.numel()}")
        elements = torch.empty(numel, dtype=torch.float32)
        for piece in self.pieces:
            left, right = max(start, piece.start), min(start + numel, piece.start + piece.numel)
            if left < right:
                offset = piece.offset + left - piece.start
                elements[left - start : right - start] = piece.source[offset : offset + right - left]
        return elements

    def whole(self) -> torch.Tensor:
        """Read all of it: a new fp32 tensor of its shape on the CPU."""
        return self.read(0, self.shape.numel()).view(self.shape)


def stored(tensor: torch.Tensor, shape: torch.Size) -> StoredTensor:
    """Make a StoredTensor of a tensor that lies in one piece.

    Raises:
        ValueError: it has another number of elements than `shape`.
    """
    if tensor.numel() != shape.numel():
        raise ValueError(f"{tensor.numel()} elements in the file, {tuple(shape)} has {shape.numel()}")
    return StoredTensor(shape, (Piece(0, tensor.numel(), tensor.detach().reshape(-1), 0),))


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
    pieces: dict[str, list[Piece]] = {name: [] for name in shapes}
    for rank, (own, have, part) in enumerate(zip(owned, held, parts)):
        place = {fragment.name: fragment for fragment in have}
        for fragment in own:
            source = place[fragment.name]
            offset = source.offset + fragment.start - source.start
            end, ends = offset + fragment.numel, fragment.start + fragment.numel
            if offset < 0 or ends > source.start + source.numel or end > part.numel():
                where = f"elements [{offset}, {end}) of rank {rank}'s shard, which has {part.numel()}"
                raise ValueError(f"{fragment.name}: {where}")
            pieces[fragment.name].append(Piece(fragment.start, fragment.numel, part.detach().reshape(-1), offset))
    for name, ordered in pieces.items():
        ordered.sort(key=lambda piece: piece.start)
        end = 0
        for piece in ordered:
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
    """Hyper-parameters of the optimizer's parameter groups; empty where zero_optimization.elastic_checkpoint did not
    keep them.
    """
    buffers: dict[str, torch.Tensor]
    tied: dict[str, str]
    """Other names of parameters in the model's state dict: name -> the parameter's."""
    global_steps: int
    skipped_steps: int
    global_samples: int
    loss_scaler: dict[str, float | int] | None
    """LOSS_SCALER_FIELDS of fp16's dynamic loss scaler; None where there was none."""
    client_state: ClientState


def parameter_groups(engine: Any) -> list[list[str]]:
    """Name the parameters in every group of an optimizer without ZeRO, whose state dict numbers them; [] with ZeRO."""
    if engine.zero_optimization():
        return []
    names = zero_view.parameter_names(engine)
    return [[names[id(p)] for p in group["params"]] for group in engine.optimizer.param_groups]


def write_portable(engine: Any, state: PortableState, ranks: ControlGroup) -> None:
    """Give a new engine the state's weights, optimizer state and counters. Collective.

    The optimizer's hyper-parameters stay those of the engine.

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
    engine.global_steps, engine.skipped_steps = state.global_steps, state.skipped_steps
    engine.global_samples = state.global_samples
    scaler = zero_view.loss_scaler(engine)
    if scaler is not None and scaler.dynamic and state.loss_scaler is not None:
        for key in LOSS_SCALER_FIELDS:
            setattr(scaler, key, state.loss_scaler[key])


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
