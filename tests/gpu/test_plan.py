"""The plan's peak memory against the allocator's, on a grid of twenty configurations; one process each."""

from __future__ import annotations

import statistics

import pytest
import torch

from chatgot.bench.measuring import in_own_process
from chatgot.bench.memory import GRID
from chatgot.config.run import ModelConfig
from chatgot.deepspeed_json.resolve import build_engine_config
from chatgot.devices import device_facts
from chatgot.engine.build import build
from chatgot.model.gpt import GPT
from chatgot.model.shapes import count_parameters
from tests.gpu.machine import DRY_RUN
from tests.support import engine_json

pytestmark = pytest.mark.gpu

MEDIAN, WORST = 0.05, 0.12
ERRORS: dict[int, float] = {}


@pytest.mark.parametrize("index", range(len(GRID)), ids=[case.name for case in GRID])
def test_one_of_the_grid(index, monkeypatch, record):
    if DRY_RUN and "fp16" in GRID[index].deepspeed:
        pytest.skip("dry run on the CPU: it has no fp16")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.delenv(name, raising=False)  # this process is a rank itself; the program is another one
    found = in_own_process("plan", "--one", str(index), timeout=270)
    record(**found)
    ERRORS[index] = abs(found["error"])
    assert ERRORS[index] <= WORST


def test_zero_3_never_holds_the_whole_model_while_it_is_built(device, record):
    shape = ModelConfig(architecture="gpt2", d_model=512, n_layers=2 if DRY_RUN else 12, n_head=8, d_hid=2048)
    parameters = count_parameters(shape, 256)
    config = build_engine_config(
        engine_json(3, "bf16", offload=True, offload_param=True, batch=2, micro=2),
        "case.json",
        world_size=1,
        facts=device_facts(),
        n_params=parameters,
    )
    model = GPT(shape, 256)
    model.init_weights(1)
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    engine = build(model, config, device)
    most = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else 0
    engine.engine.destroy()
    record(most=most, whole=2 * parameters)
    assert most < 2 * parameters / 2


def test_median_error_of_the_grid(record):
    if not ERRORS:
        pytest.skip("the grid was not measured")
    record(configurations=len(ERRORS), median=statistics.median(ERRORS.values()), worst=max(ERRORS.values()))
    assert statistics.median(ERRORS.values()) <= MEDIAN
