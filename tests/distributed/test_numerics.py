"""Non-finite gradients: the step is skipped on every rank, nothing of it stays, and a run that only skips ends. And
torch_autocast.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.halves import HALVES
from tests.distributed.programs.plain import plain_losses
from tests.support import run_ranks

BATCH, STEPS, LIMIT = 8, 10, 3
SCHEDULE = "gbgbbgbbb"
"""One letter per step, g(ood) or b(ad): three bad ones in a row, the limit, only at the end."""

MUON = {"type": "Muon", "params": {"lr": 0.02, "adam_lr": 3e-3, "momentum": 0.95, "weight_decay": 0.1}}
GUARD = {"chatgot": {"guard": {"max_consecutive_skips": LIMIT}}}


KINDS = ("gradient", "activation", "loss alone")


def poisoned(world_size: int, rest: bool = False) -> dict[str, dict[str, Any]]:
    """Half of all cases, in which there is every pair of ranks, stage, precision and kind; or the rest."""
    common = {"batch": BATCH, "micro": BATCH // world_size // 2, **GUARD}
    found: dict[str, dict[str, Any]] = {}
    for stage in range(4):
        if stage != 2 and (stage + world_size + rest) % 2:  # 2 has the code path of stage 1
            found[f"fp32 stage {stage} loss, no clipping"] = {
                "kind": "loss",
                "json": {"stage": stage, "gradient_clipping": 0.0, **common},
            }
        for narrow, precision in enumerate(("fp32", "bf16") if stage else ("fp32",)):
            for number, kind in enumerate(KINDS):
                if (stage + narrow + number + world_size + rest) % 2:
                    found[f"{precision} stage {stage} {kind}"] = {
                        "kind": kind,
                        "json": {"stage": stage, "precision": precision, **common},
                    }
        if (stage // 2 + stage + world_size + rest) % 2:
            found[f"fp32 stage {stage} gradient Muon"] = {
                "kind": "gradient",
                "json": {"stage": stage, "optimizer": MUON, **common},
                "zero": {"reduce_scatter": stage != 3},
            }
    found["control stage 0"] = {"kind": "gradient", "without_guard": True, "json": {"stage": 0, **common}}
    found["control loss"] = {"kind": "loss alone", "without_poisoning": True, "json": {"stage": 1, **common}}
    return found


def autocast(world_size: int) -> dict[str, dict[str, Any]]:
    common = {"precision": "autocast_bf16", "batch": BATCH, "micro": BATCH // world_size}
    return {f"stage {stage}": {"json": {"stage": stage, **common}} for stage in range(4)}


@pytest.fixture(scope="module", params=HALVES)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    world_size, rest = request.param
    folder: Path = tmp_path_factory.mktemp("numerics")
    plan, out = folder / "plan.json", folder / "results.json"
    cases = {
        "poisoned": poisoned(world_size, rest),
        "autocast": autocast(world_size),
        "schedule": SCHEDULE,
        "steps": STEPS,
    }
    plan.write_text(json.dumps(cases))
    run_ranks(["-m", "tests.distributed.programs.numerics", str(plan), str(out)], world_size)
    found = json.loads(out.read_text())
    names = [name for name in cases["poisoned"] if not name.startswith("control")]
    assert len(names) == 14
    return {**found, "names": names}


def test_non_finite_gradients_of_one_rank_skip_the_step_on_all_ranks(results):
    for name in results["names"]:
        for rank in results["poisoned"][name]:
            steps = rank["steps"]
            for index, step in enumerate(steps):
                assert step["global_steps"] == index + 1, name
                assert step["skipped_steps"] == SCHEDULE[: index + 1].count("b"), name
                assert step["lr"] == steps[0]["lr"], name
                if step["letter"] == "b":
                    assert step["applied"] is False, name
                    assert step["state"] == steps[index - 1]["state"], name
                    assert math.isinf(step["grad_norm"]), name
                else:
                    assert step["applied"] is True, name
                    assert index == 0 or step["state"] != steps[index - 1]["state"], name
                    assert math.isfinite(step["grad_norm"]), name
                    assert step["grad_norm"] > 0, name


def test_after_skipped_steps_training_goes_on_as_if_they_had_not_been(results):
    """Bit for bit: no moment, momentum or step counter of the optimizer has seen the bad gradients."""
    for name in results["names"]:
        for rank, clean in zip(results["poisoned"][name], results["clean"][name], strict=True):
            good = [step for step in rank["steps"] if step["letter"] == "g"]
            for quantity in ("state", "loss", "grad_norm"):
                assert [s[quantity] for s in good] == [s[quantity] for s in clean["steps"]], (name, quantity)
            assert clean["errors"] == [], name


def test_invariant_12_overflows_in_a_row_are_a_divergence_on_all_ranks(results):
    for name in results["names"]:
        for rank in results["poisoned"][name]:
            [error] = rank["errors"]
            assert error["step"] == len(SCHEDULE), f"{name}: only the last step completes a row of LIMIT skips"
            said = f"step {len(SCHEDULE)}: loss or gradients were not finite for {LIMIT} steps in a row"
            assert said in error["text"], name
            assert f"max_consecutive_skips = {LIMIT}" in error["text"], name


def test_a_skipped_step_tells_its_layers_and_a_second_look_the_rank_it_came_from(results):
    for name in results["names"]:
        ranks = results["poisoned"][name]
        for index, letter in enumerate(SCHEDULE):
            steps = [rank["steps"][index] for rank in ranks]
            if letter == "g":
                assert all(step["norms"] is None and step["diagnosis"] is None for step in steps), name
                continue
            for step in steps:
                assert json.dumps(step["norms"]) == json.dumps(steps[0]["norms"]), name  # NaN is not equal to itself
                assert {"embed_tokens", "layers.0", "layers.1", "norm"} <= step["norms"].keys(), name
                assert not math.isfinite(step["norms"]["layers.0"]), name
            *others, last = (step["diagnosis"] for step in steps)
            assert last["gradients_finite"] is ("loss alone" in name), name
            assert all(one["gradients_finite"] and all(map(math.isfinite, one["losses"])) for one in others), name
            assert [len(step["diagnosis"]["losses"]) for step in steps] == [BATCH // len(ranks)] * len(ranks), name
            if "gradient" not in name:
                assert not any(map(math.isfinite, last["losses"])), name


def test_control_a_loss_that_is_not_finite_with_finite_gradients_is_trained_on_unless_it_poisons_them(results):
    for rank in results["poisoned"]["control loss"]:
        assert rank["steps"][-1]["skipped_steps"] == 0
        assert rank["steps"][SCHEDULE.index("b")]["applied"] is True


def test_all_ranks_end_with_the_same_weights(results):
    for name in results["names"]:
        assert len({rank["weights"] for rank in results["poisoned"][name]}) == 1, name
        assert results["poisoned"][name][0]["weights"] == results["clean"][name][0]["weights"], name


def test_control_without_the_stage_0_guard_the_weights_are_lost(results):
    for rank in results["poisoned"]["control stage 0"]:
        assert all(math.isnan(step["loss"]) for step in rank["steps"][3:])
        assert rank["steps"][-1]["skipped_steps"] == 0


def test_torch_autocast_trains_near_plain_fp32(results):
    reference = plain_losses(STEPS, BATCH)
    for name, found in results["autocast"].items():
        assert found["computes_in"] == ["torch.bfloat16"], name
        assert found["parameters"] == ["torch.float32"], name
        assert max(abs(a - b) / b for a, b in zip(found["losses"], reference, strict=True)) <= 2e-2, name
        assert found["losses"] != reference, "autocast had no effect"
