from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from chatgot.observe.meters import Mfu, Throughput, peak_memory_gib


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def train(meter: Throughput, clock: Clock, steps: int, seconds: float, tokens: int = 1000) -> None:
    for _ in range(steps):
        clock.now += seconds
        meter.step(tokens)


def test_invariant_15_throughput_excludes_evaluation_saving_and_sampling():
    clock = Clock()
    meter = Throughput(clock)
    train(meter, clock, 5, 0.2)
    with meter.paused("eval"):
        clock.now += 30
    with meter.paused("save"):
        clock.now += 7
    with meter.paused("eval"):
        clock.now += 10
    train(meter, clock, 5, 0.2)
    reading = meter.interval()
    assert reading is not None
    assert (reading.steps, reading.tokens) == (10, 10_000)
    assert reading.tokens_per_sec == pytest.approx(5000)
    assert reading.step_ms == pytest.approx(200)
    assert meter.paused_seconds == pytest.approx({"eval": 40, "save": 7})


def test_each_interval_counts_its_own_steps():
    clock = Clock()
    meter = Throughput(clock)
    train(meter, clock, 4, 1.0)
    meter.interval()
    train(meter, clock, 2, 0.5, tokens=100)
    reading = meter.interval()
    assert reading is not None
    assert (reading.steps, reading.tokens, reading.step_ms) == (2, 200, pytest.approx(500))
    assert meter.interval() is None


def test_a_section_within_a_section_is_charged_once():
    clock = Clock()
    meter = Throughput(clock)
    clock.now += 1
    with meter.paused("eval"):
        clock.now += 5
        with meter.paused("save"):
            clock.now += 2
        clock.now += 3
    clock.now += 1
    assert meter.paused_seconds == pytest.approx({"eval": 8, "save": 2})
    meter.step(1000)
    reading = meter.interval()
    assert reading is not None
    assert reading.seconds == pytest.approx(2)


def test_a_section_that_raises_ends():
    clock = Clock()
    meter = Throughput(clock)

    def fail_after_four_seconds() -> None:
        with meter.paused("save"):
            clock.now += 4
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_after_four_seconds()
    train(meter, clock, 1, 1.0)
    assert meter.paused_seconds == pytest.approx({"save": 4})
    reading = meter.interval()
    assert reading is not None
    assert reading.seconds == pytest.approx(1)


def test_eta_leaves_out_the_first_step_and_counts_pauses():
    clock = Clock()
    meter = Throughput(clock)
    with meter.paused("eval"):  # before the first step: happens once, so it is not expected again
        clock.now += 500
    train(meter, clock, 1, 60.0)  # compiles
    meter.interval()
    assert meter.eta_seconds(99) is None
    train(meter, clock, 9, 0.5)
    meter.interval()
    assert meter.eta_seconds(90) == pytest.approx(45)
    with meter.paused("eval"):
        clock.now += 10
    assert meter.eta_seconds(90) == pytest.approx(90 * (0.5 + 10 / 10))
    assert meter.eta_seconds(0) == 0


def test_eta_is_not_moved_by_the_step_that_waits_for_the_device():
    clock = Clock()
    meter = Throughput(clock)
    etas = []
    for _ in range(10):
        train(meter, clock, 9, 0.01)  # launches only
        train(meter, clock, 1, 0.91)  # waits for all ten
        meter.interval()
        etas.append(meter.eta_seconds(100))
    assert etas[1:] == pytest.approx([10] * 9, rel=0.06)


def test_mfu_is_a_share_of_all_devices(caplog):
    caplog.set_level(logging.INFO)
    mfu = Mfu(6e9, "NVIDIA A100-SXM4-80GB", "bf16", n_devices=2)
    assert mfu(52_000) == pytest.approx(0.5)
    assert caplog.messages == []


def test_an_unknown_peak_is_said_once_and_mfu_left_out(caplog):
    caplog.set_level(logging.INFO)
    mfu = Mfu(6e9, "cpu", "fp32", n_devices=1)
    assert mfu(1000) is None
    assert mfu(2000) is None
    [message] = caplog.messages
    assert "'cpu'" in message


def test_peak_memory_is_the_most_ever_held_not_what_is_held_now():
    script = (
        "from chatgot.observe.meters import peak_memory_gib\nimport sys\nbefore = peak_memory_gib('cpu')\n"
        "block = bytearray(b'x') * 2**27\ndel block\nprint(peak_memory_gib('cpu') - before, 'torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    grown, torch_imported = done.stdout.split()
    assert 0.12 < float(grown) < 0.2  # 2**27 bytes are 0.125 GiB
    assert torch_imported == "False"
    assert peak_memory_gib("cpu") > 0
