"""N steps, save, a new process and N more equal 2N steps, bit for bit; and the comparison can fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.halves import HALVES
from tests.support import engine_json, run_ranks, write_json, write_run_yaml

N = 3
CONTROLS = {1: ("rng", "schedule"), 2: ("position",)}
"""By number of ranks; those of the other number are slow."""


def variants(world_size: int, rest: bool) -> list[tuple[str, int, str, str]]:
    """(name, stage, precision, extra): every stage and precision, and half of the extras, or the rest of them."""
    found = [
        (f"{precision}-stage{stage}", stage, precision, "")
        for precision in ("fp32", "bf16")
        for stage in range(4)
        if (precision, stage) != ("bf16", 0)  # refused: 16 bit needs ZeRO
    ]
    extras = [
        (f"fp32-stage{stage}-{extra}", stage, "fp32", extra)
        for stage in range(4)
        for number, extra in enumerate(("act_ckpt", "async"))
        if (stage + number + world_size + rest) % 2
    ]
    return [*found, *extras]


def drive(folder: Path, world_size: int, items: list[dict[str, Any]], label: str) -> dict[str, Any]:
    plan, results = folder / f"{label}.plan.json", folder / f"{label}.results.json"
    plan.write_text(json.dumps(items))
    run_ranks(["-m", "tests.distributed.programs.runs", str(plan), str(results)], world_size)
    return json.loads(results.read_text())


@pytest.fixture(scope="module", params=HALVES)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> dict[str, Any]:
    world_size, rest = request.param
    folder = tmp_path_factory.mktemp("resume")
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
    for name, stage, precision, extra in variants(world_size, rest):
        saving = {
            "every_steps": 2 if extra == "async" else N,
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
                "abandon_after": N + (2 if extra == "async" else 1),
            }
        )
        second.append({"name": f"{name} second half", "argv": [*argv(name, f"{name}-halves"), "--resume_from", "must"]})
    controls = CONTROLS[3 - world_size if rest else world_size]
    first += [
        {"name": f"{c} first half", "argv": argv("fp32-stage1", f"control-{c}"), "abandon_after": N} for c in controls
    ]
    found = drive(folder, world_size, first, "first")
    found |= drive(folder, world_size, second, "second")
    for control in controls:
        item = {"name": f"control {control}", "argv": argv("fp32-stage1", f"control-{control}"), "control": control}
        found |= drive(folder, world_size, [item], control)
    return found


def test_invariant_09_resumed_run_is_bit_for_bit_the_uninterrupted_one(runs):
    halves = [name.removesuffix(" second half") for name in runs if name.endswith(" second half")]
    assert len(halves) == 7 + 4
    for name in halves:
        whole, half = runs[f"{name} whole"], runs[f"{name} second half"]
        # A save in the background is published at the latest when the next one begins.
        assert half["started_at"] in ((2, 4) if name.endswith("async") else (N,)), name
        assert len(whole["losses"]) == 2 * N
        for quantity in ("losses", "lr", "grad_norm", "weights"):
            assert half[quantity] == whole[quantity], (name, quantity)
        assert half["trace"] == [rank[half["started_at"] :] for rank in whole["trace"]], name


def test_control_a_resume_that_forgets_something_is_noticed(runs):
    whole = runs["fp32-stage1 whole"]
    controls = [name.removeprefix("control ") for name in runs if name.startswith("control ")]
    assert controls
    for control in controls:
        broken = runs[f"control {control}"]
        assert broken["weights"] != whole["weights"], control
        assert broken["losses"] != whole["losses"], control
        if control == "position":
            assert broken["trace"] != [rank[N:] for rank in whole["trace"]]
        if control == "schedule":
            assert broken["lr"] != whole["lr"]


def test_activation_checkpointing_changes_no_bit_of_a_run(runs):
    recomputed = [name for name in runs if name.endswith("-act_ckpt whole")]
    assert len(recomputed) == 2
    for name in recomputed:
        assert runs[name]["weights"] == runs[name.replace("-act_ckpt", "")]["weights"], name
