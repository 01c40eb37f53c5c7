"""The engine computes what a plain PyTorch loop computes: every ZeRO stage, 1 and 2 ranks, accumulation, offload,
bf16.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.halves import HALVES
from tests.distributed.programs.plain import plain_losses
from tests.support import run_ranks

STEPS = 10
BATCH = 8


def cases(world_size: int, rest: bool) -> dict[str, dict[str, Any]]:
    """Half of all combinations, in which there is every pair; or the rest. With accumulation 1 the micro batch is the
    whole share of a rank.
    """
    found = {}
    for stage in range(4):
        for accumulation in (1, 4):
            micro = BATCH // world_size // accumulation
            for offload in (False, True) if stage else (False,):
                if (stage + (accumulation > 1) + offload + world_size + rest) % 2:
                    continue
                found[f"fp32 stage {stage} accumulation {accumulation} offload {offload}"] = {
                    "json": {"stage": stage, "batch": BATCH, "micro": micro, "offload": offload}
                }
        if stage == 3 and not rest:
            found["fp32 stage 3 parameters and optimizer offloaded"] = {
                "json": {
                    "stage": 3,
                    "batch": BATCH,
                    "micro": BATCH // world_size,
                    "offload": True,
                    "offload_param": True,
                }
            }
        if stage and not rest:
            found[f"bf16 stage {stage}"] = {
                "json": {"stage": stage, "batch": BATCH, "micro": BATCH // world_size, "precision": "bf16"}
            }
    return found


@pytest.fixture(scope="module", params=HALVES)
def engine_losses(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    world_size, rest = request.param
    folder: Path = tmp_path_factory.mktemp(f"ranks{world_size}")
    plan, results = folder / "plan.json", folder / "results.json"
    plan.write_text(json.dumps({"steps": STEPS, "cases": cases(world_size, rest)}))
    run_ranks(["-m", "tests.distributed.programs.equivalence", str(plan), str(results)], world_size)
    return json.loads(results.read_text())


@pytest.fixture(scope="module")
def reference() -> list[float]:
    return plain_losses(STEPS, BATCH)


def worst(losses: list[float], reference: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True))


def is_rest(request: pytest.FixtureRequest) -> bool:
    return request.node.callspec.params["engine_losses"][1]


def test_invariant_08_accumulation_and_fp32_stages_equal_a_plain_loop(engine_losses, reference, request):
    deviations = {name: worst(losses, reference) for name, losses in engine_losses.items() if name.startswith("fp32")}
    assert len(deviations) == (7 if is_rest(request) else 8)
    assert max(deviations.values()) <= 1e-5, deviations


def test_bf16_stays_near_the_plain_fp32_loop_from_the_first_step(engine_losses, reference, request):
    deviations = {name: worst(losses, reference) for name, losses in engine_losses.items() if name.startswith("bf16")}
    assert len(deviations) == (0 if is_rest(request) else 3)
    assert max(deviations.values(), default=0.0) <= 2e-2, deviations


def test_control_another_clipping_or_rate_is_noticed(reference):
    assert worst(plain_losses(STEPS, BATCH, max_norm=0.5), reference) > 1e-5
    assert worst(plain_losses(STEPS, BATCH, lr=2.9e-3), reference) > 1e-5
    assert reference[-1] < 0.96 * reference[0]
