"""What wandb, TensorBoard and csv files show of a run that was interrupted, resumed three times and rolled back."""

from __future__ import annotations

import csv
import importlib.util
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from chatgot.training import run
from tests.observe.offline_wandb import read_offline_history, read_offline_records, summary_of
from tests.observe.test_wandb_end_to_end import without_key
from tests.support import engine_json, write_json, write_run_yaml, write_text
from tests.training import in_process
from tests.training.in_process import argv, events, series
from tests.training.poison import Poison

pytest.importorskip("wandb")
LAST = 16
TENSORBOARD = importlib.util.find_spec("tensorboard") is not None


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """Interrupted after step 1, stopped at 4, from step 9 rolled back to 4, stopped at 12 and ended at LAST."""
    path = tmp_path_factory.mktemp("dashboards")
    config = write_run_yaml(path / "run.yaml", max_steps=LAST, eval_every=4, sample_every=4)
    text = write_text(path / "text.txt", characters=6000)
    ours: dict[str, Any] = {
        "checkpoint": {"every_steps": 4, "every_minutes": None, "keep_best": 0},
        "guard": {"max_consecutive_skips": 2, "on_diverge": "rollback"},
        "wandb": {"tags": ["shakespeare", "first try"], "artifacts": "both"},
    }
    csv_files = {"enabled": True, "output_path": str(path / "csv"), "job_name": "job"}
    boards: dict[str, Any] = {
        "wandb": {"enabled": True, "project": "thrones", "group": "north"},
        "csv_monitor": csv_files,
    }
    if TENSORBOARD:
        boards["tensorboard"] = {"enabled": True, "output_path": str(path / "tensorboard"), "job_name": "job"}
    line = argv(write_json(path / "engine.json", engine_json(chatgot=ours, **boards)), path / "out", config, text)
    with in_process.cpu_environment(**without_key(path), CHATGOT_REPORT=None):
        starts = (["--max_minutes", "0"], ["train.max_steps=4"], ["train.max_steps=12"], [])
        for number, more in enumerate(starts):
            loop = run.prepare_run(in_process.arguments([*line, *more]), in_process.find_place())
            if number == 2:
                Poison(loop, (56, 64))  # the batches of steps 8 and 9
            with loop.stop:
                run.finish(loop)
    return path / "out"


@pytest.fixture(scope="module")
def records(out) -> list[Any]:
    return read_offline_records(out)


def test_wandb_has_one_run_and_each_step_once(out):
    assert [event["event"] for event in events(out) if event["event"] in ("started", "resumed", "rolled_back")] == [
        *("started", "resumed", "resumed", "rolled_back", "resumed")
    ]
    ids, history = read_offline_history(out)
    assert ids == {json.loads((out / "wandb" / "run_id.json").read_text())["id"]}
    assert len(list((out / "wandb").glob("offline-run-*"))) == 4
    assert Counter(record["train/step"] for record in history) == Counter(range(1, LAST + 1))
    by_step = {record["train/step"]: record for record in history}
    [rolled_back] = events(out, "rolled_back")
    rewound = range(rolled_back["to_step"] + 1, rolled_back["from_step"] + 1)
    assert len(rewound) >= 2
    for name in ("train/loss", "optim/lr", "val/loss", "sample/copied_fraction", "sample/longest_copy"):
        told = {step: record[name] for step, record in by_step.items() if name in record and step not in rewound}
        assert told == {step: value for step, value in series(out, name).items() if step not in rewound}
        assert told


def test_wandb_is_told_of_settings_tags_and_group(records):
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert {(one.project, one.run_group, tuple(one.tags)) for one in runs} == {
        ("thrones", "north", ("shakespeare", "first try"))
    }
    config = {item.key: json.loads(item.value_json) for item in runs[-1].config.update}
    assert config["deepspeed"]["gradient_accumulation_steps"] == 2, "as resolved"
    assert config["run"]["train"]["max_steps"] == LAST
    assert any(record.WhichOneof("record_type") == "stats" for record in records), "wandb's own, of the machine"


def test_samples_are_a_table_with_what_was_copied(out):
    tables = [json.loads(path.read_text()) for path in out.glob("wandb/offline-run-*/files/media/table/*.json")]
    assert {tuple(table["columns"]) for table in tables} == {("step", "prompt", "continuation", "copied")}
    rows = {row[0]: row for table in tables for row in table["data"]}
    assert {4, 12, LAST} <= rows.keys()
    step, prompt, continuation, _ = rows[LAST]
    assert f"{prompt}{continuation}" in (out / "samples" / f"step-{step:06d}.txt").read_text()


def test_the_summary_has_the_best_loss(out, records):
    summary = summary_of(records)
    losses = series(out, "val/loss")
    assert summary["best_val_loss"] == min(losses.values())
    assert losses[summary["best_step"]] == summary["best_val_loss"]


def test_divergence_and_preemption_are_alerts(records):
    alerts = [record.alert for record in records if record.WhichOneof("record_type") == "alert"]
    assert [alert.title for alert in alerts] == ["Interrupted and saved", "Rolled back"]
    assert "loss or gradients were not finite for 2 steps in a row" in alerts[1].text


def test_report_and_checkpoint_are_artifacts(records):
    found = [record.artifact for record in records if record.WhichOneof("record_type") == "artifact"]
    found += [
        record.request.log_artifact.artifact
        for record in records
        if record.WhichOneof("record_type") == "request" and record.request.HasField("log_artifact")
    ]
    last = {artifact.type: set(artifact.aliases) - {"latest"} for artifact in found}
    assert last == {"run_table": set(), "report": {"report.html"}, "model": {f"step-{LAST:08d}"}}


def test_csv_files_have_the_journals_metrics_beside_deepspeeds(out):
    def told(name: str) -> dict[int, float]:
        with open(out.parent / "csv" / "job" / f"{name}.csv") as file:
            return {int(step): float(value) for step, value in csv.reader(file) if step != "step"}

    for name in ("train/loss", "val/loss", "perf/tokens_per_sec", "data/tokens", "sample/longest_copy"):
        assert told(name.replace("/", "_")) == series(out, name)
    assert told("Train_Samples_lr")


@pytest.mark.skipif(not TENSORBOARD, reason="tensorboard is not installed")
def test_tensorboard_has_the_journals_metrics_beside_deepspeeds(out):
    from tensorboard.backend.event_processing.event_accumulator import (  # pyright: ignore[reportMissingImports]
        EventAccumulator,
    )

    found = EventAccumulator(str(out.parent / "tensorboard" / "job"))
    found.Reload()
    for name in ("train/loss", "val/loss", "data/tokens", "sample/longest_copy"):
        told = {event.step: event.value for event in found.Scalars(name)}
        assert told == pytest.approx(series(out, name))
    assert "Train/Samples/lr" in found.Tags()["scalars"]
