"""When a run saves by time, and what a disk that is full for a moment means for it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from chatgot.errors import CheckpointError
from chatgot.training.loop import Loop
from chatgot.training.saving import Saving
from tests.support import engine_json, write_json, write_run_yaml
from tests.training import in_process
from tests.training.in_process import argv, events, tags


def drive(folder: Path, text_file: Path, full: range, **checkpoint: Any) -> tuple[Loop, int]:
    """Train 20 steps of 10 s each by the run's own clock; writing fails after the steps of `full`. The last step."""
    saving = {"every_steps": None, "every_minutes": 1.0, "keep_best": 0, "keep_last": 9, **checkpoint}
    config = write_run_yaml(folder / "run.yaml", max_steps=20)
    engine = write_json(folder / "engine.json", engine_json(1, chatgot={"checkpoint": saving}))
    loop = in_process.prepare(argv(engine, folder / "out", config, text_file))
    files = loop.engine.engine.checkpoint_engine
    write = type(files).save

    class Disk(type(files)):
        def save(self, state_dict: Any, path: str) -> None:
            if loop.step in full:
                raise OSError(28, "No space left on device")
            write(self, state_dict, path)

    files.__class__ = Disk
    loop.saving = Saving(loop.saving.saver, loop.records, clock=lambda: 10.0 * loop.step)
    for _ in loop.steps():
        pass
    return loop, loop.step


def test_a_disk_that_is_full_for_a_moment_costs_one_save_and_is_tried_again_by_time(tmp_path, text_file, capsys):
    drive(tmp_path, text_file, full=range(6, 8))
    [failure] = events(tmp_path / "out", "save_failed")
    assert (failure["step"], failure["in_a_row"]) == (6, 1)
    assert tags(tmp_path / "out") == [8, 14, 20], "20 s after the failure, and then every minute again"
    assert "training goes on, it is tried again in 20 s" in capsys.readouterr().out


def test_a_failed_save_of_the_step_cadence_is_not_tried_at_every_step(tmp_path, text_file):
    drive(tmp_path, text_file, full=range(1, 3), every_steps=1)
    assert [failure["step"] for failure in events(tmp_path / "out", "save_failed")] == [1]
    assert tags(tmp_path / "out")[:2] == [12, 13], "the nine last of 3..20"


def test_three_failures_end_the_run_only_when_they_are_spread_over_every_minutes(tmp_path, text_file):
    with pytest.raises(CheckpointError, match="No space left"):
        drive(tmp_path, text_file, full=range(1, 99))
    failures = events(tmp_path / "out", "save_failed")
    assert [(failure["step"], failure["in_a_row"]) for failure in failures] == [(6, 1), (8, 2), (12, 3)]


def test_a_flush_that_is_slower_than_every_minutes_does_not_mean_a_save_at_every_step(tmp_path, text_file):
    loop, _ = drive(tmp_path, text_file, full=range(0), **{"async": True, "every_minutes": 0.01})
    saved = [event["step"] for event in events(tmp_path / "out", "saved")]
    assert saved[-1] == 20
    saved = saved[:-1]  # step 20 may be saved in its evaluation already, and is saved again with the result
    assert saved == sorted(set(saved))
    assert not loop.saving.saver.pending
    assert all(later - earlier >= 2 for earlier, later in pairwise(saved)), "the next one follows an end"
