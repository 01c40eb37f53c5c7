"""Where the parameters lie in an engine's flat tensors, at every stage and optimizer wrapper, on one rank."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from chatgot.config.run import ModelConfig
from chatgot.deepspeed_json.resolve import build_engine_config
from chatgot.devices import device_facts
from chatgot.engine import zero_view
from chatgot.engine.build import build
from chatgot.engine.step import TrainingEngine
from chatgot.engine.zero_view import Fragment, cut_each, cut_group, whole
from chatgot.model.gpt import GPT
from chatgot.model.shapes import parameter_shapes
from tests.support import TINY_MODEL, engine_json

CASES: dict[str, dict[str, Any]] = {
    **{f"fp32 stage {stage}": {"stage": stage} for stage in range(4)},
    **{f"bf16 stage {stage}": {"stage": stage, "precision": "bf16"} for stage in (1, 2, 3)},
    "BF16_Optimizer": {"stage": 1, "precision": "bf16", "data_types": {"grad_accum_dtype": "fp32"}},
    "offload": {"stage": 2, "offload": True},
    "offload at stage 3": {"stage": 3, "offload": True},
}


def test_a_group_is_cut_into_equal_parts_and_a_parameter_may_lie_on_two_ranks():
    numels = [("a", 5), ("b", 4)]
    assert cut_group(numels, 6, 0) == [Fragment("a", 0, 5, 0), Fragment("b", 0, 1, 5)]
    assert cut_group(numels, 6, 1) == [Fragment("b", 1, 3, 0)]
    assert cut_group(numels, 6, 1, paddings=[3, 0]) == [Fragment("b", 0, 4, 2)]


def test_at_stage_3_every_parameter_is_cut_and_the_last_part_is_padded():
    numels = [("a", 5), ("b", 1)]
    assert cut_each(numels, 2, 0) == [Fragment("a", 0, 3, 0), Fragment("b", 0, 1, 3)]
    assert cut_each(numels, 2, 1) == [Fragment("a", 3, 2, 0)]


def test_muon_keeps_the_momentum_of_a_matrix_on_the_border_whole():
    fragments = cut_group([("a", 5), ("b", 4)], 6, 1)
    assert whole({"a": 5, "b": 4}, fragments) == [Fragment("b", 0, 4, 0)]


@pytest.fixture
def engine(request: pytest.FixtureRequest, process_group: None) -> Iterator[TrainingEngine]:
    tree = engine_json(**{"batch": 2, "micro": 2, **CASES[request.param]})
    config = build_engine_config(tree, "case.json", world_size=1, facts=device_facts(), n_params=30_000)
    model = GPT(ModelConfig(**TINY_MODEL), 64)
    model.init_weights(1)
    engine = build(model, config, torch.device("cpu"))
    ids = torch.ones(2, 16, dtype=torch.long)
    engine.train_step([(ids, ids)])
    yield engine
    engine.engine.destroy()


@pytest.mark.parametrize("engine", CASES, indirect=True)
def test_owned_pieces_show_every_weight_once_with_its_moments(engine):
    shapes = parameter_shapes(ModelConfig(**TINY_MODEL), 64)
    seen: dict[str, int] = {}
    for piece in zero_view.owned_pieces(engine.engine):
        assert engine.engine.basic_optimizer.state[piece.tensor]["exp_avg"].numel() == piece.tensor.numel()
        for fragment in piece.fragments:
            seen[fragment.name] = seen.get(fragment.name, 0) + fragment.numel
            assert fragment.offset + fragment.numel <= piece.tensor.numel()
    assert seen == {name: math.prod(shape) for name, shape in shapes.items()}
    grouped = zero_view.grouped_parameters(engine.engine)
    names = zero_view.parameter_names(engine.engine)
    assert {names[id(p)] for _, members in grouped for p in members} == set(shapes)


@pytest.mark.parametrize("engine", CASES, indirect=True)
def test_weights_written_to_the_pieces_reach_the_model(engine):
    ids = torch.arange(32).reshape(2, 16)
    before = engine.engine(ids, ids).item()
    with torch.no_grad():
        for piece in zero_view.owned_pieces(engine.engine):
            piece.tensor.mul_(0.5)
    zero_view.refresh_16_bit_copies(engine.engine)
    assert abs(engine.engine(ids, ids).item() - before) > 1e-4


@pytest.mark.parametrize("engine", CASES, indirect=True)
def test_a_value_that_is_not_finite_is_seen_wherever_it_is(engine):
    def broken() -> set[str]:
        return {
            name.split(" ")[0]
            for name, tensor in zero_view.named_state(engine.engine)
            if not bool(torch.isfinite(tensor).all())
        }

    assert broken() == set()
    piece = next(iter(zero_view.owned_pieces(engine.engine)))
    engine.engine.basic_optimizer.state[piece.tensor]["exp_avg"].view(-1)[0] = math.nan
    assert broken() == {"the"}
    with torch.no_grad():
        piece.tensor.view(-1)[0] = math.inf
    assert len(broken()) == 2
    states = zero_view.live_model_states(engine.engine)
    assert states["optimizer_states"] >= 2 * 4 * sum(
        math.prod(s) for s in parameter_shapes(ModelConfig(**TINY_MODEL), 64).values()
    )
