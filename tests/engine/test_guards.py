"""The stage 0 guard together with fp16 autocast's GradScaler. The other guards:
tests/distributed/test_{numerics,muon}.py.
"""

from __future__ import annotations

import math

import pytest
import torch

from chatgot.config.run import ModelConfig
from chatgot.deepspeed_json.resolve import build_engine_config
from chatgot.devices import DeviceFacts
from chatgot.engine.build import build
from chatgot.model.gpt import GPT
from tests.support import TINY_MODEL, engine_json


@pytest.mark.parametrize("clipping", [1.0, 0.0])
@pytest.mark.usefixtures("process_group")
def test_fp16_autocast_at_stage_0_unscales_once_and_counts_its_skips(clipping):
    tree = engine_json(
        0, batch=2, micro=2, gradient_clipping=clipping, torch_autocast={"enabled": True, "dtype": "float16"}
    )
    facts = DeviceFacts("cpu", bf16=True, fp16=True)  # slow on this CPU, but it computes
    model = GPT(ModelConfig(**TINY_MODEL), 64)
    model.init_weights(1)
    engine = build(
        model, build_engine_config(tree, "ds.json", world_size=1, facts=facts, n_params=30_000), torch.device("cpu")
    )
    torch.manual_seed(0)
    input_ids = torch.randint(64, (2, 16))

    def step() -> float:
        return float(engine.train_step([(input_ids, input_ids)]))

    losses = [step(), step()]
    assert engine.grad_norm is not None
    assert 0.1 < engine.grad_norm < 10  # not multiplied by the loss scale
    scale = engine.loss_scale
    assert scale is not None
    poison = model.norm.register_forward_hook(
        lambda _m, _a, output: output.register_hook(lambda g: g * math.inf) and None
    )
    losses.append(step())
    poison.remove()
    assert engine.engine.skipped_steps == 1
    assert not engine.engine.was_step_applied()
    assert math.isinf(engine.grad_norm)
    assert engine.loss_scale == scale / 2
    losses += [step(), step()]
    engine.engine.destroy()
    assert engine.engine.skipped_steps == 1
    assert losses[3] == losses[2]
    assert losses[4] < losses[3] < losses[1] < losses[0]
