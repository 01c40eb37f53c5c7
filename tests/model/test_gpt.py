"""Invariants of the GPT: causality, stable state-dict keys, recomputation that changes nothing, weights from a seed
alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from chatgot.config.run import ModelConfig
from chatgot.model.gpt import GPT, apply_rope, rope_tables
from tests.model.shapes import GPT2, GROUPED, MODERN, SHAPES, VOCAB, random_gpt, random_ids
from tests.support import present

torch_checkpoint = partial(checkpoint, use_reentrant=False)

each_shape = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)


# --- initialisation


@each_shape
def test_weights_are_a_function_of_the_seed_and_leave_the_global_rng_alone(config: ModelConfig):
    def build(seed: int) -> dict[str, Tensor]:
        model = GPT(config, VOCAB)
        model.init_weights(seed)
        return model.state_dict()

    state = torch.get_rng_state()
    first = build(3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    same, other = build(3), build(4)
    assert all(torch.equal(weight, same[name]) for name, weight in first.items())
    assert not torch.equal(first["embed_tokens.weight"], other["embed_tokens.weight"])


@each_shape
def test_initial_weights_follow_gpt2(config: ModelConfig):
    wide = config.model_copy(update={"d_model": 256, "d_hid": 256, "init_std": 0.05, "tie_embeddings": False})
    model = GPT(wide, 300)
    model.init_weights(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert torch.all(parameter == (0 if name.endswith("bias") else 1)), name
        elif "embed_positions" not in name:
            scaled = name.endswith(("attention.proj.weight", "mlp.down.weight"))
            assert parameter.std().item() == pytest.approx(
                0.05 / math.sqrt(2 * wide.n_layers) if scaled else 0.05, rel=0.03
            ), name
            assert abs(parameter.mean().item()) < 0.001, name


@each_shape
def test_zero_init_projections_make_every_block_the_identity(config: ModelConfig):
    model = GPT(config.model_copy(update={"zero_init_projections": True}), VOCAB)
    model.init_weights(0)
    x = torch.randn(2, 5, config.d_model, generator=torch.Generator().manual_seed(0))
    rope = rope_tables(torch.arange(5), config.d_model // config.n_head, config.rope_theta, x.dtype)
    for block in model.layers:
        assert torch.equal(block(x, rope=rope if config.architecture == "modern" else None), x)


def test_a_model_that_was_never_initialised_shows_it():
    ids = random_ids(1, 4)
    assert GPT(MODERN, VOCAB)(ids, ids).isnan()


def test_tied_matrices_are_one_parameter():
    tied, untied = GPT(MODERN, VOCAB), GPT(MODERN.model_copy(update={"tie_embeddings": False}), VOCAB)
    assert tied.lm_head.weight is tied.embed_tokens.weight
    assert untied.lm_head.weight is not untied.embed_tokens.weight


@pytest.mark.parametrize(
    "config", [c.model_copy(update={"tie_embeddings": False}) for c in (GPT2, MODERN)], ids=["gpt2", "modern"]
)
def test_names_say_what_muon_may_orthogonalise(config: ModelConfig):
    """DeepSpeed's Muon takes every matrix whose name has neither 'embed' nor 'lm_head'; these must be the blocks'
    matrices exactly.
    """
    matrices = {
        n for n, p in GPT(config, VOCAB).named_parameters() if p.ndim >= 2 and "embed" not in n and "lm_head" not in n
    }
    kinds = {name.split(".", 2)[2] for name in matrices}
    assert all(name.startswith("layers.") for name in matrices)
    feed_forward = {"mlp.gate_up.weight"} if config.architecture == "modern" else {"mlp.up.weight"}
    assert kinds == {"attention.qkv.weight", "attention.proj.weight", "mlp.down.weight"} | feed_forward


# --- forward


@each_shape
def test_invariant_05_a_changed_token_leaves_earlier_logits_unchanged(config: ModelConfig):
    model = random_gpt(config)
    ids = random_ids(1, config.max_seq_length)
    with torch.no_grad():
        before = model(ids)
        for t in (1, 7, config.max_seq_length - 1):
            changed = ids.clone()
            changed[0, t] = (changed[0, t] + 1) % VOCAB
            after = model(changed)
            assert torch.equal(after[0, :t], before[0, :t])
            assert not torch.equal(after[0, t], before[0, t])


@each_shape
def test_invariant_05_the_loss_at_a_position_has_no_gradient_from_later_tokens(config: ModelConfig):
    """The training path too (with targets), not only the logits."""
    model = random_gpt(config).train()
    embedded: list[Tensor] = []
    model.embed_tokens.register_forward_hook(
        lambda module, args, output: embedded.append(output.detach().requires_grad_()) or embedded[-1]
    )
    ids = random_ids(1, 10)
    model(ids[:, :-1], ids[:, 1:], reduction="none")[0, 4].backward()
    reached = present(embedded[0].grad)[0].abs().sum(-1) > 0
    assert reached.tolist() == [True] * 5 + [False] * 4


@each_shape
def test_invariant_06_state_dict_keys_survive_forward_and_checkpointing(config: ModelConfig):
    model = random_gpt(config).train()
    keys = list(model.state_dict())
    ids = random_ids(2, 8)
    for every in (None, 1, 2):
        model.set_activation_checkpointing(torch_checkpoint if every else None, every or 1)
        model(ids, ids).backward()
        assert list(model.state_dict()) == keys
    assert not list(model.buffers())
    fresh = GPT(config, VOCAB)
    fresh.load_state_dict(model.state_dict(), strict=True)


@each_shape
def test_the_loss_is_the_cross_entropy_of_the_targets_that_count(config: ModelConfig):
    model = random_gpt(config)
    ids, targets = random_ids(2, 8), random_ids(2, 8, seed=1)
    targets[0, :3] = targets[1, 5] = -100
    with torch.no_grad():
        log_probabilities = model(ids).log_softmax(-1)
        each = model(ids, targets, reduction="none")
        total, mean = model(ids, targets, reduction="sum"), model(ids, targets)
    counts = targets != -100
    expected = -log_probabilities.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * counts
    torch.testing.assert_close(each, expected)
    torch.testing.assert_close(total, expected.sum())
    torch.testing.assert_close(mean, expected.sum() / counts.sum())


def test_last_only_gives_the_last_position():
    model = random_gpt(MODERN)
    ids = random_ids(2, 8)
    torch.testing.assert_close(model(ids, last_only=True), model(ids)[:, -1:])


@each_shape
def test_more_tokens_than_max_seq_length_are_refused(config: ModelConfig):
    with pytest.raises(ValueError, match="17 tokens are more than max_seq_length = 16"):
        random_gpt(config)(random_ids(1, 17))


def test_targets_exclude_last_only():
    ids = random_ids(1, 4)
    with pytest.raises(ValueError, match="all positions"):
        random_gpt(MODERN)(ids, ids, last_only=True)


@each_shape
def test_dropout_acts_in_training_only(config: ModelConfig):
    model = random_gpt(config.model_copy(update={"dropout": 0.3}))
    ids = random_ids(2, 8)
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


@each_shape
def test_dropout_sits_on_embeddings_attention_and_both_block_outputs(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
):
    model = random_gpt(config.model_copy(update={"dropout": 0.3})).train()
    dropped: list[float] = []
    attention: list[float] = []
    dropout, sdpa = torch.nn.functional.dropout, torch.nn.functional.scaled_dot_product_attention

    def count_dropout(x: Tensor, p: float, training: bool) -> Tensor:
        dropped.append(p if training else 0.0)
        return dropout(x, p, training)

    def count_attention(*args, **kwargs) -> Tensor:
        attention.append(kwargs["dropout_p"])
        return sdpa(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "dropout", count_dropout)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count_attention)
    model(random_ids(1, 8))
    assert dropped == [0.3] * (1 + 2 * config.n_layers)
    assert attention == [0.3] * config.n_layers


# --- precision


@each_shape
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters_give_16_bit_logits_and_an_fp32_loss(config: ModelConfig, dtype: torch.dtype):
    model = random_gpt(config, std=0.05).to(dtype).train()
    ids = random_ids(2, 8)
    assert model(ids).dtype == dtype
    loss = model(ids, ids)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(g.dtype == dtype and g.isfinite().all() for g in (present(p.grad) for p in model.parameters()))
    reference = random_gpt(config, std=0.05)(ids, ids)
    assert loss.item() == pytest.approx(reference.item(), rel=0.02)


@each_shape
def test_autocast_keeps_the_loss_near_fp32_and_gradients_in_fp32(config: ModelConfig):
    model = random_gpt(config, std=0.05).train()
    ids = random_ids(2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, ids)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(present(p.grad).dtype == torch.float32 for p in model.parameters())
    assert loss.item() == pytest.approx(model(ids, ids).item(), rel=0.02)


def test_rotary_angles_are_fp32_whatever_the_models_dtype():
    """bf16 cannot tell position 257 from 256; the angle must be taken before the cast."""
    positions = torch.arange(1024)
    full = rope_tables(positions, 64, 10000.0, torch.float32)
    for table, narrow in zip(full, rope_tables(positions, 64, 10000.0, torch.bfloat16), strict=True):
        assert (table - narrow.float()).abs().max().item() <= 2**-8


def test_rotating_keeps_the_dtype_that_autocast_chose():
    tables = rope_tables(torch.arange(3), 8, 10000.0, torch.float32)
    assert apply_rope(torch.ones(1, 3, 2, 8, dtype=torch.bfloat16), tables).dtype == torch.bfloat16


def test_rotated_products_depend_on_the_distance_only():
    q, k = random_ids(1, 64).view(1, 1, 2, 32).float(), random_ids(1, 64, seed=1).view(1, 1, 2, 32).float()

    def product(at: int, distance: int) -> Tensor:
        tables = [rope_tables(torch.tensor([position]), 32, 10000.0, torch.float64) for position in (at, at + distance)]
        return (apply_rope(q.double(), tables[0]) * apply_rope(k.double(), tables[1])).sum(-1)

    torch.testing.assert_close(product(0, 3), product(90, 3), rtol=1e-4, atol=1e-2)
    assert not torch.allclose(product(0, 3), product(0, 4), rtol=1e-4, atol=1e-2)


# --- activation checkpointing


def loss_and_gradients(model: GPT, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(5)
    model.zero_grad()
    loss = model(ids[:, :-1], ids[:, 1:])
    loss.backward()
    return loss.detach(), [present(p.grad).clone() for p in model.parameters()]


def count_block_runs(model: GPT) -> list[int]:
    """Forwards of each block from now on."""
    runs = [0] * len(model.layers)

    def counter(index: int) -> Callable[..., None]:
        def count(module, args, kwargs) -> None:
            runs[index] += 1

        return count

    for index, block in enumerate(model.layers):
        block.register_forward_pre_hook(counter(index), with_kwargs=True)
    return runs


@pytest.mark.parametrize(("every", "expected"), [(1, [2, 2, 2, 2]), (2, [2, 1, 2, 1]), (3, [2, 1, 1, 2])])
@each_shape
def test_invariant_07_recomputation_changes_neither_loss_nor_gradients(
    config: ModelConfig, every: int, expected: list[int]
):
    config = config.model_copy(update={"n_layers": 4, "dropout": 0.1})
    model = random_gpt(config).train()
    ids = random_ids(2, 17)
    loss, gradients = loss_and_gradients(model, ids)

    model.set_activation_checkpointing(torch_checkpoint, every)
    runs = count_block_runs(model)
    again, same_gradients = loss_and_gradients(model, ids)
    assert runs == expected
    assert torch.equal(again, loss)
    assert all(torch.equal(a, b) for a, b in zip(same_gradients, gradients, strict=True))


def test_invariant_07_control_losing_the_rng_state_is_noticed():
    model = random_gpt(MODERN.model_copy(update={"dropout": 0.1})).train()
    ids = random_ids(2, 17)
    _, gradients = loss_and_gradients(model, ids)
    model.set_activation_checkpointing(partial(torch_checkpoint, preserve_rng_state=False))
    _, others = loss_and_gradients(model, ids)
    assert not all(torch.equal(a, b) for a, b in zip(others, gradients, strict=True))


def test_recomputation_saves_memory():
    def saved_bytes(model: GPT) -> int:
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(ids[:, :-1], ids[:, 1:])
        del loss
        return sum(seen.values())

    ids = random_ids(8, 17)
    model = random_gpt(MODERN.model_copy(update={"n_layers": 6})).train()
    plain = saved_bytes(model)
    model.set_activation_checkpointing(torch_checkpoint, 1)
    every_block = saved_bytes(model)
    model.set_activation_checkpointing(torch_checkpoint, 2)
    every_second = saved_bytes(model)
    assert every_block < every_second < plain
    assert every_block < plain / 3


@pytest.mark.parametrize("situation", ["evaluation", "no gradients", "turned off"])
def test_checkpointing_is_only_asked_for_in_training(situation: str):
    model = random_gpt(MODERN).train(situation != "evaluation")

    def refuse(block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        raise AssertionError("called")

    model.set_activation_checkpointing(refuse)
    if situation == "turned off":
        model.set_activation_checkpointing(None)
    with torch.set_grad_enabled(situation != "no gradients"):
        model(random_ids(1, 4))


@each_shape
def test_a_checkpointed_block_gets_one_tensor_and_nothing_it_could_lose(config: ModelConfig):
    """What DeepSpeed's partition_activations and cpu_checkpointing do: empty the argument's storage after the block
    ran.
    """
    model = random_gpt(config).train()
    ids = random_ids(2, 9)
    loss, gradients = loss_and_gradients(model, ids)

    class Emptying(torch.autograd.Function):
        @staticmethod
        def forward(ctx, block, x):
            ctx.block, ctx.kept = block, x.detach().clone()
            y = block(x)
            x.data = torch.empty(0)
            return y.detach()

        @staticmethod
        def backward(ctx, *grads):
            [grad] = grads
            x = ctx.kept.requires_grad_()
            with torch.enable_grad():
                y = ctx.block(x)
            torch.autograd.backward(y, grad)
            return None, x.grad

    model.set_activation_checkpointing(lambda block, x: Emptying.apply(block, x.clone()))
    again, same_gradients = loss_and_gradients(model, ids)
    assert torch.equal(again, loss)
    for a, b in zip(same_gradients, gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_every_n_layers_below_1_is_refused():
    with pytest.raises(ValueError, match="every_n_layers = 0"):
        GPT(GROUPED, VOCAB).set_activation_checkpointing(torch_checkpoint, 0)
