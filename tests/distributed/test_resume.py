"""N steps, save, a new process and N more equal 2N steps, bit for bit; and the comparison can fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import engine_json, run_ranks, write_json, write_run_yaml

N = 4
CONTROLS = ("rng", "position", "schedule")


def variants() -> list[tuple[str, int, str, str]]:
    """(name, stage, precision, extra)"""
    found = [
        (f"{precision}-stage{stage}", stage, precision, "") for precision in ("fp32", "bf16") for stage in range(4)
    ]
    found = [v for v in found if not (v[2] == "bf16" and v[1] == 0)]  # refused: 16 bit needs ZeRO
    return [
        *found,
        *(
            (f"fp32-stage{stage}-{extra}", stage, "fp32", extra)
            for stage in range(4)
            for extra in ("act_ckpt", "async")
        ),
    ]


def drive(folder: Path, world_size: int, items: list[dict[str, Any]], label: str) -> dict[str, Any]:
    plan, results = folder / f"{label}.plan.json", folder / f"{label}.results.json"
    plan.write_text(json.dumps(items))
    run_ranks(["-m", "tests.distributed.programs.runs", str(plan), str(results)], world_size)
    return json.loads(results.read_text())


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> dict[str, Any]:
    folder, world_size = tmp_path_factory.mktemp(f"resume{request.param}"), request.param
    config = write_run_yaml(folder / "run.yaml", model={"dropout": 0.1}, max_steps=2 * N)

    def argv(name: str, out: str) -> list[str]:
        return [
            "--deepspeed_config",
            str(folder / f"{name}.json"),
            "--config",
            str(config),
            "--data",
            str(text_file),
            "--out_dir",
            str(folder / out),
        ]

    first, second = [], []
    for name, stage, precision, extra in variants():
        saving = {
            "every_steps": N // 2 if extra == "async" else N,
            "async": extra == "async",
            "every_minutes": None,
            "keep_best": 0,
        }
        write_json(
            folder / f"{name}.json",
            engine_json(
                stage,
                precision,
                micro=8 // world_size // 2,
                activation_checkpointing={} if extra == "act_ckpt" else None,
                chatgot={"checkpoint": saving},
            ),
        )
        first.append({"name": f"{name} whole", "argv": argv(name, f"{name}-whole")})
        first.append(
            {
                "name": f"{name} first half",
                "argv": argv(name, f"{name}-halves"),
                "abandon_after": N + (3 if extra == "async" else 1),
            }
        )
        second.append({"name": f"{name} second half", "argv": [*argv(name, f"{name}-halves"), "--resume_from", "must"]})
    first += [
        {"name": f"{c} first half", "argv": argv("fp32-stage1", f"control-{c}"), "abandon_after": N} for c in CONTROLS
    ]
    found = drive(folder, world_size, first, "first")
    found |= drive(folder, world_size, second, "second")
    for control in CONTROLS:
        item = {"name": f"control {control}", "argv": argv("fp32-stage1", f"control-{control}"), "control": control}
        found |= drive(folder, world_size, [item], control)
    return found


@pytest.mark.parametrize("name", [v[0] for v in variants()])
def test_invariant_09_resumed_run_is_bit_for_bit_the_uninterrupted_one(runs, name):
    whole, half = runs[f"{name} whole"], runs[f"{name} second half"]
    # A save in the background is published at the latest when the next one begins.
    assert half["started_at"] in ((N, N + N // 2) if name.endswith("async") else (N,))
    assert len(whole["losses"]) == 2 * N
    for quantity in ("losses", "lr", "grad_norm", "weights"):
        assert half[quantity] == whole[quantity], quantity
    assert half["trace"] == [rank[half["started_at"] :] for rank in whole["trace"]]


@pytest.mark.parametrize("control", CONTROLS)
def test_control_a_resume_that_forgets_something_is_noticed(runs, control):
    whole, broken = runs["fp32-stage1 whole"], runs[f"control {control}"]
    assert broken["weights"] != whole["weights"]
    assert broken["losses"] != whole["losses"]
    if control == "position":
        assert broken["trace"] != [rank[N:] for rank in whole["trace"]]
    if control == "schedule":
        assert broken["lr"] != whole["lr"]


def test_activation_checkpointing_changes_no_bit_of_a_run(runs):
    for stage in range(4):
        assert runs[f"fp32-stage{stage}-act_ckpt whole"]["weights"] == runs[f"fp32-stage{stage} whole"]["weights"]
