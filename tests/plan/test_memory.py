"""Model states are predicted to the byte: every stage, precision and optimizer, offload, one and two ranks, against
live tensors; and what the plan says that autograd keeps, against the storages that it does keep.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from chatgot.config.run import ModelConfig
from chatgot.deepspeed_json.machine import has_command
from chatgot.deepspeed_json.resolve import build_engine_config
from chatgot.devices import DeviceFacts
from chatgot.engine.build import wire_activation_checkpointing
from chatgot.model.gpt import GPT
from chatgot.model.shapes import count_parameters
from chatgot.plan.memory import STATES, Activations, activations, model_states
from chatgot.plan.settings import Settings, read_settings
from tests.distributed.programs.act_ckpt import saved_bytes
from tests.support import TINY_MODEL, engine_json, run_ranks

MUON = {"type": "Muon", "params": {"muon_lr": 0.02, "adam_lr": 3e-3, "momentum": 0.95}}
ODD = {"architecture": "gpt2", "d_model": 30, "d_hid": 47, "tie_embeddings": False}
"""Sizes that no flat buffer divides evenly by ranks and alignment."""
BF16 = {"enabled": True, "check_grad_overflow": True}
VOCABULARY = 61


def cases(world_size: int, every: bool = True) -> dict[str, dict[str, Any]]:
    """Two micro batches to a step, so that the gradients' accumulators are there too. Every case, or every second."""
    shared = {"batch": 4 * world_size, "micro": 2}
    found: dict[str, dict[str, Any]] = {}
    for stage in range(4):
        for precision in ("fp32", "bf16") if stage else ("fp32",):
            for offload in (False, True) if stage else (False,):
                found[f"{precision} stage {stage} offload {offload}"] = {
                    "json": {"stage": stage, "precision": precision, "offload": offload, **shared}
                }
            if stage < 3:
                found[f"Muon {precision} stage {stage}"] = {
                    "json": {"stage": stage, "precision": precision, "optimizer": MUON, **shared}
                }
        if stage:
            found[f"bf16 stage {stage}, accumulated in bf16"] = {"json": {"stage": stage, "bf16": BF16, **shared}}
        found[f"autocast stage {stage}"] = {"json": {"stage": stage, "precision": "autocast_bf16", **shared}}
    found["bf16 stage 3, parameters offloaded"] = {
        "json": {"stage": 3, "precision": "bf16", "offload": True, "offload_param": True, **shared}
    }
    found["bf16 stage 2, one micro batch, offload"] = {
        "json": {"stage": 2, "precision": "bf16", "offload": True, "batch": 2 * world_size, "micro": 2}
    }
    found["bf16 stage 3, small parameters stay whole, sub-groups"] = {
        "json": {"stage": 3, "precision": "bf16", **shared},
        "overrides": {
            "zero_optimization.stage3_param_persistence_threshold": 1500,
            "zero_optimization.sub_group_size": 3000,
        },
    }
    found["bf16 stage 3, parameters offloaded, small ones stay whole"] = {
        "json": {"stage": 3, "precision": "bf16", "offload": True, "offload_param": True, **shared},
        "overrides": {"zero_optimization.stage3_param_persistence_threshold": 1500},
    }
    found["bf16 stage 3, a few small parameters stay whole"] = {
        "json": {"stage": 3, "precision": "bf16", **shared},
        "overrides": {
            "zero_optimization.stage3_param_persistence_threshold": 1500,
            "zero_optimization.stage3_model_persistence_threshold": 100,
        },
    }
    found["bf16 stage 2, accumulated in what torch calls float32"] = {
        "json": {"stage": 2, "bf16": BF16, "data_types": {"grad_accum_dtype": "torch.float32"}, **shared}
    }
    found["Muon fp32 stage 3"] = {
        "json": {"stage": 3, "optimizer": MUON, **shared},
        "overrides": {"zero_optimization.reduce_scatter": False},
    }
    for stage, kind, params in (
        (0, "AdamW", {"amsgrad": True, "torch_adam": True}),
        (0, "Adafactor", {}),
        (0, "RMSprop", {"momentum": 0.9, "centered": True}),
        (2, "AdamW", {"amsgrad": True, "torch_adam": True}),
        (2, "SGD", {"momentum": 0.9}),
        (3, "Adafactor", {}),
        (2, "Adagrad", {}),
        (3, "Adagrad", {}),
    ):
        optimizer = {"type": kind, "params": {"lr": 1e-3, **params}}
        found[f"{kind} {[*params]} stage {stage}"] = {
            "json": {"stage": stage, "optimizer": optimizer, "zero_allow_untested_optimizer": True, **shared}
        }
    if has_command("g++", "c++"):  # DeepSpeed compiles its CPUAdam
        masters, adamw = {**BF16, "bf16_master_weights_and_grads": True}, {"type": "AdamW", "params": {"lr": 1e-3}}
        for stage in (1, 3):
            for states in (False, True):
                bf16 = {**masters, "bf16_optimizer_states": states}
                found[f"stage {stage}, 16-bit masters offloaded, 16-bit moments {states}"] = {
                    "json": {"stage": stage, "offload": True, "bf16": bf16, "optimizer": adamw, **shared}
                }
    for case in found.values():
        case["model"] = ODD
    found["bf16 stage 2, modern, grouped heads, tied"] = {
        "json": {"stage": 2, "precision": "bf16", **shared},
        "model": {"n_kv_head": 1, "tie_embeddings": True},
    }
    return found if every else dict(list(found.items())[::2])


def predicted(case: dict[str, Any], world_size: int) -> Settings:
    shape = ModelConfig(**{**TINY_MODEL, **case.get("model", {})})
    engine = build_engine_config(
        engine_json(**case["json"]),
        "case.json",
        case.get("overrides", {}),
        world_size=world_size,
        facts=DeviceFacts("cpu", bf16=True, fp16=False),
        n_params=count_parameters(shape, VOCABULARY),
    )
    return read_settings(shape, VOCABULARY, engine, world_size, on_cuda=False)


@pytest.fixture(
    scope="module",
    params=[(1, False), (2, True), pytest.param((1, True), marks=pytest.mark.slow)],
    ids=["1 rank", "2 ranks", "1 rank, every case"],
)
def measured(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, dict[str, list[dict[str, int]]]]:
    folder, world_size = tmp_path_factory.mktemp("states"), request.param[0]
    (folder / "cases.json").write_text(json.dumps(cases(*request.param)))
    program = ["-m", "tests.distributed.programs.memory", str(folder / "cases.json"), str(folder / "results.json")]
    run_ranks(program, world_size)
    results = json.loads((folder / "results.json").read_text())
    assert len(results) == len(cases(*request.param))
    return world_size, results


def test_model_states_are_exact_to_the_byte(measured):
    world_size, results = measured
    wrong = {}
    for name, ranks in results.items():
        settings = predicted(cases(world_size)[name], world_size)
        for rank, found in enumerate(ranks):
            memory = model_states(settings, rank)
            expected = {part: memory.total(part) for part in STATES}
            seen = {part: found[part] for part in STATES}
            if expected != seen:
                wrong[f"{name}, rank {rank}"] = {
                    part: (expected[part], seen[part]) for part in STATES if expected[part] != seen[part]
                }
    assert wrong == {}


def test_no_large_tensor_of_the_process_is_unaccounted_for(measured):
    """What the garbage collector knows is what was counted: nothing large is kept in a place that nobody looked at."""
    for name, ranks in measured[1].items():
        for found in ranks:
            counted = sum(size for part, size in found.items() if part != "all")
            assert found["all"] <= counted + 1, name


def test_a_share_of_the_optimizer_states_that_is_not_offloaded_is_on_the_device():
    case = {"json": {"stage": 3, "precision": "bf16", "offload": True, "batch": 4, "micro": 2}, "model": ODD}
    key = "zero_optimization.offload_optimizer.ratio"
    others = {"zero_optimization.sub_group_size": 3000, "optimizer.params.torch_adam": False}
    whole, half, none = (
        model_states(predicted({**case, "overrides": {**others, key: ratio}}, 1)) for ratio in (1.0, 0.5, 0.0)
    )
    for part in ("master_weights", "optimizer_states"):
        assert part not in whole.device
        assert 0 < half.device[part] < none.device[part]
        assert part not in none.host
        assert half.total(part) == whole.total(part) == none.total(part)


def test_control_padding_and_ranks_are_in_the_figures():
    case = cases(2)["bf16 stage 2 offload False"]
    settings = predicted(case, 2)
    bare = settings.parameter_bytes * settings.numel
    assert model_states(settings).device["parameters"] > bare
    alone = dataclasses.replace(settings, world_size=1)
    assert model_states(alone).device["master_weights"] > model_states(settings).device["master_weights"]


SHAPES: dict[str, dict[str, Any]] = {
    "small": {"d_model": 32, "n_layers": 3, "n_head": 4, "d_hid": 80, "max_seq_length": 16},
    "wide": {"d_model": 96, "n_layers": 4, "n_head": 2, "d_hid": 384, "max_seq_length": 48},
    "long": {"d_model": 48, "n_layers": 2, "n_head": 6, "d_hid": 100, "max_seq_length": 200},
}
MICRO = 3


@pytest.fixture(autouse=True)
def _torchs_own_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ZeRO-3 engine replaces F.linear for the rest of its process, by one that saves fp32 under autocast; other tests
    had one.
    """
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)  # type: ignore[attr-defined]


def saved_by(model: GPT, precision: str) -> int:
    """Bytes of all storages that one forward saves, parameters left out, each once."""
    ids, found = torch.zeros(MICRO, model.config.max_seq_length, dtype=torch.long), list[int]()
    with saved_bytes(model, found), torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast_bf16"):
        model(ids, ids.clone())
    return found[0]


def both(
    shape: dict[str, Any], precision: str = "fp32", every: int | None = None, **model: Any
) -> tuple[Activations, int]:
    """The plan's figures and the measured bytes."""
    config = ModelConfig(**{**shape, **model})
    tree = engine_json(stage=1 if precision == "bf16" else 0, precision=precision, batch=MICRO, micro=MICRO)
    if every is not None:
        tree["activation_checkpointing"] = {}
        tree["chatgot"]["activation_checkpointing"] = {"every_n_layers": every}
    engine = build_engine_config(tree, "case.json", world_size=1, facts=DeviceFacts("cpu", bf16=True, fp16=False))
    net = GPT(config, VOCABULARY)
    net.init_weights(1)
    if precision == "bf16":
        net.to(torch.bfloat16)
    wire_activation_checkpointing(net, engine)
    return activations(read_settings(config, VOCABULARY, engine, 1, on_cuda=False)), saved_by(net, precision)


@pytest.mark.parametrize("every", [None, 1, 2], ids=["kept", "recomputed", "every second recomputed"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast_bf16"])
@pytest.mark.parametrize("architecture", ["gpt2", "modern"])
def test_saved_bytes_within_a_tenth(architecture, precision, shape, every):
    plan, measured = both(SHAPES[shape], precision, every, architecture=architecture)
    assert plan.saved == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    "model",
    [{"n_kv_head": 2}, {"n_kv_head": 1, "tie_embeddings": False}, {"dropout": 0.1}, {"head_dim": 256, "dropout": 0.1}],
    ids=str,
)
def test_heads_and_dropout(model):
    plan, measured = both(SHAPES["wide"], **model)
    assert plan.saved == pytest.approx(measured, rel=0.1)


def test_gpt2_with_dropout():
    plan, measured = both(SHAPES["long"], architecture="gpt2", dropout=0.1)
    assert plan.saved == pytest.approx(measured, rel=0.1)


def test_control_a_tenth_tells_one_policy_from_another():
    kept, measured = both(SHAPES["wide"])
    assert both(SHAPES["wide"], every=2)[0].saved != pytest.approx(measured, rel=0.1)
    assert both(SHAPES["wide"], "bf16")[0].saved != pytest.approx(measured, rel=0.1)
    assert both(SHAPES["wide"], architecture="gpt2")[0].saved != pytest.approx(measured, rel=0.1)
    assert kept.block == kept.blocks[0]
