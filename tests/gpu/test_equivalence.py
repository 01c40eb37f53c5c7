"""Every precision, ZeRO stage and offload trains as a plain fp32 PyTorch loop on the same device."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch

from chatgot.errors import ConfigError
from tests.gpu.machine import KIND
from tests.gpu.tiny import LR, plain_losses, tiny_engine, train, worst

pytestmark = pytest.mark.gpu

STEPS = 30
FP32, SIXTEEN_BIT = 1e-4, 2e-2
"""Relative."""
AUTOCAST_FP16 = {"stage": 0, "torch_autocast": {"enabled": True, "dtype": "float16"}}


def cases() -> dict[str, dict[str, Any]]:
    # fp16 autocast at stage 0 only: with ZeRO, DeepSpeed 0.19.8 clips the gradients while they are still multiplied by
    # the loss scale.
    found: dict[str, dict[str, Any]] = {"autocast_fp16-stage0": AUTOCAST_FP16}
    for stage in range(4):
        found[f"fp32-stage{stage}"] = {"stage": stage}
        found[f"autocast_bf16-stage{stage}"] = {"stage": stage, "precision": "autocast_bf16"}
        for precision in ("bf16", "fp16"):
            if stage:
                found[f"{precision}-stage{stage}"] = {"stage": stage, "precision": precision}
        for precision in ("fp32", "bf16", "fp16"):
            if stage:
                found[f"{precision}-stage{stage}-offload"] = {"stage": stage, "precision": precision, "offload": True}
    for precision in ("fp32", "bf16", "fp16"):
        found[f"{precision}-stage3-offload_param"] = {"stage": 3, "precision": precision, "offload_param": True}
        found[f"{precision}-stage3-offload_both"] = {
            "stage": 3,
            "precision": precision,
            "offload_param": True,
            "offload": True,
        }
    return dict(sorted(found.items(), key=lambda item: ("offload" in item[0], item[0])))


@pytest.fixture(scope="module")
def reference(device: torch.device) -> list[float]:
    return plain_losses(device, STEPS)


@pytest.mark.parametrize("name", cases())
def test_engine_trains_as_a_plain_loop_on_the_device(name, device, reference, tmp_path, request, record):
    if "fp16" in name:
        request.getfixturevalue("needs_fp16")
    with tiny_engine(tmp_path, device, **cases()[name]) as engine:
        started = time.perf_counter()
        found = train(engine, device, STEPS)
        seconds = time.perf_counter() - started
        kinds = {p.device.type for p in engine.engine.module.parameters()}
        skipped = engine.engine.skipped_steps
    deviation = worst(found.losses, reference)
    record(worst=deviation, last_loss=found.losses[-1], skipped=skipped, step_ms=1000 * seconds / STEPS)
    if "offload_param" not in name:
        assert kinds == {KIND}
    assert skipped == 0
    assert all(norm is not None and math.isfinite(norm) and norm > 0 for norm in found.grad_norms)
    assert deviation <= (FP32 if name.startswith("fp32") else SIXTEEN_BIT)


def test_control_the_comparison_notices_another_clipping_or_rate(device, reference, record):
    unclipped = worst(plain_losses(device, STEPS, max_norm=0.0), reference)
    slower = worst(plain_losses(device, STEPS, lr=0.9 * LR), reference)
    record(unclipped=unclipped, slower=slower, first=reference[0], last=reference[-1])
    assert unclipped > FP32
    assert slower > FP32
    assert reference[-1] < 0.9 * reference[0]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bit_is_refused_at_stage_0(precision, device, tmp_path):
    with pytest.raises(ConfigError, match=r"zero_optimization\.stage = 1"):
        with tiny_engine(tmp_path, device, stage=0, precision=precision):
            pass
