"""fp16: the dynamic loss scale finds its place, skipped steps leave everything consistent, and a scale at its minimum
ends the run.
"""

from __future__ import annotations

import math

import pytest
import torch

from chatgot.engine.optimizer import schedule_factor
from chatgot.errors import NumericsError
from tests.gpu.tiny import LR, fp32_parameters, tiny_engine, train

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("needs_fp16")]


def fp16(**changes: int) -> dict:
    return {
        "fp16": {
            "enabled": True,
            "loss_scale": 0,
            "loss_scale_window": 1000,
            "hysteresis": 1,
            "min_loss_scale": 1,
            **changes,
        }
    }


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_overflow_lowers_the_scale_skips_the_step_and_training_goes_on(stage, device, tmp_path, record):
    steps = 40
    with tiny_engine(tmp_path, device, stage=stage, **fp16(initial_scale_power=32)) as engine:
        before = fp32_parameters(engine)
        first = train(engine, device, 1, total=steps)
        after_skip = fp32_parameters(engine)
        rest = train(engine, device, steps - 1, total=steps)
        counters = engine.engine.global_steps, engine.engine.skipped_steps
        schedule = engine.config.chatgot.schedule
        assert schedule is not None
    applied = first.applied + rest.applied
    scales = [2.0**32, *first.loss_scales, *rest.loss_scales]
    norms = first.grad_norms + rest.grad_norms
    losses = first.losses + rest.losses
    skipped = applied.count(False)
    record(skipped=skipped, scale=scales[-1], first_loss=losses[0], last_loss=losses[-1])
    assert not applied[0]
    assert all(torch.equal(after_skip[name], weight) for name, weight in before.items())
    search = applied.index(True)
    assert 4 < search < 25
    assert skipped <= search + 4  # at the edge a later batch may overflow once more
    assert counters == (steps, skipped)
    for index, was_applied in enumerate(applied):
        before_step = scales[index]
        assert before_step is not None
        assert scales[index + 1] == (before_step if was_applied else before_step / 2)
        norm = norms[index]
        assert norm is not None
        assert math.isfinite(norm) == was_applied
    assert first.lrs + rest.lrs == pytest.approx([LR * schedule_factor(step, steps, schedule) for step in range(steps)])
    assert losses[-1] < 0.92 * losses[search]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_scale_stuck_at_its_minimum_is_a_numerics_error(stage, device, tmp_path, record):
    with tiny_engine(
        tmp_path, device, stage=stage, **fp16(initial_scale_power=28, min_loss_scale=2**26, hysteresis=2)
    ) as engine:
        before = fp32_parameters(engine)
        with pytest.raises(NumericsError) as refusal:
            train(engine, device, 20)
        record(step=engine.engine.global_steps, scale=engine.loss_scale)
        assert engine.loss_scale == 2.0**26
        assert all(torch.equal(fp32_parameters(engine)[name], weight) for name, weight in before.items())
    assert "loss scale" in str(refusal.value) or "max_consecutive_skips" in str(refusal.value)
