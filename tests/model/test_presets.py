"""The shipped presets: exact sizes, complete files, a first loss near ln V."""

from __future__ import annotations

import math

import pytest
import torch
import yaml

from chatgot.config.run import PRESETS, DataConfig, ModelConfig, TrainConfig, load_run_config, preset_names
from chatgot.model.gpt import GPT
from chatgot.model.shapes import count_parameters
from tests.model.shapes import GPT2, GROUPED, MODERN, random_ids

CHARACTERS = 95
"""Vocabulary of the original's corpus."""

PARAMETERS = {
    "tiny": 877_696,
    "chatgot_small_14M_clean": 14_026_880,
    "chatgot_85M": 85_988_352,
    "gpt2_small": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
    "modern_14M": 14_236_288,
    "modern_124M": 123_552_768,
    "modern_350M": 350_360_576,
    "modern_774M": 778_114_048,
    "modern_1558M": 1_560_047_744,
}
"""At 95 characters, or at the preset's own bpe_vocab_size."""


def preset_vocabulary(name: str) -> int:
    data = load_run_config(name).data
    return data.bpe_vocab_size if data.tokenizer == "bpe" else CHARACTERS


def test_every_preset_has_a_pinned_size():
    assert sorted(PARAMETERS) == preset_names()


@pytest.mark.parametrize("name", PARAMETERS)
def test_invariant_03_parameter_counts_of_presets_are_pinned(name: str):
    config, vocab_size = load_run_config(name).model, preset_vocabulary(name)
    with torch.device("meta"):
        model = GPT(config, vocab_size)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert count_parameters(config, vocab_size) == PARAMETERS[name]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("config", [GPT2, MODERN, GROUPED], ids=["gpt2", "modern", "grouped"])
def test_invariant_03_the_formula_counts_what_the_module_has(config: ModelConfig, tied: bool):
    config = config.model_copy(update={"tie_embeddings": tied})
    assert count_parameters(config, 41) == sum(p.numel() for p in GPT(config, 41).parameters())


def test_names_that_state_a_size_keep_it_within_3_percent():
    for name, count in PARAMETERS.items():
        stated = [part for part in name.split("_") if part.endswith("M") and part[:-1].isdigit()]
        if stated:
            assert count / 1e6 == pytest.approx(int(stated[0][:-1]), rel=0.03)


def test_the_original_small_model_keeps_its_shape():
    model = load_run_config("chatgot_small_14M_clean").model
    assert (model.architecture, model.d_model, model.n_layers, model.n_head, model.max_seq_length) == (
        "gpt2",
        512,
        6,
        8,
        256,
    )


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_preset_states_every_key_that_applies_and_its_size(name: str):
    text = (PRESETS / f"{name}.yaml").read_text(encoding="utf-8")
    tree = yaml.safe_load(text)
    not_applying = {"rope_theta", "n_kv_head", "head_dim"} if tree["model"]["architecture"] == "gpt2" else set()
    if tree["data"]["tokenizer"] != "bpe":
        not_applying |= {"bpe_vocab_size"}
    for section, cls in {"model": ModelConfig, "data": DataConfig, "train": TrainConfig}.items():
        assert set(tree[section]) == set(cls.model_fields) - not_applying
    assert f"{PARAMETERS[name] / 1e6:.2f} M parameters" in text
    assert f"vocabulary of {preset_vocabulary(name)}" in text or f"{CHARACTERS} characters" in text


@pytest.mark.parametrize("name", PARAMETERS)
def test_prompts_are_ordinary_english(name: str):
    prompts = load_run_config(name).train.sample_prompts
    assert prompts
    assert all(c.isascii() and (c.isalpha() or c == " ") for prompt in prompts for c in prompt)


@pytest.mark.parametrize("name", ["tiny", "modern_14M", "chatgot_small_14M_clean"])
def test_invariant_04_initial_loss_is_ln_of_the_vocabulary(name: str):
    config, vocab_size = load_run_config(name).model, preset_vocabulary(name)
    model = GPT(config, vocab_size)
    model.init_weights(seed=1)
    model.eval()
    ids = random_ids(4, config.max_seq_length + 1, vocab_size=vocab_size)
    with torch.no_grad():
        loss = model(ids[:, :-1], ids[:, 1:]).item()
    assert loss == pytest.approx(math.log(vocab_size), abs=0.1)


@pytest.mark.parametrize("name", PARAMETERS)
def test_invariant_04_the_head_of_every_preset_starts_nearly_uniform(name: str):
    """Final norms give activations of rms 1, so logits are N(0, init_std^2 d_model) and the loss exceeds ln V by half
    that variance.
    """
    config = load_run_config(name).model
    assert config.init_std**2 * config.d_model / 2 < 0.085
