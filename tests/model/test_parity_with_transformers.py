"""The model computes what transformers' GPT-2 and Qwen3 compute from the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from chatgot.config.run import ModelConfig
from chatgot.exchange.layout import GPT2_BLOCK
from chatgot.model.gpt import GPT
from tests.model.shapes import GPT2, GROUPED, MODERN, VOCAB, random_gpt, random_ids
from tests.support import present

pytest.importorskip("transformers", reason="transformers is not installed: it needs Python 3.11")
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM


def gpt2_from_transformers(model: GPT) -> GPT2LMHeadModel:
    config = model.config
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_positions=config.max_seq_length,
            n_embd=config.d_model,
            n_layer=config.n_layers,
            n_head=config.n_head,
            n_inner=config.d_hid,
            layer_norm_epsilon=config.epsilon,
            tie_word_embeddings=config.tie_embeddings,
        )
    )
    ours = model.state_dict()
    weights: dict[str, Tensor] = {
        "transformer.wte.weight": ours["embed_tokens.weight"],
        "transformer.wpe.weight": ours["embed_positions.weight"],
        "transformer.ln_f.weight": ours["norm.weight"],
        "transformer.ln_f.bias": ours["norm.bias"],
        "lm_head.weight": ours["lm_head.weight"],
    }
    for layer in range(config.n_layers):
        for our_name, their_name in GPT2_BLOCK.items():
            weight = ours[f"layers.{layer}.{our_name}.weight"]
            weights[f"transformer.h.{layer}.{their_name}.weight"] = (
                weight.T if weight.ndim == 2 else weight
            )  # Conv1D is (in, out)
            weights[f"transformer.h.{layer}.{their_name}.bias"] = ours[f"layers.{layer}.{our_name}.bias"]
    theirs.load_state_dict(weights, strict=True)
    return theirs.eval()


def qwen3_from_transformers(model: GPT) -> Qwen3ForCausalLM:
    config = model.config
    theirs = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB,
            hidden_size=config.d_model,
            intermediate_size=config.d_hid,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_head,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_width,
            rms_norm_eps=config.epsilon,
            max_position_embeddings=config.max_seq_length,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_embeddings,
        )
    )
    ours = model.state_dict()
    weights: dict[str, Tensor] = {
        "model.embed_tokens.weight": ours["embed_tokens.weight"],
        "model.norm.weight": ours["norm.weight"],
        "lm_head.weight": ours["lm_head.weight"],
    }
    kv = config.kv_heads * config.head_width
    for layer in range(config.n_layers):
        block, their_block = f"layers.{layer}", f"model.layers.{layer}"
        q, k, v = ours[f"{block}.attention.qkv.weight"].split([config.attention_width, kv, kv])
        gate, up = ours[f"{block}.mlp.gate_up.weight"].chunk(2)
        weights |= {
            f"{their_block}.self_attn.q_proj.weight": q,
            f"{their_block}.self_attn.k_proj.weight": k,
            f"{their_block}.self_attn.v_proj.weight": v,
            f"{their_block}.self_attn.o_proj.weight": ours[f"{block}.attention.proj.weight"],
            f"{their_block}.self_attn.q_norm.weight": ours[f"{block}.attention.q_norm"],
            f"{their_block}.self_attn.k_norm.weight": ours[f"{block}.attention.k_norm"],
            f"{their_block}.mlp.gate_proj.weight": gate,
            f"{their_block}.mlp.up_proj.weight": up,
            f"{their_block}.mlp.down_proj.weight": ours[f"{block}.mlp.down.weight"],
            f"{their_block}.input_layernorm.weight": ours[f"{block}.attention_norm.weight"],
            f"{their_block}.post_attention_layernorm.weight": ours[f"{block}.mlp_norm.weight"],
        }
    theirs.load_state_dict(weights, strict=True)
    return theirs.eval()


CASES = {
    "gpt2-tied": GPT2,
    "gpt2-untied": GPT2.model_copy(update={"tie_embeddings": False}),
    "gpt2-eps": GPT2.model_copy(update={"norm_eps": 0.03}),
    "modern-tied": MODERN,
    "modern-untied": MODERN.model_copy(update={"tie_embeddings": False}),
    "modern-grouped": GROUPED,
    "modern-one-kv-head-theta": MODERN.model_copy(update={"n_kv_head": 1, "rope_theta": 500.0}),
    "modern-wide-heads-eps": GROUPED.model_copy(update={"head_dim": 14, "norm_eps": 0.03}),
    "modern-narrow-heads": GROUPED.model_copy(update={"head_dim": 6, "tie_embeddings": False}),
}


def transformers_twin(model: GPT) -> GPT2LMHeadModel | Qwen3ForCausalLM:
    return gpt2_from_transformers(model) if model.config.architecture == "gpt2" else qwen3_from_transformers(model)


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_logits_equal_those_of_transformers_in_fp32(config: ModelConfig):
    model = random_gpt(config)
    ids = random_ids(2, config.max_seq_length)
    theirs = transformers_twin(model)
    with torch.no_grad():
        difference = (model(ids) - theirs(ids).logits).abs().max().item()
    assert difference <= 1e-5


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_loss_and_gradients_equal_those_of_transformers_in_fp32(config: ModelConfig):
    model = random_gpt(config)
    ids = random_ids(2, config.max_seq_length)
    theirs = transformers_twin(model)
    loss = model(ids[:, :-1], ids[:, 1:])
    their_loss = theirs(ids, labels=ids).loss
    loss.backward()
    their_loss.backward()
    assert abs(loss.item() - their_loss.item()) <= 1e-5
    name = "transformer.wte" if config.architecture == "gpt2" else "model.embed_tokens"
    their_wte = theirs.get_submodule(name).get_parameter("weight").grad
    torch.testing.assert_close(model.embed_tokens.weight.grad, their_wte, atol=1e-5, rtol=1e-4)
    norm, their_norm = (
        nn.utils.get_total_norm([present(p.grad) for p in m.parameters()]).item() for m in (model, theirs)
    )
    assert norm == pytest.approx(their_norm, rel=1e-5)


@pytest.mark.parametrize("config", [GPT2, GROUPED], ids=["gpt2", "grouped"])
def test_bf16_logits_stay_within_rounding_of_transformers(config: ModelConfig):
    model = random_gpt(config).bfloat16()
    ids = random_ids(2, config.max_seq_length)
    theirs = transformers_twin(random_gpt(config)).bfloat16()
    with torch.no_grad():
        logits = model(ids)
        their_logits = theirs(ids).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), their_logits.float(), atol=0.1, rtol=0.05)
