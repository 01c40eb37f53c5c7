"""torch.compile changes no loss beyond rounding; whether it is faster is reported."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu import program
from tests.gpu.machine import DRY_RUN
from tests.gpu.tiny import ADAMW, json_tree, micro_batches, tiny_engine, worst
from tests.support import write_json, write_run_yaml

pytestmark = pytest.mark.gpu

COMPILE = {"chatgot": {"compile": {"enabled": True}}}
MODEL: dict[str, Any] = (
    {"n_layers": 2}
    if DRY_RUN
    else {"d_model": 512, "n_layers": 4, "n_head": 8, "d_hid": 1408, "max_seq_length": 512, "init_std": 0.02}
)
BATCH = 8 if DRY_RUN else 16
STEPS = 10
OPTIMIZER = {"type": "AdamW", "params": {**ADAMW["params"], "lr": 5e-4}}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(folder: Path, device: torch.device, case: dict[str, Any]) -> tuple[list[float], float, float]:
    """Losses, milliseconds of a step once all is compiled, and seconds of the first one."""
    losses, seconds = [], []
    with tiny_engine(
        folder, device, MODEL, batch=BATCH, micro=BATCH, gradient_clipping=1.0, optimizer=OPTIMIZER, **case
    ) as engine:
        block = engine.engine.module.config.max_seq_length
        for step in range(STEPS):
            started = time.perf_counter()
            losses.append(float(engine.train_step(micro_batches(step, device, block, BATCH, BATCH))))
            seconds.append(time.perf_counter() - started)
    return losses, 1000 * statistics.median(seconds[STEPS // 2 :]), seconds[0]


@pytest.mark.parametrize(
    ("stage", "precision", "tolerance"), [(0, "fp32", 1e-3), (1, "bf16", 1e-2), (2, "fp32", 1e-3), (3, "bf16", 1e-2)]
)
def test_compiled_training_gives_the_same_losses(stage, precision, tolerance, device, tmp_path, record):
    case = {"stage": stage, "precision": precision}
    eager, eager_ms, _ = run(tmp_path, device, case)
    compiled, compiled_ms, first_seconds = run(tmp_path, device, {**case, **COMPILE})
    deviation = worst(compiled, eager)
    record(
        worst=deviation,
        eager_ms=eager_ms,
        compiled_ms=compiled_ms,
        ratio=eager_ms / compiled_ms,
        compile_seconds=first_seconds,
    )
    assert deviation <= tolerance
    assert compiled[-1] < compiled[0]


def test_a_compiled_run_evaluates_samples_and_saves(device, tmp_path: Path, text_file: Path, record):
    """Sampling calls the model with a cache that grows by a token each time: it must neither fail nor compile anew for
    each length.
    """
    config = write_run_yaml(
        tmp_path / "run.yaml",
        max_steps=6,
        eval_every=3,
        sample_every=3,
        sample_prompts=["The night", "W"],
        sample_max_new_tokens=24,
    )
    seconds, graphs = {}, {}
    for name, case in {"eager": {}, "compiled": {"compile": {"enabled": True}}}.items():
        checkpoint = {"checkpoint": {"every_steps": None, "every_minutes": None, "keep_best": 0}}
        json = write_json(
            tmp_path / f"{name}.json", json_tree(stage=1, gradient_clipping=1.0, chatgot={**checkpoint, **case})
        )
        torch._dynamo.utils.counters.clear()
        started = time.perf_counter()
        program.train(program.argv(json, tmp_path / name, config, text_file))
        seconds[name] = time.perf_counter() - started
        graphs[name] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    losses = [list(program.series(tmp_path / name, "train/loss").values()) for name in seconds]
    validation = [list(program.series(tmp_path / name, "val/loss").values()) for name in seconds]
    record(
        worst=worst(losses[1], losses[0]),
        worst_val=worst(validation[1], validation[0]),
        **{f"{name}_seconds": s for name, s in seconds.items()},
        graphs=graphs["compiled"],
    )
    assert worst(losses[1], losses[0]) <= 1e-3
    assert worst(validation[1], validation[0]) <= 1e-3
    assert graphs["eager"] == 0
    assert 0 < graphs["compiled"] <= 6
    assert (tmp_path / "compiled" / "samples" / "step-000006.txt").is_file()
