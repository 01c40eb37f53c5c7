"""The ledger by a clock of the test's own: what a kill takes with it, and accounts that are not there."""

from __future__ import annotations

import datetime
import json
import logging
from datetime import timezone
from pathlib import Path
from typing import Any

import pytest
import torch

from chatgot.observe.goodput import EVERY_SECONDS, PARTS, Ledger, describe, energy_counter
from chatgot.observe.meters import Throughput


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def ledger(clock: Clock, began: float = 0.0) -> tuple[Ledger, Throughput]:
    meter = Throughput(clock)
    return Ledger(meter, began, clock), meter


def test_every_second_of_a_start_has_one_part():
    clock = Clock()
    clock.now = 7.0
    account, meter = ledger(clock)
    with meter.paused("save"):
        clock.now += 2
    for batch in meter.waiting(iter([1, 2])):
        clock.now += 10 if batch == 1 else 4
        meter.step(1)
    with meter.paused("rollback"):
        clock.now += 3
    told = account.tell(2)
    spent = {part: seconds for part, seconds in told["seconds"].items() if seconds}
    assert spent == {"startup": 7.0, "saving": 2.0, "compilation": 6.0, "compute": 8.0, "other": 3.0}
    assert (told["wall_seconds"], told["goodput"], told["lost_steps"]) == (26.0, round(8 / 26, 4), 0)
    assert describe(told).startswith(
        "26s in all: 30.8 % training, 26.9 % start-up, 23.1 % the first step's compilation"
    )
    assert not account.due()
    clock.now += EVERY_SECONDS
    assert account.due()


def written(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return path


def goodput(step: int, ago: float, lost: int = 0, **seconds: float) -> dict[str, Any]:
    time = (datetime.datetime.now(timezone.utc) - datetime.timedelta(seconds=ago)).isoformat()
    parts = {**dict.fromkeys(PARTS, 0.0), **seconds}
    return {"event": "goodput", "step": step, "time": time, "lost_steps": lost, "seconds": parts}


def test_a_kill_after_the_last_account_is_seen_from_the_journal(tmp_path):
    told = [goodput(10, 130, compute=100.0, startup=5.0), goodput(20, 30, compute=190.0, startup=5.0)]
    lines: list[dict[str, Any]] = [{"step": step, "digest": {}} for step in range(1, 26)]
    lines.append({"step": 24, "train/loss": 1.0, "goodput/wall_seconds": 215.0})
    account, _ = ledger(Clock())
    account.go_on(told, written(tmp_path / "metrics.jsonl", *lines), step=10)
    seconds = account.seconds()
    assert account.lost_steps == 15
    assert seconds["compute"] == 100.0
    assert seconds["lost"] == pytest.approx(190 + 20 - 100)
    assert seconds["downtime"] == pytest.approx(30 - 20, abs=0.5)
    assert sum(seconds.values()) == pytest.approx(195 + 30, abs=0.5)


def test_a_start_that_goes_on_where_the_last_one_ended_loses_nothing(tmp_path):
    lines = written(tmp_path / "metrics.jsonl", {"step": 20, "digest": {}})
    account, _ = ledger(Clock())
    account.go_on([goodput(20, 8, lost=4, compute=50.0)], lines, step=20)
    assert account.lost_steps == 4
    assert {part: round(seconds) for part, seconds in account.seconds().items() if seconds} == {
        "compute": 50,
        "downtime": 8,
    }


def test_energy_is_the_counters_rise_over_all_starts(tmp_path):
    counter = [7000.0]
    account = Ledger(Throughput(Clock()), 0.0, Clock(), joules=lambda: counter[0])
    account.go_on([{**goodput(20, 8), "joules": 500.0}], written(tmp_path / "metrics.jsonl"), step=20)
    counter[0] += 3100
    told = account.tell(21)
    assert told["joules"] == 3600.0
    assert describe(told).endswith("; 1 Wh")
    account, _ = ledger(Clock())
    assert "joules" not in account.tell(1)


def test_an_energy_counter_that_fails_ends_no_run(caplog):
    values = iter([4.0, 5.0, OSError("the GPU is lost"), OSError("the GPU is lost"), 9.0])

    def counter() -> float:
        value = next(values)
        if isinstance(value, OSError):
            raise value
        return value

    account = Ledger(Throughput(Clock()), 0.0, Clock(), joules=counter)
    assert [account.tell(step)["joules"] for step in range(1, 5)] == [1.0, 1.0, 1.0, 5.0]
    assert caplog.text.count("the GPU is lost") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_where_no_driver_counts_energy_it_is_left_out_and_said(caplog):
    caplog.set_level(logging.INFO)
    assert energy_counter(torch.device("cuda"), 1) is None
    assert "energy is left out of the run's account: libnvidia-ml" in caplog.text
    caplog.clear()
    assert energy_counter(torch.device("cpu"), 1) is None
    assert not caplog.text


@pytest.mark.parametrize(
    "event",
    [None, {"event": "started"}, {"event": "goodput"}, {"event": "goodput", "step": [], "seconds": {}}],
    ids=str,
)
def test_without_a_readable_account_it_begins_with_this_start(event, tmp_path):
    account, _ = ledger(Clock())
    account.go_on([event], tmp_path / "metrics.jsonl", step=5)
    assert not any(account.seconds().values())
