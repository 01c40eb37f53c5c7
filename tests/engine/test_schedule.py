"""The learning rate as a pure function of the step."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatgot.deepspeed_json.settings import ScheduleConfig
from chatgot.engine.optimizer import describe_schedule, schedule_factor


def rates(kind: str, max_steps: int = 20, **keys) -> list[float]:
    config = ScheduleConfig(type=kind, **{"warmup_steps": 4, "min_lr_ratio": 0.1, **keys})  # type: ignore[arg-type]
    return [schedule_factor(step, max_steps, config) for step in range(max_steps)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_warmup_rises_linearly_and_the_first_step_already_learns(kind):
    assert rates(kind)[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_last_step_has_the_minimum_and_later_ones_keep_it(kind):
    assert rates(kind)[-1] == pytest.approx(0.1)
    config = ScheduleConfig(type=kind, warmup_steps=4, min_lr_ratio=0.1)
    assert schedule_factor(19 + 1000, 20, config) == pytest.approx(0.1)


def test_cosine_is_half_way_down_in_the_middle_and_flat_at_its_ends():
    down = rates("cosine", max_steps=25)[4:]  # 21 steps, so that number 10 is the middle
    assert down[10] == pytest.approx(0.55)
    assert down[5] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    steps = [a - b for a, b in itertools.pairwise(down)]
    assert steps[0] < steps[9] > steps[-1]


def test_linear_falls_by_the_same_amount_every_step():
    down = rates("linear")[4:]
    assert [a - b for a, b in itertools.pairwise(down)] == pytest.approx([0.9 / 15] * 15)


def test_wsd_stays_at_the_peak_until_its_share_of_the_steps_is_left():
    found = rates("wsd", decay_fraction=0.25)
    assert found[4:16] == [1.0] * 12
    assert found[16] > found[17] > found[18] > found[19] == pytest.approx(0.1)


def test_constant_stays():
    assert rates("constant")[3:] == [1.0] * 17


@given(
    kind=st.sampled_from(["cosine", "linear", "wsd", "constant"]),
    max_steps=st.integers(1, 300),
    warmup=st.integers(0, 300),
    low=st.floats(0.0, 1.0),
    decay=st.floats(0.01, 1.0),
)
def test_every_rate_is_between_the_minimum_and_the_peak_and_never_zero_in_warmup(kind, max_steps, warmup, low, decay):
    config = ScheduleConfig(type=kind, warmup_steps=warmup, min_lr_ratio=low, decay_fraction=decay)
    found = [schedule_factor(step, max_steps, config) for step in range(max_steps)]
    assert all(0 < rate <= 1 for rate in found[:warmup])
    assert all(low - 1e-12 <= rate <= 1 + 1e-12 for rate in found[warmup:])
    after = found[warmup:]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(after)), "after the warm-up the rate never rises"


def test_description_names_first_peak_and_last_rate():
    text = describe_schedule(20, ScheduleConfig(type="cosine", warmup_steps=4, min_lr_ratio=0.1), 4e-3)
    assert text == "cosine, 0.001 -> 0.004 over 4 steps -> 0.0004 at step 20"
