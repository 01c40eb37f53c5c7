"""The arithmetic of parameter shapes says what the real model has."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from chatgot.config.run import ModelConfig, load_run_config, preset_names
from chatgot.model.gpt import GPT
from chatgot.model.shapes import count_matmul_parameters, count_parameters, flops_per_token, parameter_shapes
from tests.support import TINY_MODEL


def real_shapes(config: ModelConfig, vocab_size: int) -> list[tuple[str, tuple[int, ...]]]:
    with torch.device("meta"):
        return [(name, tuple(p.shape)) for name, p in GPT(config, vocab_size).named_parameters()]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", preset_names())
def test_every_preset(name, tied):
    config = load_run_config(name).model.model_copy(update={"tie_embeddings": tied})
    assert list(parameter_shapes(config, 1009).items()) == real_shapes(config, 1009)


@pytest.mark.parametrize(
    "changes",
    [{}, {"n_kv_head": 1}, {"n_head": 4, "n_kv_head": 2}, {"head_dim": 6, "n_head": 3}, {"architecture": "gpt2"}],
    ids=str,
)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_both_architectures_and_grouped_heads(changes, tied):
    config = ModelConfig(**{**TINY_MODEL, **changes, "tie_embeddings": tied})
    assert list(parameter_shapes(config, 61).items()) == real_shapes(config, 61)
    model = GPT(config, 61)
    assert count_parameters(config, 61) == sum(p.numel() for p in model.parameters())
    lookups = [model.embed_positions] + ([] if tied else [model.embed_tokens])
    looked_up = sum(module.weight.numel() for module in lookups if module is not None)
    assert count_matmul_parameters(config, 61) == count_parameters(config, 61) - looked_up


def test_no_torch_is_imported():
    code = "import sys; import chatgot.model.shapes; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_flops_per_token_of_gpt3_175b_and_of_a_hand_count():
    assert flops_per_token(10, 2, 3, 5) == 6 * 10 + 12 * 2 * 3 * 5
    assert flops_per_token(174_600_000_000, 96, 12288, 2048) == pytest.approx(
        6 * 174.6e9 * (1 + 2 * 96 * 12288 * 2048 / 174.6e9)
    )
