"""Muon with gradient clipping learns at every ZeRO stage."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.gpu.tiny import fp32_parameters, tiny_engine, train

pytestmark = pytest.mark.gpu

STEPS = 30
MUON = {"type": "Muon", "params": {"muon_lr": 0.02, "adam_lr": 3e-3, "momentum": 0.95, "weight_decay": 0.1}}
PRECISIONS = ("fp32", "bf16", "fp16")


@pytest.mark.parametrize(("precision", "stage"), [(p, s) for p in PRECISIONS for s in range(4) if s or p == "fp32"])
def test_muon_learns_with_clipping(precision, stage, device, tmp_path, request, record):
    if precision == "fp16":
        request.getfixturevalue("needs_fp16")
    case: dict[str, Any] = {
        "stage": stage,
        "precision": precision,
        "optimizer": MUON,
        "zero": {"reduce_scatter": False},
    }
    with tiny_engine(tmp_path, device, **case) as engine:
        before = fp32_parameters(engine)
        found = train(engine, device, STEPS)
        after = fp32_parameters(engine)
    matrices = [name for name in before if name.startswith("layers.") and before[name].dim() == 2]
    moved = {name: float((after[name] - before[name]).norm() / before[name].norm()) for name in matrices}
    record(
        first_loss=found.losses[0],
        last_loss=found.losses[-1],
        least_moved=min(moved.values()),
        grad_norm=found.grad_norms[-1],
    )
    assert all(found.applied)
    assert all(norm is not None and math.isfinite(norm) for norm in found.grad_norms)
    assert found.losses[-1] < 0.85 * found.losses[0]
    # With DeepSpeed's clipping of the orthogonalised update, the matrices would hardly move.
    assert min(moved.values()) > 0.5, moved
