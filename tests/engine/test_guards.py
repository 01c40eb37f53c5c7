"""The stage 0 guard together with fp16 autocast's GradScaler. The other guards:
tests/distributed/test_{numerics,muon}.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any

import pytest
import torch

from chatgot.config.run import ModelConfig
from chatgot.deepspeed_json.machine import has_command
from chatgot.deepspeed_json.resolve import EngineConfig, build_engine_config
from chatgot.deepspeed_json.settings import CompileConfig
from chatgot.devices import DeviceFacts
from chatgot.engine import guards
from chatgot.engine.build import build
from chatgot.engine.step import TrainingEngine
from chatgot.errors import ConfigError, MachineError
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


def compiled(mode: str, stage: int, micro: int) -> EngineConfig:
    tree = engine_json(stage, batch=8, micro=micro, chatgot={"compile": {"enabled": True, "mode": mode}})
    facts = DeviceFacts("cpu", bf16=True, fp16=True)
    return build_engine_config(tree, "ds.json", world_size=1, facts=facts, n_params=30_000)


@pytest.mark.parametrize(
    ("mode", "stage", "micro", "device", "refused"),
    [
        ("reduce-overhead", 0, 4, "cuda", True),
        ("max-autotune", 1, 4, "cuda", True),
        ("reduce-overhead", 0, 8, "cuda", False),
        ("reduce-overhead", 2, 4, "cuda", False),
        ("default", 0, 4, "cuda", False),
        ("reduce-overhead", 0, 4, "cpu", False),
    ],
)
def test_graphs_that_overwrite_gradients_are_refused(mode, stage, micro, device, refused):
    with pytest.raises(ConfigError, match="overwrite gradients") if refused else contextlib.nullcontext():
        guards.refuse_overwritten_gradients(compiled(mode, stage, micro), torch.device(device))


@pytest.mark.usefixtures("process_group")
def test_losses_that_a_graph_writes_to_one_place_are_kept_apart():
    """As chatgot.compile.mode = reduce-overhead does on a GPU."""
    model = GPT(ModelConfig(**TINY_MODEL), 64)
    model.init_weights(1)
    config = compiled("default", 1, 4)
    config = dataclasses.replace(config, chatgot=config.chatgot.model_copy(update={"compile": CompileConfig()}))
    engine, place, seen = build(model, config, torch.device("cpu")), torch.zeros(()), []

    def in_one_place(_module: Any, _arguments: Any, loss: torch.Tensor) -> torch.Tensor:
        seen.append(float(loss.detach()))
        place.copy_(loss.detach())
        out = loss.clone()
        out.data = place
        return out

    model.register_forward_hook(in_one_place)
    batches = torch.randint(64, (2, 4, 16), generator=torch.Generator().manual_seed(0))
    loss = engine.train_step([(batch, batch) for batch in batches])
    engine.engine.destroy()
    assert seen[0] != seen[1]
    assert float(loss) == pytest.approx(sum(seen) / 2)


@pytest.mark.skipif(not has_command("g++", "c++"), reason="DeepSpeed compiles its CPUAdam")
@pytest.mark.usefixtures("process_group")
def test_what_zero_3_does_not_offload_follows_the_schedule_and_is_saved(tmp_path):
    tree = engine_json(3, batch=2, micro=2, optimizer={"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}})
    tree["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "ratio": 0.5, "pin_memory": False}
    config = build_engine_config(
        tree, "ds.json", world_size=1, facts=DeviceFacts("cpu", bf16=True, fp16=False), n_params=30_000
    )

    def engine(kept: bool) -> TrainingEngine:
        model = GPT(ModelConfig(**TINY_MODEL), 64)
        model.init_weights(1)
        engine = build(model, config, torch.device("cpu"))
        if kept:
            engine.engine.optimizer.subgroup_to_device[0] = "cpu:0"  # as on a GPU, where this is another device
        return engine

    def steps(engine: TrainingEngine, numbers: range) -> list[float]:
        losses = []
        for number in numbers:
            engine.set_learning_rate(1 / (1 + number))
            batch = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(number))
            losses.append(float(engine.train_step([(batch, batch)])))
        return losses

    offloaded, half = engine(kept=False), engine(kept=True)
    expected = steps(offloaded, range(6))
    assert steps(half, range(3)) == pytest.approx(expected[:3], rel=1e-6)
    half.engine.save_checkpoint(str(tmp_path))
    again = engine(kept=True)
    again.engine.load_checkpoint(str(tmp_path))
    assert steps(again, range(3, 6)) == steps(half, range(3, 6)) == pytest.approx(expected[3:], rel=1e-6)


@pytest.mark.usefixtures("process_group")
def test_without_a_compiler_the_model_stays_eager_and_says_so(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    model = GPT(ModelConfig(**TINY_MODEL), 64)
    model.init_weights(1)
    engine = build(model, compiled("default", 1, 8), torch.device("cpu"))
    assert any("torch.compile: off, although" in note and "install gcc" in note for note in engine.notes)
    input_ids = torch.randint(64, (8, 16))
    assert math.isfinite(float(engine.train_step([(input_ids, input_ids)])))
    engine.engine.destroy()


@pytest.mark.usefixtures("process_group")
def test_without_a_compiler_cpu_adam_is_a_matter_of_the_machine(monkeypatch, tmp_path):
    from deepspeed.ops.op_builder.builder import OpBuilder

    monkeypatch.setattr(OpBuilder, "_loaded_ops", {})
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    adamw = {"type": "AdamW", "params": {"lr": 1e-2}}
    tree = engine_json(1, offload=True, optimizer=adamw, zero_force_ds_cpu_optimizer=True)
    facts = DeviceFacts("cpu", bf16=True, fp16=False)
    config = build_engine_config(tree, "ds.json", world_size=1, facts=facts, n_params=30_000)
    with pytest.raises(MachineError, match=r"cpu_adam op, which failed to build/load. It needs g\+\+ and ninja"):
        build(GPT(ModelConfig(**TINY_MODEL), 64), config, torch.device("cpu"))
