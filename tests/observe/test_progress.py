from __future__ import annotations

import fcntl
import io
import json
import logging
import math
import os
import pty
import struct
import subprocess
import sys
import termios
from datetime import datetime
from pathlib import Path

import pytest

from chatgot.observe.progress import Progress, human_count, human_seconds, show_log

METRICS = {
    "train/loss": 1.48212,
    "optim/lr": 3e-4,
    "optim/grad_norm": 0.51,
    "perf/tokens_per_sec": 41234.0,
    "perf/step_ms": 312.2,
}
LINE = "step  250/1000 |  loss 1.4821 | lr 3.00e-04 | grad 0.51 | 41.2k tok/s |  312 ms/step | ETA 3m12s"


def test_a_log_gets_plain_lines():
    stream = io.StringIO()
    progress = Progress(1000, stream=stream)
    progress.step(250)
    progress.line(250, METRICS, eta_seconds=192)
    progress.say("saved checkpoints/step-250")
    progress.close()
    assert stream.getvalue() == f"{LINE}\nsaved checkpoints/step-250\n"


def test_absent_metrics_are_left_out_and_diverged_ones_shown():
    stream = io.StringIO()
    Progress(10, stream=stream).line(3, {"train/loss": math.nan, "perf/mfu": None, "optim/skipped_steps": 2})
    assert stream.getvalue() == "step  3/10 |     loss nan | skipped 2\n"


def test_numbers_of_a_log_stand_below_each_other():
    stream = io.StringIO()
    progress = Progress(1000, stream=stream)
    progress.line(9, METRICS)
    progress.line(1000, {**METRICS, "train/loss": 12.5, "perf/tokens_per_sec": 950.0, "perf/step_ms": 13120.0})
    first, second = stream.getvalue().splitlines()
    assert [i for i, c in enumerate(first) if c == "|"] == [i for i, c in enumerate(second) if c == "|"]


def test_a_log_for_programs_has_an_object_a_line():
    stream = io.StringIO()
    progress = Progress(1000, stream=stream, log_format="json")
    progress.step(250)
    progress.line(250, {**METRICS, "perf/mfu": None, "val/loss": math.inf}, eta_seconds=192)
    package = logging.getLogger("chatgot")
    handlers, package.handlers = package.handlers, []
    try:
        show_log(progress)
        package.info("two\nlines")
        package.warning("hot")
    finally:
        package.handlers = handlers
    progress.close()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert all(datetime.fromisoformat(line.pop("time")) for line in lines)
    assert lines == [
        {"step": 250, "of": 1000, **METRICS, "val/loss": "inf", "eta_seconds": 192},
        {"level": "info", "message": "two\nlines"},
        {"level": "warning", "message": "hot"},
    ]


def test_other_ranks_are_silent():
    stream = io.StringIO()
    progress = Progress(10, enabled=False, stream=stream)
    progress.step(1)
    progress.line(1, METRICS)
    progress.say("hello")
    progress.close()
    assert stream.getvalue() == ""


def run_with_stdout(script: str, stdout: int | None, close_first: bool = False) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-c", 'exec "$@"' + (" >&-" if close_first else ""), "bash", sys.executable, "-c", script],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


TERMINAL_SCRIPT = f"""
from chatgot.observe.progress import Progress
progress = Progress(1000)
progress.step(201)
progress.say("a message of its own")
progress.line(250, {METRICS}, eta_seconds=192, next_save="in 50 steps")
progress.line(300, {{"val/loss": 1.5}})
progress.say("hot", warning=True)
progress.close()
progress.say("afterwards")
"""


@pytest.mark.parametrize(("columns", "no_colour"), [(0, ""), (150, ""), (150, "1")])
def test_a_terminal_gets_a_bar_that_messages_do_not_break(columns, no_colour, monkeypatch):
    monkeypatch.setenv("NO_COLOR", no_colour)
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24 if columns else 0, columns, 0, 0))
    done = run_with_stdout(TERMINAL_SCRIPT, terminal)
    shown = os.read(controller, 65536).decode()
    os.close(terminal)
    os.close(controller)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\n" in shown.split("a message of its own")[1][:3], "the message stands on a line of its own"
    assert "250/1000" in shown
    assert "loss 1.4821" in shown
    assert "loss 1.4821 | 41.2k tok/s | ETA 3m12s | save in 50 steps" in shown
    assert "\rstep  300/1000 | val 1.5000 nats\r\n" in shown.replace("\x1b[K", ""), "an evaluation stays to be read"
    assert ("\x1b[33mWARNING:\x1b[0m hot" in shown) == (not no_colour)
    assert ("WARNING: hot" in shown) == bool(no_colour)
    assert shown.endswith("afterwards\r\n")


SCRIPT = """
import sys
from chatgot.observe.progress import Progress
progress = Progress(1000)
for step in range(1, 4):
    progress.step(step)
    progress.line(step, {"train/loss": 1.0})
    progress.say("message")
progress.close()
print("a library that knows nothing of this", flush=True)
print("trained", file=sys.stderr)
"""


def test_a_closed_pipe_makes_it_quiet_and_training_goes_on():
    reading, writing = os.pipe()
    os.close(reading)
    done = run_with_stdout(SCRIPT, writing)
    os.close(writing)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "trained\n"


def test_a_full_disk_behind_a_redirect_makes_it_quiet():
    with open("/dev/full", "w") as full:
        done = run_with_stdout(SCRIPT, full.fileno())
    assert done.returncode == 0, done.stderr
    assert done.stderr == "trained\n"


def test_no_standard_output_at_all_stops_nothing():
    done = run_with_stdout(SCRIPT, None, close_first=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "trained\n"


def test_a_terminal_that_vanishes_makes_the_bar_quiet():
    controller, terminal = pty.openpty()
    stream = os.fdopen(terminal, "w")
    progress = Progress(1000, stream=stream)
    progress.step(1)
    os.close(controller)
    for step in range(2, 5):
        progress.step(step)
        progress.line(step, METRICS)
        progress.say("message")
    progress.close()
    stream.close()


def test_characters_that_the_log_cannot_hold_are_escaped():
    raw = io.BytesIO()
    progress = Progress(10, stream=io.TextIOWrapper(raw, encoding="ascii"))
    progress.say("Jaqen H’ghar")
    assert raw.getvalue() == b"Jaqen H\\u2019ghar\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0s"),
        (59.7, "1m00s"),
        (192, "3m12s"),
        (3599.6, "1h00m"),
        (3700, "1h01m"),
        (86399.9, "1d00h"),
        (180000, "2d02h"),
        (math.inf, "?"),
    ],
)
def test_seconds_for_people_do_not_wrap_at_a_day(seconds, text):
    assert human_seconds(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (0.5, "0.5"),
        (950, "950"),
        (1234, "1.23k"),
        (41234, "41.2k"),
        (999_960, "1.00M"),
        (14_123_000, "14.1M"),
        (2.3e9, "2.30B"),
        (4e12, "4.00T"),
        (math.nan, "?"),
    ],
)
def test_counts_for_people(count, text):
    assert human_count(count) == text
