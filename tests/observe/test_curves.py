"""Curves are read as the run stands, and thinned without hiding an extreme."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chatgot.observe.curves import Table, at_steps, drawn, read_curves


def written(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return path


def test_what_was_trained_again_replaces_what_was_given_up(tmp_path):
    lines = [{"step": step, "train/loss": float(step)} for step in (1, 2, 3, 4)]
    lines[2:2] = [{"step": 2, "val/loss": 20.0}, {"step": 2, "digest": {"loss": 9.0}}]
    lines += [
        {"step": 4, "val/loss": 40.0},
        {"step": 3, "train/loss": 3.5},
        {"step": 4, "train/loss": "nan"},
        {"step": "x"},
    ]
    tables = read_curves(written(tmp_path / "metrics.jsonl", lines))
    assert list(tables) == ["train", "val"]
    assert list(tables["train"].steps) == [1, 2, 3, 4]
    assert list(tables["train"].columns["train/loss"][:3]) == [1.0, 2.0, 3.5]
    assert math.isnan(tables["train"].columns["train/loss"][3])
    assert (list(tables["val"].steps), list(tables["val"].columns["val/loss"])) == ([2], [20.0])


def test_a_step_that_is_logged_again_after_a_resume_replaces_its_first_line(tmp_path):
    lines = [{"step": 10, "train/loss": 1.0}, {"step": 10, "val/loss": 2.0}, {"step": 10, "train/loss": 1.5}]
    tables = read_curves(written(tmp_path / "metrics.jsonl", lines))
    assert list(tables["train"].columns["train/loss"]) == [1.5]
    assert not tables["val"].steps


def test_a_short_curve_is_drawn_as_it_is():
    table = Table()
    for step, loss in ((1, 0.1), (3, math.inf), (4, 1 / 3)):
        table.append(step, {"train/loss": loss})
    assert drawn(table) == {
        "rows": 3,
        "steps": [[1], [3], [4]],
        "metrics": {"train/loss": {"not_finite": 1, "mean": [0.1, None, 1 / 3]}},
    }


@pytest.mark.parametrize("rows", [1001, 4999, 12345])
def test_a_long_curve_keeps_every_extreme_and_the_means(rows):
    values = np.random.default_rng(0).normal(size=rows)
    values[[7, rows // 2]] = [100.0, math.nan]
    table = Table()
    for step, value in enumerate(values.tolist()):
        table.append(step, {"train/loss": value})
    curve = drawn(table, points=100)
    metric = curve["metrics"]["train/loss"]
    assert len(curve["steps"]) == 100
    for (first, last), mean, low, high in zip(curve["steps"], metric["mean"], metric["min"], metric["max"]):
        bucket = values[first : last + 1]
        assert (low, high) == (np.nanmin(bucket), np.nanmax(bucket))
        assert mean == pytest.approx(np.nanmean(bucket))
    assert curve["steps"][0][0] == 0
    assert curve["steps"][-1][-1] == rows - 1
    assert max(metric["max"]) == 100.0


def test_tokens_and_wall_time_of_a_step_in_between():
    table = Table()
    for step in (10, 20):
        table.append(step, {"data/tokens": step * 100})
    assert at_steps(table, "data/tokens", [10, 15, 20]) == [1000.0, 1500.0, 2000.0]
    assert at_steps(table, "goodput/wall_seconds", [10]) == [None]
