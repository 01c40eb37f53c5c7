"""Two ranks of which one computes a loss that is not finite: both skip, both go back or stop, and the journal names the
one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import run_ranks
from tests.training.in_process import events, series
from tests.training.test_guard import BAD, BATCH, FROM, LEFT_OUT, TO, words

RUNS = {
    "stage 1 bf16": (1, "bf16"),
    "stage 2 fp32": (2, "fp32"),
    "stage 3 bf16": (3, "bf16"),
    "stage 0 fp32": (0, "fp32"),
}
STEPS = 14


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("guard")
    runs = {}
    for name, (stage, precision) in RUNS.items():
        (folder / name).mkdir()
        runs[name] = words(folder / name, text_file, stage, precision, STEPS)
    for name, stage, guard in (("stop", 3, {"on_diverge": "stop"}), ("clean", 1, {})):
        (folder / name).mkdir()
        runs[name] = words(folder / name, text_file, stage, "bf16", STEPS, guard=guard)
    plan, out = folder / "plan.json", folder / "results.json"
    plan.write_text(json.dumps({"runs": runs, "samples": BAD}))
    run_ranks(["-m", "tests.distributed.programs.guard", str(plan), str(out)], 2)
    return folder, json.loads(out.read_text())


@pytest.mark.parametrize("name", list(RUNS))
def test_all_ranks_go_back_together_and_complete_the_run(results, name):
    folder, ranks = results
    assert ranks[0][name] == ranks[1][name]
    outcome, fed = ranks[0][name]
    assert (outcome["step"], outcome["position"]) == (STEPS, STEPS * BATCH + LEFT_OUT)
    assert [(one["from_step"], one["to_step"], one["samples"]) for one in outcome["rollbacks"]] == [
        (FROM, TO, LEFT_OUT)
    ]
    assert fed.count(BAD[0]) == 2, "trained on once, looked at once"
    out = folder / name / "out"
    assert series(out, "val/loss")[STEPS] == pytest.approx(
        series(folder / "clean" / "out", "val/loss")[STEPS], rel=1e-2
    )


@pytest.mark.parametrize("name", [*RUNS, "stop"])
def test_the_journal_names_the_rank_and_its_samples(results, name):
    folder, _ = results
    skipped = events(folder / name / "out", "skipped_step")
    assert [(event["step"], event["ranks"], event["first_sample"]) for event in skipped] == [
        (5, [1], BAD[0]),
        (6, [1], BAD[1]),
    ]
    for event in skipped:
        bad = {int(sample) - event["first_sample"] for sample, loss in event["losses"].items() if loss == "nan"}
        assert bad == {4, 5, 6, 7}, "rank 1's micro batch"
        assert len(event["losses"]) == BATCH
        assert {int(sample) - event["first_sample"] for sample in event["texts"]} == bad
        assert event["layer_grad_norms"]["layers.0"] == "nan"


def test_a_stopped_run_ends_on_all_ranks_with_the_same_words(results):
    _, ranks = results
    assert ranks[0]["stop"] == ranks[1]["stop"]
    outcome, _ = ranks[0]["stop"]
    assert outcome["exit_code"] == 5
    assert "step-00000003" in outcome["text"]
