"""Memory runs out on one of two ranks: the step is repeated with smaller micro-batches, as if they had been small from
the start.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import engine_json, run_ranks, write_json, write_run_yaml

STEPS = 9
SHORTAGES = [
    # While ZeRO-3 records the order of its modules, and in a step's second micro-batch, which reduces gradients at
    # every stage.
    {"site": "backward", "step": 1, "micro": 0, "size": 8, "rank": 1},
    {"site": "forward", "step": 7, "micro": 1, "size": 4, "rank": 1},
    {"site": "optimizer", "step": 7, "size": 2, "rank": 1},
]
"""Three in a run: 8 -> 4 -> 2 -> 1 samples."""
CONTIGUOUS = {"partition_activations": True, "contiguous_memory_optimization": True, "number_checkpoints": 2}
PERSISTENT = {"stage": 3, "stage3_param_persistence_threshold": 100}
SETTINGS: dict[str, dict[str, Any]] = {
    **{f"stage{stage}": {"stage": stage} for stage in range(4)},
    "stage3, small parameters stay whole": {"stage": 3, "zero_optimization": PERSISTENT},
    "stage3, recomputed": {"stage": 3, "activation_checkpointing": {}},
    "stage1, contiguous checkpoints": {"stage": 1, "activation_checkpointing": CONTIGUOUS},
    "stage2, offload": {"stage": 2, "offload": True},
    "stage3, offload": {"stage": 3, "offload": True},
    "stage1, bf16": {"stage": 1, "precision": "bf16"},
}

CONTROLS = ("stage0", "stage3", "stage2, offload")
"""Where gradients stay between steps unless they are dropped; ZeRO 1 and 2 on the device hand them over in a step's
last backward.
"""


def plan_of(folder: Path, text_file: Path) -> list[dict[str, Any]]:
    plan: list[dict[str, Any]] = []
    config = write_run_yaml(folder / "run.yaml", max_steps=STEPS)
    dropping = write_run_yaml(folder / "dropping.yaml", model={"dropout": 0.1}, max_steps=STEPS)
    longer = write_run_yaml(folder / "longer.yaml", max_steps=STEPS + 1)

    def item(
        name: str, settings: str, micro: int | str, out: str | None = None, config: Path = config, **more: Any
    ) -> None:
        saving = {"every_steps": None, "every_minutes": None, "keep_best": 0}
        tree = engine_json(**{"batch": 16, "micro": micro, "chatgot": {"checkpoint": saving}, **SETTINGS[settings]})
        path = write_json(folder / f"{len(plan)}.json", tree)
        argv = [
            "--deepspeed_config",
            str(path),
            "--config",
            str(config),
            "--data",
            str(text_file),
            "--out_dir",
            str(folder / (out or name)),
        ]
        plan.append({"name": name, "argv": argv, **more})

    for settings in SETTINGS:
        item(f"{settings} small", settings, 1)
        item(settings, settings, 8, inject=SHORTAGES)
    for settings in CONTROLS:
        item(f"{settings} control", settings, 4, inject=SHORTAGES[1:2], control="gradients")
    for name, micro, more in (
        ("dropout small", 4, {}),
        ("dropout", 8, {"inject": SHORTAGES[:1]}),
        ("dropout control", 8, {"inject": SHORTAGES[:1], "control": "rng"}),
    ):
        item(name, "stage1", micro, config=dropping, **more)
    item("found", "stage1", "auto")
    item("smallest", "stage3", 1, inject=[{"site": "backward", "step": 3, "micro": 2, "size": 1, "rank": 1}])
    item("no update", "stage1", 4, inject=[{"site": "optimizer", "step": 3, "size": 4, "rank": 1}] * 2)
    item("resumed", "stage2", 8, "stage2", longer)
    item("resumed with another", "stage1", 4, "stage1", longer)
    return plan


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("oom")
    plan_file, results = folder / "plan.json", folder / "results.json"
    plan_file.write_text(json.dumps(plan_of(folder, text_file)))
    run_ranks(["-m", "tests.distributed.programs.out_of_memory", str(plan_file), str(results)], 2, timeout=900)
    return json.loads(results.read_text())


def apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Largest relative difference of the losses."""
    assert one["losses"].keys() == other["losses"].keys()
    assert len(one["losses"]) == STEPS
    return max(abs(one["losses"][step] / other["losses"][step] - 1) for step in one["losses"])


@pytest.mark.parametrize("settings", SETTINGS)
def test_losses_are_those_of_a_run_with_the_smaller_micro_batch_from_the_start(runs, settings):
    found = runs[settings]
    assert found["exit_codes"] == [0, 0]
    assert found["unfired"] == [0, 0]
    assert apart(found, runs[f"{settings} small"]) < (1e-3 if "bf16" in settings else 1e-6)


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_data_order_does_not_notice_and_no_step_is_journaled_twice(runs, settings):
    found, small = runs[settings], runs[f"{settings} small"]
    assert [batch for _, batch, _ in found["digests"]] == [batch for _, batch, _ in small["digests"]]
    assert [step for step, _, _ in found["digests"]] == found["lines"] == list(range(1, STEPS + 1))
    assert [trace[-2:] for trace in found["traces"]] == [trace[-2:] for trace in small["traces"]]


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_shortage_is_an_event_with_the_setup_of_the_steps_that_follow(runs, settings):
    found = runs[settings]
    told = [e for e in found["events"] if e["event"] == "out_of_memory"]
    assert [(e["step"], e["where"], e["micro_batch"]) for e in told] == [
        (1, {"1": "backward"}, "8 -> 4"),
        (7, {"1": "forward"}, "4 -> 2"),
        (7, {"1": "the optimizer step"}, "2 -> 1"),
    ]
    assert found["micro_batches"] == [1, 1]
    first, second, third = (e["setup"]["id"] for e in told)
    assert [setup for _, _, setup in found["digests"]] == [first] * 6 + [second] + [third] * 2


@pytest.mark.parametrize("settings", CONTROLS)
def test_control_gradients_of_the_abandoned_step_that_stay_are_noticed(runs, settings):
    assert runs[f"{settings} control"]["unfired"] == [0, 0]
    assert apart(runs[f"{settings} control"], runs[f"{settings} small"]) > 1e-5


def test_the_repeated_step_draws_the_same_random_numbers(runs):
    assert apart(runs["dropout"], runs["dropout small"]) < 1e-6
    assert apart(runs["dropout control"], runs["dropout small"]) > 1e-5


def test_two_ranks_find_the_micro_batch_that_the_json_leaves_to_memory(runs):
    assert runs["found"]["exit_codes"] == [0, 0]
    assert runs["found"]["micro_batches"] == [8, 8]


def test_at_micro_batch_1_all_ranks_end_with_exit_6_and_say_what_helps(runs):
    found = runs["smallest"]
    assert found["exit_codes"] == [6, 6]
    assert found["lines"] == [1, 2]
    for text in ("step 3", "backward on rank 1", "activation_checkpointing", "offload_optimizer", "chatgot plan"):
        assert text in found["message"]


def test_an_update_that_cannot_be_made_ends_all_ranks_with_exit_6(runs):
    found = runs["no update"]
    assert found["exit_codes"] == [6, 6]
    assert "the optimizer step on rank 1" in found["message"]
    assert not [e for e in found["events"] if e["event"] == "saved"]


def test_a_resume_keeps_the_smaller_micro_batch_unless_the_json_has_another(runs):
    assert runs["resumed"]["started_at"] == STEPS
    assert runs["resumed"]["exit_codes"] == [0, 0]
    assert runs["resumed"]["micro_batches"] == [1, 1]
    assert runs["resumed with another"]["micro_batches"] == [4, 4]
