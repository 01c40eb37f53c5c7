"""The whole plan, against the CPU allocator: which moment of a step takes most, and how much."""

from __future__ import annotations

import json
import statistics
from typing import Any

import pytest

from chatgot.config.run import ModelConfig
from chatgot.deepspeed_json.resolve import build_engine_config
from chatgot.devices import DeviceFacts, find_device
from chatgot.model.shapes import count_parameters
from chatgot.plan.estimate import Estimate, estimate
from tests.support import engine_json, run_ranks

MODEL = {"architecture": "gpt2", "d_model": 128, "n_layers": 4, "n_head": 4, "d_hid": 512, "max_seq_length": 64}
MODERN = {**MODEL, "architecture": "modern"}
RECOMPUTED = {"activation_checkpointing": {}}
ON_TWO_RANKS = (
    "fp32 stage 0, recomputed",
    "fp32 stage 1, one micro batch",
    "fp32 stage 2",
    "fp32 stage 2, small batch",
    "fp32 stage 3",
    "fp32 stage 3, small batch",
    "bf16 stage 1, small batch",
    "bf16 stage 2, small batch",
    "bf16 stage 3",
)
"""Every stage, precision and moment."""


def case(
    world_size: int,
    vocabulary: int = 500,
    micro: int = 8,
    accumulation: int = 2,
    model: dict[str, Any] | None = None,
    **tree: Any,
) -> dict[str, Any]:
    """Buckets as a shipped JSON has them: as large as the model."""
    found = engine_json(batch=micro * accumulation * world_size, micro=micro, **tree)
    for key in ("reduce_bucket_size", "allgather_bucket_size"):
        found["zero_optimization"].pop(key)
    return {"json": found, "model": model or MODEL, "vocabulary": vocabulary}


def cases(world_size: int, every: bool) -> dict[str, dict[str, Any]]:
    """The loss, a block, the reduction and the step each are the highest moment of some. A CPU is slow at bf16."""
    kinds: dict[str, dict[str, Any]] = {
        "fp32 stage 0": {"stage": 0},
        "fp32 stage 0, one micro batch": {"stage": 0, "accumulation": 1},
        "fp32 stage 0, large vocabulary": {"stage": 0, "vocabulary": 5000},
        "fp32 stage 0, recomputed": {"stage": 0, **RECOMPUTED},
        "fp32 stage 0, modern": {"stage": 0, "model": MODERN},
        "fp32 stage 1": {"stage": 1},
        "fp32 stage 1, one micro batch": {"stage": 1, "accumulation": 1},
        "fp32 stage 2": {"stage": 2},
        "fp32 stage 2, small batch": {"stage": 2, "micro": 1},
        "fp32 stage 3": {"stage": 3},
        "fp32 stage 3, small batch": {"stage": 3, "micro": 1},
        "bf16 stage 1": {"stage": 1, "precision": "bf16", "micro": 4},
        "bf16 stage 1, small batch": {"stage": 1, "precision": "bf16", "micro": 1},
        "bf16 stage 2, modern": {"stage": 2, "precision": "bf16", "micro": 4, "model": MODERN},
        "bf16 stage 2, modern, recomputed": {
            "stage": 2,
            "precision": "bf16",
            "micro": 4,
            "model": MODERN,
            **RECOMPUTED,
        },
        "bf16 stage 2, small batch": {"stage": 2, "precision": "bf16", "micro": 1},
        "bf16 stage 2, offload, small batch": {"stage": 2, "precision": "bf16", "micro": 1, "offload": True},
        "bf16 stage 3": {"stage": 3, "precision": "bf16", "micro": 4},
    }
    return {name: case(world_size, **kind) for name, kind in kinds.items() if every or name in ON_TWO_RANKS}


def predicted(case: dict[str, Any], world_size: int) -> Estimate:
    shape, vocabulary = ModelConfig(**case["model"]), case["vocabulary"]
    facts = DeviceFacts("cpu", bf16=True, fp16=False)
    n_params = count_parameters(shape, vocabulary)
    engine = build_engine_config(case["json"], "case.json", world_size=world_size, facts=facts, n_params=n_params)
    return estimate(shape, vocabulary, engine, world_size, find_device("cpu"))


@pytest.mark.parametrize(
    ("world_size", "every"),
    [(1, True), (2, False), pytest.param(2, True, marks=pytest.mark.slow)],
    ids=["1 rank", "2 ranks", "2 ranks, every case"],
)
def test_the_peak_of_a_step(world_size, every, tmp_path):
    (tmp_path / "cases.json").write_text(json.dumps(cases(world_size, every)))
    program = ["-m", "tests.distributed.programs.memory_peak", str(tmp_path / "cases.json"), str(tmp_path / "out.json")]
    run_ranks(program, world_size)
    measured = json.loads((tmp_path / "out.json").read_text())
    errors, moments = {}, set()
    for name, one in cases(world_size, every).items():
        plan = predicted(one, world_size)
        errors[name] = (plan.peak + sum(plan.states.host.values())) / measured[
            name
        ] - 1  # on a CPU, offloaded or not is one memory
        moments.add(plan.peak_at.split(" block")[0])
    found = ", ".join(f"{name}: {100 * error:+.1f} %" for name, error in errors.items())
    sizes = sorted(abs(error) for error in errors.values())
    # With two ranks some peaks move by a tenth or two from run to run: the more, the busier the machine is.
    if world_size == 1:
        assert sizes[-1] <= 0.05, found
    assert statistics.median(sizes) <= (0.02 if world_size == 1 else 0.05), found
    assert moments >= {"the loss", "the backward pass of", "the reduction of gradients"}
