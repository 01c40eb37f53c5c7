"""The state that every optimizer keeps for a tensor it steps: one table, for memory plans and checkpoint sizes.

Held against the optimizers of torch and DeepSpeed 0.19.8 themselves (tests/deepspeed_json/test_optimizer_states.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any


@dataclass(frozen=True)
class OptimizerStates:
    """State of one tensor, in the dtype of that tensor (with ZeRO a flat fp32 partition) unless stated otherwise."""

    tensors: int
    """Shaped like the tensor that is stepped."""
    scalars: int = 1
    """fp32 tensors of one element; a counter that is a Python number is none."""
    factored: bool = False
    """Of a tensor with several dimensions only sums over its last two are kept, not a tensor of its shape."""

    def elements(self, shape: tuple[int, ...]) -> int:
        """Elements that are kept for a tensor of this shape, scalars left out."""
        if self.factored and len(shape) > 1:
            return prod(shape[:-1]) + prod(shape[:-2]) * shape[-1]
        return self.tensors * prod(shape)


_TABLE: dict[str, OptimizerStates] = {
    "adam": OptimizerStates(2),
    "adamw": OptimizerStates(2),
    "fusedadam": OptimizerStates(2, scalars=0),
    "deepspeedcpuadam": OptimizerStates(2, scalars=0),
    "lamb": OptimizerStates(2, scalars=0),
    "lion": OptimizerStates(1, scalars=0),
    "deepspeedcpulion": OptimizerStates(2, scalars=0),  # the second one is made and never used (cpu_lion.py)
    "adagrad": OptimizerStates(1),
    "deepspeedcpuadagrad": OptimizerStates(1, scalars=0),
    "muon": OptimizerStates(2),
    "adadelta": OptimizerStates(2),
    "adafactor": OptimizerStates(1, factored=True),
    "adamax": OptimizerStates(2),
    "asgd": OptimizerStates(1, scalars=3),
    "nadam": OptimizerStates(2, scalars=2),
    "radam": OptimizerStates(2),
    "rmsprop": OptimizerStates(1),
    "rprop": OptimizerStates(2),
    "sgd": OptimizerStates(0, scalars=0),
}
"""By the JSON's `optimizer.type` in lower case. "muon" is its Adam half."""

_CLASSES = {  # another name for the same
    "zenflowcpuadam": "deepspeedcpuadam",
    "fusedlion": "lion",
    "fusedlamb": "lamb",
    "muonwithauxadam": "muon",
}


_OFFLOADED = {"lion": "deepspeedcpulion", "adagrad": "deepspeedcpuadagrad"}


def optimizer_states(optimizer: str, arguments: Mapping[str, Any], offloaded: bool = False) -> OptimizerStates:
    """What an optimizer keeps for each tensor.

    Args:
        optimizer: the JSON's `optimizer.type`, or the name of the class that was built.
        arguments: `optimizer.params`, or a parameter group; `use_muon` marks a group that Muon orthogonalises.
        offloaded: the JSON's type is stepped on the CPU, for which DeepSpeed may have another class.

    Raises:
        KeyError: no such optimizer (the JSON with it is refused).
    """
    name = optimizer.lower()
    name = _CLASSES.get(name, name)
    if offloaded:
        name = _OFFLOADED.get(name, name)
    if name == "muon" and arguments.get("use_muon"):
        return OptimizerStates(1, scalars=0)
    if name in ("adam", "adamw") and arguments.get("torch_adam") is False:
        name = "fusedadam"
    states = _TABLE[name]
    more = 0
    if name in ("sgd", "rmsprop"):
        more = int(bool(arguments.get("momentum"))) + int(name == "rmsprop" and bool(arguments.get("centered")))
    elif name in ("adam", "adamw"):  # DeepSpeed's own have no amsgrad
        more = int(bool(arguments.get("amsgrad")))
    return OptimizerStates(states.tensors + more, states.scalars, states.factored)
