"""Rotary tables that all blocks share survive every option of deepspeed.checkpointing, because the model never passes
them on.

cpu_checkpointing needs CUDA: tests/gpu/test_activation_checkpointing.py. Stages, ranks and memory: tests/distributed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from chatgot.config.run import ModelConfig
from chatgot.deepspeed_json.deepspeed_keys import ActivationCheckpointing
from chatgot.deepspeed_json.resolve import EngineConfig, build_engine_config
from chatgot.devices import DeviceFacts
from chatgot.engine import activation_checkpointing
from chatgot.errors import ConfigError
from chatgot.model import gpt
from tests.support import TINY_MODEL, engine_json

pytestmark = pytest.mark.usefixtures("process_group", "deepspeeds_settings")

LAYERS = 4
PARTITION = {"partition_activations": True}
CONTIGUOUS = {**PARTITION, "contiguous_memory_optimization": True, "number_checkpoints": LAYERS}
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "partition_activations": PARTITION,
    "contiguous_memory_optimization": CONTIGUOUS,
    "synchronize_checkpoint_boundary": {"synchronize_checkpoint_boundary": True},
    "profile": {"profile": True},
    "all at once": {**CONTIGUOUS, "synchronize_checkpoint_boundary": True, "profile": True},
}


@pytest.fixture
def deepspeeds_settings() -> Iterator[None]:
    """deepspeed.checkpointing's, which are global to the process, as they were."""
    import deepspeed

    yield
    deepspeed.checkpointing.reset()
    deepspeed.checkpointing.configure(None, deepspeed_config={"train_batch_size": 1, "activation_checkpointing": {}})


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> gpt.Rope:
    """One pair of tables for all forwards of all models: the worst case of sharing."""
    shape = model_config()
    shared = gpt.rope_tables(
        torch.arange(shape.max_seq_length), shape.d_model // shape.n_head, shape.rope_theta, torch.float32
    )
    monkeypatch.setattr(gpt, "rope_tables", lambda *arguments: shared)
    return shared


def model_config() -> ModelConfig:
    return ModelConfig(**{**TINY_MODEL, "n_layers": LAYERS, "dropout": 0.1})


def engine_config(section: dict[str, Any] | None, refinement: dict[str, Any]) -> EngineConfig:
    chatgot = {} if section is None else {"activation_checkpointing": refinement}
    tree = engine_json(0, batch=2, micro=2, activation_checkpointing=section, chatgot=chatgot)
    return build_engine_config(
        tree, "ds.json", world_size=1, facts=DeviceFacts("cpu", bf16=True, fp16=False), n_params=50_000
    )


def model(section: dict[str, Any] | None) -> gpt.GPT:
    """Wired as the engine does it; None: nothing is recomputed."""
    net = gpt.GPT(model_config(), 64)
    net.init_weights(1)
    activation_checkpointing.wire(net, engine_config(section, {"backend": "deepspeed"}))
    return net


def gradients(net: gpt.GPT) -> dict[str, Tensor]:
    """Of two micro batches, one after the other."""
    torch.manual_seed(0)
    for _ in range(2):
        input_ids = torch.randint(64, (2, TINY_MODEL["max_seq_length"]))
        net(input_ids, input_ids.roll(-1, 1)).backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def different(net: gpt.GPT, other: gpt.GPT) -> list[str]:
    """Parameters whose gradients are not equal bit for bit."""
    ours, theirs = gradients(net), gradients(other)
    assert ours.keys() == theirs.keys()
    return [name for name in theirs if not torch.equal(ours[name], theirs[name])]


def passing_the_tables(net: gpt.GPT, tables: gpt.Rope) -> None:
    """What the model must not do: hand the tables to checkpoint() beside the activations."""
    import deepspeed

    def checkpoint(function: Callable[..., Any], x: Tensor) -> Any:
        [block] = cast(Any, function).__defaults__
        assert isinstance(block, gpt.Block)
        return deepspeed.checkpointing.checkpoint(lambda h, cos, sin: block(h, rope=(cos, sin)), x, *tables)

    net.set_activation_checkpointing(checkpoint)


def test_every_option_is_tried():
    tried = {key for section in OPTIONS.values() for key in section}
    assert tried | {"cpu_checkpointing"} == set(ActivationCheckpointing.KEYS)


@pytest.mark.parametrize("name", OPTIONS)
def test_shared_tables_survive_and_gradients_are_those_without_recomputation(name: str, tables: gpt.Rope):
    before = [table.clone() for table in tables]
    assert different(model(OPTIONS[name]), model(None)) == []
    for table, untouched in zip(tables, before, strict=True):
        assert torch.equal(table, untouched)
        assert table.untyped_storage().nbytes() == untouched.untyped_storage().nbytes()


@pytest.mark.parametrize("name", [name for name, section in OPTIONS.items() if "partition_activations" in section])
def test_control_tables_that_are_passed_on_are_destroyed(name: str, tables: gpt.Rope):
    net, input_ids = model(OPTIONS[name]), torch.arange(16)[None]
    torch.manual_seed(0)
    right = net(input_ids)
    right.sum().backward()  # makes room again for contiguous_memory_optimization
    passing_the_tables(net, tables)
    torch.manual_seed(0)
    wrong = net(input_ids)
    assert [table.numel() for table in tables] == [1, 1]
    assert not torch.equal(wrong, right)


def test_control_passing_the_tables_on_is_itself_no_other_computation(tables: gpt.Rope):
    net = model({})
    passing_the_tables(net, tables)
    assert different(net, model(None)) == []


def test_contiguous_memory_for_fewer_blocks_than_are_recomputed_is_refused():
    message = f"number_checkpoints = {LAYERS - 1}.* {LAYERS} blocks"
    with pytest.raises(ConfigError, match=message):
        model({**CONTIGUOUS, "number_checkpoints": LAYERS - 1})
    every_2nd = {"backend": "deepspeed", "every_n_layers": 2}
    config = engine_config({**CONTIGUOUS, "number_checkpoints": LAYERS // 2}, every_2nd)
    activation_checkpointing.wire(gpt.GPT(model_config(), 64), config)
