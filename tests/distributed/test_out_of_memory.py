"""Two ranks find their micro-batch, and a resume goes on with the one that memory had been enough for.

A start after memory has run out is tested with it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import engine_json, run_ranks, write_json, write_run_yaml

STEPS = 3


def plan_of(folder: Path, text_file: Path) -> list[dict[str, Any]]:
    plan: list[dict[str, Any]] = []
    config = write_run_yaml(folder / "run.yaml", max_steps=STEPS)
    longer = write_run_yaml(folder / "longer.yaml", max_steps=STEPS + 1)

    def item(name: str, stage: int, micro: Any, out: str | None = None, config: Path = config, **more: Any) -> None:
        saving = {"every_steps": None, "every_minutes": None, "keep_best": 0}
        tree = engine_json(stage=stage, batch=16, micro=micro, chatgot={"checkpoint": saving})
        path = write_json(folder / f"{len(plan)}.json", tree)
        argv = ["--deepspeed_config", str(path), "--config", str(config), "--data", str(text_file)]
        plan.append({"name": name, "argv": [*argv, "--out_dir", str(folder / (out or name))], **more})

    item("found", 1, "auto")
    for stage in (1, 2):
        item(f"stage{stage}", stage, 1, json_micro_batch=8)
    item("resumed", 2, 8, "stage2", longer)
    item("resumed with another", 1, 4, "stage1", longer)
    return plan


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("oom")
    plan_file, results = folder / "plan.json", folder / "results.json"
    plan_file.write_text(json.dumps(plan_of(folder, text_file)))
    run_ranks(["-m", "tests.distributed.programs.out_of_memory", str(plan_file), str(results)], 2)
    return json.loads(results.read_text())


def test_two_ranks_find_the_micro_batch_that_the_json_leaves_to_memory(runs):
    assert runs["found"]["exit_codes"] == [0, 0]
    assert runs["found"]["micro_batches"] == [8, 8]


def test_a_resume_keeps_the_smaller_micro_batch_unless_the_json_has_another(runs):
    assert runs["resumed"]["started_at"] == STEPS
    assert runs["resumed"]["exit_codes"] == [0, 0]
    assert runs["resumed"]["micro_batches"] == [1, 1]
    assert runs["resumed with another"]["micro_batches"] == [4, 4]
