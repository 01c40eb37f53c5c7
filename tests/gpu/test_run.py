"""The training program under ZeRO-3 on the device: evaluation, sampling, metrics, and a random state that they leave
alone.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from chatgot.devices import device_facts, peak_flops
from chatgot.inference.sample import SampleArguments, sample
from chatgot.observe.goodput import gpu_energy
from tests.gpu import program
from tests.gpu.tiny import json_tree
from tests.support import live_metrics, write_json, write_run_yaml

pytestmark = pytest.mark.gpu

STEPS = 12


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize(("stage", "precision"), [(3, "bf16"), (3, "fp32"), (1, "bf16"), (2, "fp16")])
def test_a_run_evaluates_samples_and_reports_and_none_of_it_touches_the_training(
    stage, precision, device, tmp_path: Path, text_file: Path, request, record
):
    if precision == "fp16":
        request.getfixturevalue("needs_fp16")
    json = write_json(tmp_path / "engine.json", json_tree(stage=stage, precision=precision, gradient_clipping=1.0))
    cadences = {
        "busy": {"eval_every": 3, "sample_every": 4, "sample_prompts": ["The night", "W"], "sample_max_new_tokens": 24},
        "quiet": {"eval_every": None, "sample_every": None},
    }
    for name, cadence in cadences.items():
        config = write_run_yaml(tmp_path / f"{name}.yaml", model={"dropout": 0.1}, max_steps=STEPS, **cadence)
        program.train(program.argv(json, tmp_path / name, config, text_file))
    busy, quiet = tmp_path / "busy", tmp_path / "quiet"

    losses, validation = program.series(busy, "train/loss"), program.series(busy, "val/loss")
    assert list(losses) == list(range(1, STEPS + 1))
    assert losses == program.series(quiet, "train/loss")
    assert list(validation) == [3, 6, 9, 12]
    assert validation[12] < validation[3]
    assert validation[12] == program.series(quiet, "val/loss")[12]
    samples = sorted(path.name for path in (busy / "samples").iterdir())
    assert samples == [f"step-{step:06d}.txt" for step in (4, 8, 12)]
    assert "The night" in (busy / "samples" / samples[-1]).read_text(encoding="utf-8")

    last = [row for row in live_metrics(busy / "metrics.jsonl") if "train/loss" in row][-1]
    record(
        val_loss=validation[12], step_ms=last["perf/step_ms"], mfu=last.get("perf/mfu"), peak_gib=last["mem/peak_gib"]
    )
    assert last["mem/peak_gib"] > 0
    assert last["perf/tokens_per_sec"] > 0
    if device.type == "cuda":
        assert last["mem/peak_gib"] < torch.cuda.get_device_properties(device).total_memory / 2**30
    facts = device_facts()
    if peak_flops(facts.name, precision) is not None:
        assert 0 < last["perf/mfu"] < 1

    texts = {
        kind: sample(SampleArguments(busy, prompt="The night", max_new_tokens=16, greedy=True, device=kind))
        for kind in {"cpu", device.type}
    }
    assert len(set(map(tuple, texts.values()))) == 1, texts
    assert texts["cpu"][0].startswith("The night")
    assert len(texts["cpu"][0]) == len("The night") + 16


def test_mfu_is_known_on_data_center_devices(device, record):
    """The names that the driver gives these devices are in the table; another device is only reported."""
    facts = device_facts()
    known = peak_flops(facts.name, "bf16")
    record(device_name=facts.name, bf16_peak_tflops=None if known is None else known / 1e12)
    if any(name in facts.name for name in ("H100", "H200", "A100")) and "MIG" not in facts.name:
        assert known is not None


@pytest.mark.usefixtures("cuda_only")
def test_the_energy_that_the_driver_counts_grows_with_work(device, record):
    joules, sides = gpu_energy(1), torch.randn(2, 4096, 4096, device=device)
    before, began = joules(), time.monotonic()
    while time.monotonic() - began < 2:
        torch.mm(sides[0], sides[1])
        torch.cuda.synchronize()
    taken = joules() - before
    record(watts=taken / 2)
    assert 20 < taken < 2 * 1500
