"""The goodput ledger of a run that waits for data, saves and evaluates slowly, is rolled back, killed and preempted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import pytest

from chatgot.data.loader import Batch, TrainBatches
from chatgot.observe.goodput import PARTS
from chatgot.observe.journal import read_journal
from chatgot.proof import digest
from chatgot.training import evaluation, run
from chatgot.training.loop import Loop
from chatgot.training.saving import Saving
from tests.support import ROOT, environment, warm_python
from tests.training import in_process
from tests.training.in_process import events
from tests.training.test_guard import FROM, TO, words

WAIT, STAND, AWAY = 0.05, 0.3, 1.5
"""Seconds of every wait for data, of every evaluation and save, and between two starts."""


KILLED = """
import json, os, signal, sys, time
import pytest
from tests.training import in_process, test_goodput as test
from tests.training.poison import Poison
from tests.training.test_guard import BAD
planted = test.plant_waits(pytest.MonkeyPatch())
began = time.time()
loop = in_process.prepare(sys.argv[2:])
Poison(loop, samples=BAD)
for done, _ in enumerate(loop.steps(), start=1):
    if done == test.FROM + 5:  # after the rollback to step 3 it has trained to step 8, and saved at step 6
        assert loop.step == test.TO + 5
        with open(sys.argv[1], "w") as file:
            json.dump([began, planted], file)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def plant_waits(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Make data, evaluations and saves slow; returns the seconds of each kind so far."""
    planted = {"data": 0.0, "evaluation": 0.0, "saving": 0.0}

    def wait(kind: str, seconds: float) -> None:
        time.sleep(seconds)
        planted[kind] += seconds

    def slowly(kind: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def slower(*args: Any, **more: Any) -> Any:
            wait(kind, STAND)
            return method(*args, **more)

        return slower

    micro_batches = TrainBatches.micro_batches

    def wait_for_data(self: TrainBatches, first: int) -> Iterator[Batch]:
        wait("data", WAIT)
        yield from micro_batches(self, first)

    monkeypatch.setattr(TrainBatches, "micro_batches", wait_for_data)
    monkeypatch.setattr(evaluation, "evaluate", slowly("evaluation", evaluation.evaluate))
    monkeypatch.setattr(Saving, "save", slowly("saving", Saving.save))
    return planted


def test_the_parts_of_a_run_add_up_to_the_clock_and_lost_steps_are_exact(tmp_path, text_file, monkeypatch, capsys):
    line, out, planted = words(tmp_path, text_file, steps=12), tmp_path / "out", tmp_path / "planted.json"
    killed = subprocess.run(
        [warm_python(), "-c", KILLED, str(planted), *line], cwd=ROOT, env=environment(), timeout=300, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    slow = plant_waits(monkeypatch)
    began, before = json.loads(planted.read_text())
    slow.update(before)
    killed_at = time.time()
    time.sleep(AWAY)
    loop = in_process.prepare(line)
    away = time.time() - killed_at
    assert loop.step == 6
    steps = Loop.steps

    def stopped_after_step_10(self: Loop) -> Iterator[int]:
        for step in steps(self):
            if step == 10:
                os.kill(os.getpid(), signal.SIGTERM)
            yield step

    with loop.stop, monkeypatch.context() as patch:
        patch.setattr(Loop, "steps", stopped_after_step_10)
        assert run.finish(loop) == 75
    stopped_at = time.time()
    time.sleep(AWAY)
    loop = in_process.prepare(line)
    away += time.time() - stopped_at
    assert loop.step == 11
    assert run.finish(loop) == 0
    told = events(out, "goodput")[-1]
    clock = datetime.fromisoformat(told["time"]).timestamp() - began
    seconds = told["seconds"]
    assert list(seconds) == list(PARTS)
    assert sum(seconds.values()) == pytest.approx(told["wall_seconds"], abs=0.01)
    assert told["wall_seconds"] == pytest.approx(clock, rel=0.01)
    assert told["lost_steps"] == (FROM - TO) + (8 - 6)
    assert seconds["lost"] > 0
    for part in ("evaluation", "saving"):
        assert slow[part] <= seconds[part] <= slow[part] + 0.15 * clock, part
    assert 2 * AWAY <= seconds["downtime"] <= away + 0.15 * clock
    assert slow["data"] - 6 * WAIT <= seconds["data"] <= slow["data"] + 0.15 * clock, (
        "two steps went with the kill; the precision check and two diagnoses have a batch each"
    )
    records, _ = read_journal(out / "metrics.jsonl")
    walls = [record["goodput/wall_seconds"] for record in records if "train/loss" in record]
    assert walls == sorted(walls)
    assert walls[-1] <= told["wall_seconds"]
    assert f"{told['lost_steps']} steps were trained again" in capsys.readouterr().out
    assert max(digest.history(out).digests) == 12
