"""The table of optimizer states against the optimizers themselves: one step each, every tensor of the state counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.lamb import FusedLamb
from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

from chatgot.deepspeed_json import optimizers
from chatgot.deepspeed_json.optimizers import optimizer_states
from chatgot.engine.process_guards import run_muon_uncompiled

SHAPES = ((6, 4), (3, 2, 5), (7,))
SWITCHES: dict[str, list[dict[str, Any]]] = {
    "Adam": [{"amsgrad": True}],
    "AdamW": [{"amsgrad": True}],
    "RMSprop": [{"momentum": 0.9}, {"centered": True}, {"momentum": 0.9, "centered": True}],
    "SGD": [{"momentum": 0.9}],
}
TORCH = [
    (name, arguments)
    for name in ("Adam", "AdamW", "Adagrad", *optimizers.TORCH_OPTIMIZERS)
    for arguments in ({}, *SWITCHES.get(name, []))
]
DEEPSPEED = {
    FusedAdam: "op_builder.FusedAdamBuilder",
    DeepSpeedCPUAdam: "op_builder.CPUAdamBuilder",
    FusedLion: "op_builder.FusedLionBuilder",
    DeepSpeedCPULion: "op_builder.CPULionBuilder",
    FusedLamb: "op_builder.FusedLambBuilder",
    DeepSpeedCPUAdagrad: "op_builder.CPUAdagradBuilder",
}
"""Classes, and who compiles their kernels."""


def parameters() -> list[torch.nn.Parameter]:
    made = [torch.nn.Parameter(torch.ones(shape)) for shape in SHAPES]
    for parameter in made:
        parameter.grad = torch.ones_like(parameter)
    return made


def counted(optimizer: torch.optim.Optimizer) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """Shape of each parameter, and elements and scalars of its state after a step."""
    optimizer.step()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            tensors = [value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor)]
            elements = sum(tensor.numel() for tensor in tensors if tensor.dim())
            yield tuple(parameter.shape), elements, sum(not tensor.dim() for tensor in tensors)


@pytest.mark.parametrize(("name", "arguments"), TORCH, ids=lambda value: str(value))
def test_torchs_optimizers(name, arguments):
    optimizer = getattr(torch.optim, name)(parameters(), **arguments)
    states = optimizer_states(name, arguments)
    assert optimizer_states(type(optimizer).__name__, optimizer.param_groups[0]) == states
    assert [*counted(optimizer)] == [(shape, states.elements(shape), states.scalars) for shape in SHAPES]


@pytest.fixture
def no_kernels(monkeypatch) -> Callable[[type], None]:
    """DeepSpeed's classes make their state in Python; their kernels, which compute with it, are left out."""

    def leave_out(kind: type) -> None:
        monkeypatch.setattr(f"deepspeed.ops.{DEEPSPEED[kind]}.load", lambda self: MagicMock())

    return leave_out


@pytest.mark.parametrize("kind", DEEPSPEED)
def test_deepspeeds_optimizers(kind, no_kernels):
    no_kernels(kind)
    optimizer = kind(parameters())
    states = optimizer_states(kind.__name__, optimizer.param_groups[0])
    assert [*counted(optimizer)] == [(shape, states.elements(shape), states.scalars) for shape in SHAPES]

    if kind in (DeepSpeedCPULion, DeepSpeedCPUAdagrad):
        assert optimizer_states(kind.__name__.removeprefix("DeepSpeedCPU"), {}, offloaded=True) == states


def test_muons_two_halves():
    run_muon_uncompiled()
    matrix, cube, vector = parameters()
    groups = [
        {"params": [matrix], "use_muon": True, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.0},
        {"params": [cube, vector], "use_muon": False, "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0},
    ]
    optimizer = MuonWithAuxAdam(groups, adam_optimizer=torch.optim.AdamW)
    expected = []
    for group, shapes in zip(groups, (SHAPES[:1], SHAPES[1:])):
        states = optimizer_states("MuonWithAuxAdam", group)
        assert states == optimizer_states("Muon", {"use_muon": group["use_muon"]})
        expected += [(shape, states.elements(shape), states.scalars) for shape in shapes]
    assert [*counted(optimizer)] == expected


def test_every_optimizer_that_a_json_may_name_is_in_the_table():
    for name in (*optimizers.DEEPSPEED_OPTIMIZERS, *optimizers.TORCH_OPTIMIZERS):
        if name not in optimizers.REFUSED_OPTIMIZERS:
            assert optimizer_states(name, {}).scalars >= 0
    with pytest.raises(KeyError):
        optimizer_states("LBFGS", {})


def test_control_a_wrong_entry_would_be_noticed():
    assert optimizer_states("AdamW", {"amsgrad": True}).elements((4, 4)) == 48
    assert optimizer_states("AdamW", {"amsgrad": True, "torch_adam": False}).elements((4, 4)) == 32
    assert optimizer_states("Adafactor", {}).elements((4, 4)) == 8
