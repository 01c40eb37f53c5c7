"""Parameter groups, and which optimizer a JSON's optimizer section becomes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from chatgot.config.run import ModelConfig
from chatgot.deepspeed_json.machine import has_command
from chatgot.deepspeed_json.resolve import EngineConfig, build_engine_config
from chatgot.devices import DeviceFacts
from chatgot.engine.build import build
from chatgot.engine.optimizer import (
    build_client_optimizer,
    is_muon,
    parameter_groups,
    weight_decay,
)
from chatgot.errors import ConfigError
from chatgot.model.gpt import GPT
from tests.support import TINY_MODEL, engine_json

CPU = DeviceFacts("cpu", bf16=True, fp16=False, name="cpu")


def read(kind: str, stage: int = 0, params: dict[str, Any] | None = None, **keys: Any) -> EngineConfig:
    tree = engine_json(
        stage, batch=2, micro=2, optimizer={"type": kind, "params": {"lr": 1e-2, **(params or {})}}, **keys
    )
    return build_engine_config(tree, "ds.json", world_size=1, facts=CPU, n_params=30_000)


def model(architecture: str = "modern") -> GPT:
    gpt = GPT(ModelConfig(**{**TINY_MODEL, "architecture": architecture}), 64)
    gpt.init_weights(0)
    return gpt


def client(kind: str, params: dict[str, Any] | None = None) -> torch.optim.Optimizer | None:
    return build_client_optimizer(read(kind, params=params), parameter_groups(model(), 0.1))[0]


@pytest.mark.parametrize("architecture", ["gpt2", "modern"])
def test_matrices_and_embeddings_decay_and_vectors_do_not(architecture):
    gpt = model(architecture)
    names = {id(p): name for name, p in gpt.named_parameters()}
    decaying, plain = parameter_groups(gpt, 0.1)
    assert (decaying["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    inside = {names[id(p)] for p in decaying["params"]}
    outside = {names[id(p)] for p in plain["params"]}
    assert inside | outside == set(names.values())
    assert not inside & outside
    assert {"embed_tokens.weight", "layers.0.attention.qkv.weight", "lm_head.weight"} - inside <= {
        "lm_head.weight"
    }  # tied: counted once
    assert "norm.weight" in outside
    assert all("norm" in name or name.endswith("bias") for name in outside)


def test_frozen_parameters_are_in_no_group_and_no_group_is_empty():
    gpt = model()
    for parameter in gpt.parameters():
        parameter.requires_grad_(parameter.dim() >= 2)
    [only] = parameter_groups(gpt, 0.1)
    assert all(p.dim() >= 2 for p in only["params"])


@pytest.mark.parametrize(
    ("kind", "params", "expected"),
    [
        ("AdamW", {}, torch.optim.AdamW),
        ("Adam", {}, torch.optim.AdamW),
        ("adam", {"adam_w_mode": True}, torch.optim.AdamW),
        ("Adam", {"adam_w_mode": False}, torch.optim.Adam),
        ("AdamW", {"torch_adam": True}, torch.optim.AdamW),
        ("AdamW", {"bias_correction": True, "set_grad_none": True}, torch.optim.AdamW),
    ],
)
def test_adam_family_is_torchs(kind, params, expected):
    optimizer = client(kind, {"betas": [0.8, 0.9], "eps": 1e-6, **params})
    assert optimizer is not None
    assert type(optimizer) is expected
    for group in optimizer.param_groups:
        assert (group["lr"], tuple(group["betas"]), group["eps"], group["fused"]) == (1e-2, (0.8, 0.9), 1e-6, True)


def test_stated_foreach_turns_fused_off():
    optimizer = client("AdamW", {"torch_adam": True, "foreach": True})
    assert optimizer is not None
    assert not optimizer.param_groups[0]["fused"]
    assert optimizer.param_groups[0]["foreach"]


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("AdamW", {"torch_adam": False}),
        ("AdamW", {"bias_correction": False}),
        ("AdamW", {"fp32_optimizer_states": False}),
        ("SGD", {}),
        ("Muon", {}),
    ],
)
def test_what_torchs_adam_is_not_is_left_to_deepspeed(kind, params):
    optimizer, note = build_client_optimizer(read(kind, params=params), parameter_groups(model(), 0.1))
    assert optimizer is None
    assert note == f"optimizer: {kind}, built by DeepSpeed from the JSON"


OFFLOAD: dict[str, Any] = {"device": "cpu", "pin_memory": False}
MASTERS = {"enabled": True, "bf16_master_weights_and_grads": True}


@pytest.mark.skipif(not has_command("g++", "c++"), reason="DeepSpeed compiles its CPUAdam")
@pytest.mark.parametrize(
    ("stage", "keys", "key"),
    [
        (3, {"offload_optimizer": {**OFFLOAD, "ratio": 0.5}}, "zero_optimization.offload_optimizer.ratio"),
        (2, {"bf16": MASTERS}, "bf16.bf16_master_weights_and_grads"),
        (3, {"bf16": {**MASTERS, "bf16_optimizer_states": True}}, "bf16.bf16_master_weights_and_grads"),
        (1, {"zero_force_ds_cpu_optimizer": True}, "zero_force_ds_cpu_optimizer"),
    ],
)
@pytest.mark.usefixtures("process_group")
def test_cpu_adam_is_deepspeeds_where_it_takes_no_other_and_trains_as_stock_does(stage, keys, key):
    tree = engine_json(stage, batch=2, micro=2, optimizer={"type": "AdamW", "params": {"lr": 1e-2}}, **keys)
    tree["zero_optimization"]["offload_optimizer"] = tree.pop("offload_optimizer", OFFLOAD)
    tree["chatgot"]["schedule"] = None
    config = build_engine_config(tree, "ds.json", world_size=1, facts=CPU, n_params=30_000)
    engine = build(model(), config, torch.device("cpu"))
    assert type(engine.engine.basic_optimizer).__name__ == "DeepSpeedCPUAdam"
    assert any(f"DeepSpeed's CPUAdam, for {key}" in note for note in engine.notes)
    torch.manual_seed(0)
    batches = [torch.randint(64, (2, 16)) for _ in range(4)]
    ours = [float(engine.train_step([(batch, batch)])) for batch in batches]
    engine.engine.destroy()
    assert ours == pytest.approx(stock_losses(tree, batches), rel=5e-7)
    assert ours[-1] < ours[0]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "keys",
    [
        {"optimizer": {"type": "Adagrad", "params": {"lr": 1e-2, "weight_decay": 0.1}}},
        {
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True, "weight_decay": 0.1}},
            "communication_data_type": "bf16",
        },
    ],
    ids=["adagrad", "communication_data_type"],
)
@pytest.mark.usefixtures("process_group")
def test_trains_as_stock_does(keys, stage):
    tree = engine_json(stage, batch=2, micro=2, chatgot={"schedule": None}, **keys)
    config = build_engine_config(tree, "ds.json", world_size=1, facts=CPU, n_params=30_000)
    engine = build(model(), config, torch.device("cpu"))
    groups = 1 if stage and "communication_data_type" not in keys else 2
    assert len(engine.engine.optimizer.param_groups) == groups
    batches = [torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(n)) for n in range(4)]
    ours = [float(engine.train_step([(batch, batch)])) for batch in batches]
    assert engine.engine.basic_optimizer.state, "what is stepped is looked at"
    engine.engine.destroy()
    assert ours == pytest.approx(stock_losses(tree, batches, groups=groups == 2), rel=5e-7)
    if "communication_data_type" in keys:
        del tree["communication_data_type"]
        assert ours != pytest.approx(stock_losses(tree, batches), rel=5e-7), "it rounds, so the comparison can fail"


def stock_losses(tree: dict[str, Any], batches: list[torch.Tensor], groups: bool = True) -> list[float]:
    """What a loop around stock DeepSpeed makes of a JSON, with weight decay where ChatGoT has it unless told."""
    import deepspeed

    gpt = model()
    decay = tree["optimizer"]["params"].get("weight_decay", 0.0)
    parameters: Any = parameter_groups(gpt, decay) if groups else list(gpt.parameters())
    given = {key: value for key, value in tree.items() if key != "chatgot"}
    engine = deepspeed.initialize(model=gpt, model_parameters=parameters, config=given, dist_init_required=False)[0]
    losses = []
    for batch in batches:
        loss = engine(batch, batch)
        losses.append(float(loss.detach()))
        engine.backward(loss)
        engine.step()
    engine.destroy()
    return losses


@pytest.mark.parametrize(
    ("kind", "params", "decay"),
    [
        ("AdamW", {"weight_decay": 0.3}, 0.3),
        ("AdamW", {}, 0.0),  # DeepSpeed's FusedAdam and CPUAdam
        ("AdamW", {"torch_adam": True}, 0.01),  # torch.optim.AdamW
        ("Adam", {"torch_adam": True}, 0.01),
        ("Adam", {"torch_adam": True, "adam_w_mode": False}, 0.0),
        ("SGD", {}, 0.0),
        ("Muon", {"torch_adam": True}, 0.0),
    ],
)
def test_weight_decay_that_is_not_stated_is_the_stock_optimizers_default(kind, params, decay):
    assert weight_decay(read(kind, params=params)) == decay


def test_arguments_that_torch_refuses_are_a_configuration_error():
    with pytest.raises(ConfigError, match=r"ds\.json: optimizer\.params = .*differentiable"):
        client("AdamW", {"torch_adam": True, "differentiable": True})


def test_muon_in_any_case():
    assert is_muon(read("MUON"))
    assert not is_muon(read("AdamW"))


@pytest.mark.parametrize(
    ("kind", "stage", "params"),
    [
        ("SGD", 1, {"momentum": 0.9}),
        ("SGD", 3, {}),
        ("RMSprop", 0, {"alpha": 0.9}),
        ("Adagrad", 0, {}),
        ("NAdam", 2, {}),
    ],
)
@pytest.mark.usefixtures("process_group")
def test_any_torch_optimizer_trains(kind, stage, params):
    allowed = {"zero_allow_untested_optimizer": True} if stage else {}
    engine = build(model(), read(kind, stage, {"weight_decay": 0.1, **params}, **allowed), torch.device("cpu"))
    assert type(engine.engine.basic_optimizer) is getattr(torch.optim, kind)
    assert engine.base_lrs == [1e-2, 1e-2]
    assert [group["weight_decay"] for group in engine.engine.basic_optimizer.param_groups] == [0.1, 0.0]
    torch.manual_seed(0)
    input_ids = torch.randint(64, (2, 16))
    losses = [float(engine.train_step([(input_ids, input_ids)])) for _ in range(5)]
    engine.engine.destroy()
    assert losses[-1] < losses[0]
    assert engine.grad_norm is not None


def test_untested_optimizer_under_zero_is_refused_unless_allowed():
    with pytest.raises(ConfigError, match="zero_allow_untested_optimizer"):
        read("SGD", 1)
