"""How many bytes a checkpoint takes: of the files that DeepSpeed 0.19.8 writes, known before the first one is
written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chatgot.checkpoint import manifest
from chatgot.distributed import ControlGroup
from chatgot.engine.zero_view import owned_pieces

SAME_SIZE = ("parameters", "world_size", "zero_stage", "precision", "layout")
"""Fields of the manifest that two checkpoints of the same size share."""

_FP32 = 4
_PER_FILE = 8_000
"""Bytes of pickled structure in a file, measured: 6 to 8 thousand."""
_PER_TENSOR = 300
"""Bytes of a tensor's zip record beside its data, measured."""
_PER_RNG = 15_000
"""Bytes of one rank's random number generators in the client state, measured."""


def estimate(engine: Any, ranks: ControlGroup) -> int:
    """Bytes of a checkpoint of this engine, manifest left out. Collective.

    Measured, in bytes per parameter with Adam: stage 0 4 + 8; stages 1 and 2 4 + 12 in fp32 and 2 + 12 in bf16 and
    fp16; stage 3 12. That is: the module as it is (stages 0 to 2, once, tied weights once; at stage 3 its parameters
    are placeholders), the fp32 weights of the optimizer (with ZeRO, also where the module is fp32 itself) and its
    moments in fp32; together over all ranks, however many. Muon keeps one moment for its matrices; at stages 1 and 2
    each rank keeps it whole for a matrix on its border.
    """
    zero, stage_3 = engine.zero_optimization(), engine.zero_optimization_stage() == 3
    pieces = list(owned_pieces(engine))
    own = 0
    for piece in pieces:
        numel = sum(fragment.numel for fragment in piece.fragments)
        if piece.group.get("use_muon"):
            moments = sum(fragment.numel for fragment in piece.momentum)
        else:
            moments = numel * _moments(type(engine.basic_optimizer).__name__, piece.group)
        own += _FP32 * ((numel if zero else 0) + moments) + _PER_TENSOR * 3
    optimizer = sum(_PER_FILE + part for part in ranks.gather(own)) if zero else own
    tensors = {id(tensor): tensor for tensor in (*engine.module.parameters(), *_buffers(engine.module))}.values()
    parameters = {id(parameter) for parameter in engine.module.parameters()}
    module = sum(
        0 if stage_3 and id(tensor) in parameters else tensor.numel() * tensor.element_size() for tensor in tensors
    )
    module += _PER_FILE + _PER_TENSOR * len(tensors) + _PER_RNG * ranks.world_size
    return optimizer + module * (ranks.world_size if stage_3 else 1)


def _buffers(module: Any) -> list[Any]:
    """What the state dict holds besides the parameters."""
    saved = module.state_dict().keys()
    return [buffer for name, buffer in module.named_buffers() if name in saved]


def _moments(optimizer: str, group: dict[str, Any]) -> int:
    """Tensors of a parameter's size that an optimizer keeps for it, by the name of its class; two for all that are not
    named here.
    """
    name = optimizer.lower()
    if name == "sgd":
        return int(bool(group.get("momentum")))
    if name == "rmsprop":
        return 1 + int(bool(group.get("momentum"))) + int(bool(group.get("centered")))
    if any(known in name for known in ("lion", "adagrad", "asgd", "adafactor")):
        return 1  # Adafactor keeps even less: sums of rows and columns
    return 2 + int(bool(group.get("amsgrad")))


def of_checkpoint(folder: Path, fields: dict[str, Any]) -> int:
    """Bytes of a checkpoint by its manifest, the manifest itself included."""
    return sum(file["bytes"] for file in fields["files"].values()) + (folder / manifest.NAME).lstat().st_size


def shown(size: float) -> str:
    """'168 MB', '76.1 GB': three digits, units of 1000 as disks are sold and as disk_budget_gb counts."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= 0.9995 * factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} bytes"
