"""Cells of the table of signals.py, in phases other than a step: nobody is left, and what was there is saved."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.faults.signals import cell

pytestmark = pytest.mark.slow

CELLS = [
    ("launch/run", "launcher", "TERM", "start", "75, ", "status "),
    ("launch/run", "rank 0", "TERM", "start", "75, ", "status 75"),
    ("deepspeed", "launcher", "KILL", "start", "-9, ", "status "),
    ("deepspeed", "node", "KILL", "start", "0, ", "status "),
    ("launch/run", "rank 1", "TERM", "data", "75, ", "status 75"),
    ("torchrun", "launcher", "KILL", "data", "-9, ", "status 75"),
    ("deepspeed", "launcher", "HUP", "data", "", "status 75"),
    ("launch/run", "launcher", "TERM", "evaluation", "75, ", "saved, status 75"),
    ("torchrun", "rank 0", "TERM", "evaluation", "1, ", "saved, status 75"),
    ("deepspeed", "launcher", "KILL", "evaluation", "-9, ", "saved, status 75"),
    ("launch/run", "launcher", "KILL", "sampling", "-9, ", "saved, status 75"),
    ("launch/run", "rank 0", "INT", "sampling", "75, ", "saved, status 75"),
    ("launch/run", "launcher", "USR1", "saving", "75, ", "saved, status 75"),
    ("torchrun", "launcher", "USR1", "saving", "", "saved, status 75"),
    ("deepspeed", "node", "TERM", "saving", "", "saved, status 75"),
]


@pytest.mark.parametrize(("launcher", "target", "name", "phase", "code", "outcome"), CELLS)
def test_a_signal_leaves_nobody_behind_and_loses_nothing(
    launcher: str, target: str, name: str, phase: str, code: str, outcome: str, tmp_path: Path
) -> None:
    said = cell(launcher, target, signal.Signals[f"SIG{name}"], tmp_path, phase)
    assert "LEFT" not in said
    assert said.startswith(code)
    assert outcome in said


def test_a_stopped_run_is_saved_at_its_step_twenty_times_of_twenty(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / str(number)).mkdir()
        said = cell("launch/run", "launcher", signal.SIGTERM, tmp_path / str(number))
        assert said.startswith("75, ")
        assert said.endswith("saved, status 75")
