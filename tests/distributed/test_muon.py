"""Muon learns at every ZeRO stage although clipping is on, and its momentum survives a checkpoint."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support import run_ranks

BATCH, STEPS = 8, 12
OPTIMIZER = {
    "type": "Muon",
    "params": {"lr": 0.02, "muon_lr": 0.02, "adam_lr": 3e-3, "momentum": 0.95, "weight_decay": 0.1},
}
MATRICES_ONLY = {"type": "Muon", "params": {**OPTIMIZER["params"], "adam_lr": 0.0}}


def settings(world_size: int, stage: int, **extra: Any) -> dict[str, Any]:
    keys = {"stage": stage, "batch": BATCH, "micro": BATCH // world_size // 2, "optimizer": OPTIMIZER}
    for key in ("precision", "gradient_clipping", "optimizer"):
        if key in extra:
            keys[key] = extra.pop(key)
    return {"json": keys, "zero": {"reduce_scatter": stage != 3}, **extra}


def runs(world_size: int, everything: bool) -> dict[str, dict[str, Any]]:
    """What clipping does is shown on two ranks, whose norms have to be added; its control on one; or both on either."""
    found = {
        **{f"stage {stage}": settings(world_size, stage) for stage in range(4)},
        **{f"bf16 stage {stage}": settings(world_size, stage, precision="bf16") for stage in (1, 2, 3)},
    }
    if world_size == 2 or everything:
        for name, clip in (("unclipped", 0.0), ("tight", 0.1)):
            found |= {f"stage {one} {name}": settings(world_size, one, gradient_clipping=clip) for one in (0, 1, 3)}
    if world_size == 1 or everything:
        found["matrices only"] = settings(world_size, 1, optimizer=MATRICES_ONLY)
        found["control"] = settings(world_size, 1, optimizer=MATRICES_ONLY, without_guard=True)
    return found


def resumes(world_size: int, everything: bool) -> dict[str, dict[str, Any]]:
    """On two ranks, and on one the control; or all on either."""
    found = {}
    if world_size == 1 or everything:
        found["control"] = settings(world_size, 1, forget_momentum=True)
    if world_size == 2 or everything:
        found |= {f"stage {stage}": settings(world_size, stage) for stage in range(4)}
        found["bf16 stage 1"] = settings(world_size, 1, precision="bf16")
    return found


ONE, TWO = pytest.param((1, False), id="1 rank"), pytest.param((2, False), id="2 ranks")
EVERYTHING = [pytest.param((n, True), id=f"{n} rank(s), everything", marks=pytest.mark.slow) for n in (1, 2)]
on_one_rank = pytest.mark.parametrize("results", [ONE, *EVERYTHING], indirect=True)
on_two_ranks = pytest.mark.parametrize("results", [TWO, *EVERYTHING], indirect=True)


@pytest.fixture(scope="module", params=[ONE, TWO, *EVERYTHING])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    world_size, folder = request.param[0], tmp_path_factory.mktemp("muon")
    plan, out = folder / "plan.json", folder / "results.json"
    plan.write_text(json.dumps({"steps": STEPS, "runs": runs(*request.param), "resumes": resumes(*request.param)}))
    # An empty cache and no compiler: nothing of Muon may be compiled on a CPU.
    env = {
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "CXX": "/nonexistent",
    }
    program = ["-m", "tests.distributed.programs.muon", str(plan), str(out)]
    run_ranks(program, world_size, afresh=world_size == 1, env=env)
    built = [str(path) for name in ("extensions", "inductor") for path in folder.glob(f"{name}/**/*") if path.is_file()]
    return {**json.loads(out.read_text()), "built": built}


def worst(losses: list[float], reference: list[float]) -> float:
    return max(abs(a - b) / b for a, b in zip(losses, reference, strict=True))


def test_fp32_stages_agree_and_learn(results):
    runs = results["runs"]
    for clipping in (one for one in ("", " tight", " unclipped") if f"stage 0{one}" in runs):
        reference = runs[f"stage 0{clipping}"]
        assert reference["losses"][-1] < 0.9 * reference["losses"][0]
        for stage in (1, 3) if clipping else (1, 2, 3):
            found = runs[f"stage {stage}{clipping}"]
            assert worst(found["losses"], reference["losses"]) <= 1e-4, (stage, clipping)
            if clipping != " unclipped":
                assert worst(found["grad_norms"], reference["grad_norms"]) <= 1e-3, (stage, clipping)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_learns_like_fp32(results, stage):
    found = results["runs"][f"bf16 stage {stage}"]
    assert (
        found["optimizer"]
        == {1: "BF16_Optimizer", 2: "DeepSpeedZeroOptimizer", 3: "DeepSpeedZeroOptimizer_Stage3"}[stage]
    )
    assert worst(found["losses"], results["runs"]["stage 0"]["losses"]) <= 2e-2


@on_two_ranks
def test_clipping_leaves_muon_alone_and_still_clips_adam(results):
    runs = results["runs"]
    fall = {
        name: runs[name]["losses"][0] - runs[name]["losses"][-1]
        for name in ("stage 1", "stage 1 unclipped", "stage 1 tight")
    }
    assert fall["stage 1"] > 0.9 * fall["stage 1 unclipped"]
    assert runs["stage 1 tight"]["losses"] != runs["stage 1 unclipped"]["losses"]


@on_one_rank
def test_control_without_the_guard_muon_hardly_learns(results):
    guarded, stock = results["runs"]["matrices only"]["losses"], results["runs"]["control"]["losses"]
    assert guarded[0] - guarded[-1] > 5 * (stock[0] - stock[-1])


def test_muon_needs_no_compiler_on_a_cpu_and_says_so(results):
    assert results["built"] == []
    for found in results["runs"].values():
        assert found["adam"] == "AdamW"
        assert any("not compiled on a CPU" in note for note in found["notes"])
        assert any("optimizer.params.torch_adam = true" in note for note in found["notes"])


@on_two_ranks
@pytest.mark.parametrize("name", [*(f"stage {stage}" for stage in range(4)), "bf16 stage 1"])
def test_muons_momentum_resumes_bit_for_bit(results, name):
    found = results["resumes"][name]
    assert found["loaded_state"] == found["saved_state"]
    assert found["resumed"] == found["whole"]
    assert found["resumed_state"] == found["whole_state"]


@on_one_rank
def test_control_a_resume_without_momentum_is_noticed(results):
    found = results["resumes"]["control"]
    assert found["loaded_state"] != found["saved_state"]
    assert found["resumed"][0] == found["whole"][0]
    assert found["resumed"][1:] != found["whole"][1:]
