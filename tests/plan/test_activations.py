"""What the plan says that autograd keeps, against the storages that it does keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from chatgot.config.run import ModelConfig
from chatgot.deepspeed_json.resolve import build_engine_config
from chatgot.devices import DeviceFacts
from chatgot.engine.build import wire_activation_checkpointing
from chatgot.model.gpt import GPT
from chatgot.plan.activations import Activations, activations
from chatgot.plan.settings import read_settings
from tests.support import engine_json

VOCABULARY = 61
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


def saved_bytes(model: GPT, precision: str) -> int:
    """Bytes of all storages that one forward saves, parameters left out, each once."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage  # kept alive, so that no address is used twice
        return tensor

    ids = torch.zeros(MICRO, model.config.max_seq_length, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast_bf16"):
            model(ids, ids.clone())
    return sum(storage.nbytes() for storage in storages.values())


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
    return activations(read_settings(config, VOCABULARY, engine, 1, on_cuda=False)), saved_bytes(net, precision)


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
