"""Sampling: the cache changes nothing, rows and global state are left alone, ranks stay in step."""

from __future__ import annotations

import threading

import pytest
import torch

from chatgot.config.run import ModelConfig
from chatgot.errors import NumericsError
from chatgot.model.generate import NOT_FINITE, context_start, draw, generate, uniforms
from chatgot.model.kv_cache import KVCache
from tests.model.shapes import GPT2, GROUPED, MODERN, SHAPES, VOCAB, random_gpt, random_ids


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, {"temperature": 0.9, "top_k": 12, "top_p": 0.95}], ids=["greedy", "sampled"]
)
@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_cached_tokens_equal_uncached_ones_past_max_seq_length(config: ModelConfig, settings: dict):
    model = random_gpt(config)
    prompt = random_ids(3, 5)
    new = 3 * config.max_seq_length  # several hops of the window
    cached = generate(model, prompt, new, seed=7, use_cache=True, **settings)
    assert cached == generate(model, prompt, new, seed=7, use_cache=False, **settings)
    assert [len(row) for row in cached] == [new] * 3


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_greedy_tokens_are_those_of_a_naive_loop(config: ModelConfig):
    model = random_gpt(config)
    text = prompt = random_ids(2, 5)
    with torch.no_grad():
        for length in range(5, 45):
            context = text[:, context_start(length, config.max_seq_length) :]
            text = torch.cat([text, model(context)[:, -1:].argmax(-1)], dim=1)
    assert generate(model, prompt, 40, temperature=0) == text[:, 5:].tolist()


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_cached_logits_equal_those_of_one_full_forward(config: ModelConfig):
    model = random_gpt(config)
    ids = random_ids(2, config.max_seq_length)
    with torch.no_grad():
        full = model(ids)
        cache = KVCache(config, 2)
        steps = [model(ids[:, :6], cache=cache)]
        steps += [model(ids[:, t : t + 1], cache=cache) for t in range(6, config.max_seq_length)]
    assert cache.length == config.max_seq_length
    torch.testing.assert_close(torch.cat(steps, dim=1), full, atol=1e-5, rtol=1e-5)


def test_a_full_cache_and_a_second_prefill_are_refused():
    model = random_gpt(MODERN)
    cache = KVCache(MODERN, 1)
    ids = random_ids(1, MODERN.max_seq_length)
    with torch.no_grad():
        model(ids[:, :4], cache=cache)
        with pytest.raises(ValueError, match="one at a time"):
            model(ids[:, :2], cache=cache)
        cache.length = 0
        model(ids, cache=cache)
        with pytest.raises(ValueError, match="max_seq_length = 16"):
            model(ids[:, :1], cache=cache)


@pytest.mark.parametrize("prompt_length", [16, 17, 40], ids=["full", "one too long", "much too long"])
def test_prompts_of_any_length_slide(prompt_length: int):
    model = random_gpt(MODERN)
    prompt = random_ids(2, prompt_length)
    cached = generate(model, prompt, 12, temperature=0)
    assert cached == generate(model, prompt, 12, temperature=0, use_cache=False)
    start = context_start(prompt_length, 16)
    with torch.no_grad():
        first = model(prompt[:, start:])[:, -1].argmax(-1)
    assert [row[0] for row in cached] == first.tolist()


@pytest.mark.parametrize("window", [1, 2, 3, 16, 256])
def test_the_context_is_never_longer_than_the_window_and_keeps_three_quarters(window: int):
    starts = [context_start(length, window) for length in range(1, 5 * window + 2)]
    lengths = [length - start for length, start in enumerate(starts, start=1)]
    assert starts == sorted(starts)
    assert all(1 <= length <= window for length in lengths)
    hop = max(1, window // 4)
    assert all(length > window - hop for length in lengths[window:])
    assert len(set(starts)) <= 1 + -(-(4 * window + 1) // hop)  # one refill of the cache per hop


def test_a_shorter_context_can_be_asked_for():
    model = random_gpt(MODERN)
    short = MODERN.model_copy(update={"max_seq_length": 8})
    shorter = random_gpt(short)
    shorter.load_state_dict(model.state_dict())
    prompt = random_ids(1, 4)
    assert generate(model, prompt, 20, seed=3, max_seq_length=8) == generate(shorter, prompt, 20, seed=3)


def test_a_row_does_not_depend_on_the_other_rows():
    model = random_gpt(MODERN)
    prompts = random_ids(4, 6)
    together = generate(model, prompts, 25, seed=11)
    alone = [generate(model, prompts[row : row + 1], 25, seed=11 + row)[0] for row in range(4)]
    assert together == alone
    assert len({tuple(row) for row in together}) == 4


def test_equal_prompts_get_different_texts_and_the_same_seed_the_same_text():
    model = random_gpt(MODERN)
    prompts = random_ids(1, 6).repeat(3, 1)
    first = generate(model, prompts, 25, seed=5)
    assert len({tuple(row) for row in first}) == 3
    assert generate(model, prompts, 25, seed=5) == first
    assert generate(model, prompts, 25, seed=6) != first


@pytest.mark.parametrize("training", [True, False])
def test_invariant_13_sampling_leaves_rng_and_training_mode_untouched(training: bool):
    model = random_gpt(MODERN.model_copy(update={"dropout": 0.5})).train(training)
    model.layers[1].train(not training)  # every module's own mode comes back, not the model's
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    tokens = generate(model, random_ids(2, 4), 20, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert tokens == generate(model.eval(), random_ids(2, 4), 20, seed=1)  # and no dropout was at work


def test_training_mode_comes_back_after_an_exception():
    model = random_gpt(MODERN).train()

    def interrupt(row: int, token: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, random_ids(1, 4), 5, on_token=interrupt)
    assert all(module.training for module in model.modules())


def test_no_gradients_are_recorded():
    model = random_gpt(MODERN)
    seen = []
    model.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    generate(model, random_ids(1, 4), 3)
    assert seen == [False] * 3


def test_a_model_trains_after_it_has_sampled():
    model = random_gpt(MODERN)
    generate(model, random_ids(1, 4), 20)
    model(random_ids(2, 8), random_ids(2, 8, seed=1)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_stop_ends_a_row_and_on_token_streams_every_token():
    model = random_gpt(MODERN)
    prompts = random_ids(3, 4)
    free = generate(model, prompts, 30, seed=2)
    enough = [4, 9, 30]

    streamed: list[list[int]] = [[], [], []]
    stopped = generate(
        model,
        prompts,
        30,
        seed=2,
        stop=lambda ids: any(list(ids) == free[row][: enough[row]] for row in range(3)),
        on_token=lambda row, token: streamed[row].append(token),
    )
    assert stopped == [free[row][: enough[row]] for row in range(3)]
    assert streamed == stopped


def test_without_agree_the_loop_ends_with_the_last_row():
    model = random_gpt(MODERN)
    forwards = count_forwards(model)
    generate(model, random_ids(2, 4), 30, stop=lambda ids: len(ids) == 6)
    assert forwards == [6]


def test_ranks_with_unequal_prompts_and_stops_make_equally_many_forwards():
    """Two ranks as threads: agree is a reduction with AND that both must enter, as all_reduce is."""
    model_args = [
        (random_gpt(MODERN), random_ids(1, 3, seed=1), 40),
        (random_gpt(MODERN), random_ids(2, 21, seed=2), 18),
    ]
    stops = [lambda ids: len(ids) >= 5, None]
    barrier = threading.Barrier(2, timeout=60)
    votes = [[False], [False]]
    turns: list[list[tuple[bool, int]]] = [[], []]
    results: list = [None, None]
    forwards = [count_forwards(model) for model, _, _ in model_args]

    def run(rank: int) -> None:
        def agree(done: bool) -> bool:
            turns[rank].append((done, forwards[rank][0]))
            votes[rank][0] = done
            barrier.wait()
            everyone = votes[0][0] and votes[1][0]
            barrier.wait()
            return everyone

        model, prompt, new = model_args[rank]
        results[rank] = generate(model, prompt, new, seed=4, stop=stops[rank], agree=agree)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)

    assert forwards[0] == forwards[1] == [18]
    assert turns[0] == [(turn >= 5, turn) for turn in range(1, 19)]  # exactly one forward before each vote
    assert turns[1] == [(turn >= 18, turn) for turn in range(1, 19)]
    for rank in range(2):
        model, prompt, new = model_args[rank]
        assert results[rank] == generate(model, prompt, new, seed=4, stop=stops[rank])  # company changes no text


def test_a_wrapped_model_is_called_through_its_wrapper():
    class Wrapper(torch.nn.Module):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module
            self.calls = 0

        def forward(self, *args, **kwargs):
            self.calls += 1
            return self.module(*args, **kwargs)

    model = random_gpt(MODERN)
    wrapper = Wrapper(model)
    prompt = random_ids(1, 4)
    assert generate(wrapper, prompt, 7) == generate(model, prompt, 7)
    assert wrapper.calls == 7


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": float("nan")},
        {"max_new_tokens": 0},
        {"max_seq_length": 0},
        {"max_seq_length": 17},
    ],
    ids=lambda settings: "-".join(f"{k}={v}" for k, v in settings.items()),
)
def test_values_out_of_range_are_refused_by_name(settings: dict):
    (name,) = settings
    with pytest.raises(ValueError, match=name):
        generate(random_gpt(MODERN), random_ids(1, 4), **{"max_new_tokens": 3, **settings})


@pytest.mark.parametrize("shape", [(1, 0), (0, 3), (4,)])
def test_an_empty_prompt_is_refused(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="input_ids has shape"):
        generate(random_gpt(MODERN), torch.zeros(shape, dtype=torch.long), 3)


def test_a_module_without_a_gpt_is_refused():
    with pytest.raises(ValueError, match="Linear contains no GPT"):
        generate(torch.nn.Linear(2, 2), random_ids(1, 4), 3)


def test_diverged_weights_are_named_instead_of_sampled():
    model = random_gpt(MODERN)
    with torch.no_grad():
        model.norm.get_parameter("weight").fill_(float("nan"))
    with pytest.raises(NumericsError, match="not finite"):
        generate(model, random_ids(1, 4), 3)


def test_top_k_beyond_the_vocabulary_means_all_of_it():
    model = random_gpt(MODERN)
    prompt = random_ids(1, 4)
    assert generate(model, prompt, 20, top_k=10 * VOCAB) == generate(model, prompt, 20, top_k=VOCAB)


def test_top_k_1_is_greedy():
    model = random_gpt(GPT2)
    prompt = random_ids(2, 4)
    assert generate(model, prompt, 20, top_k=1) == generate(model, prompt, 20, temperature=0)


def frequencies(
    logits: list[float],
    count: int = 4000,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> list[float]:
    """Of `count` draws."""
    tokens = draw(torch.tensor([logits] * count), temperature, top_k, top_p, uniforms(0, count))
    return (torch.bincount(tokens, minlength=len(logits)) / count).tolist()


def test_draws_follow_the_softmax_of_the_settings():
    logits = torch.tensor([0.5, 0.1, 0.3, 0.1]).log().tolist()
    assert frequencies(logits) == pytest.approx([0.5, 0.1, 0.3, 0.1], abs=0.03)
    sharp = torch.tensor([0.25, 0.01, 0.09, 0.01]) / 0.36  # squared
    assert frequencies(logits, temperature=0.5) == pytest.approx(sharp.tolist(), abs=0.03)
    assert frequencies(logits, top_k=2) == pytest.approx([0.625, 0, 0.375, 0], abs=0.03)
    assert frequencies(logits, top_p=0.75) == pytest.approx([0.625, 0, 0.375, 0], abs=0.03)  # 0.5 is not enough, 0.8 is
    assert frequencies(logits, top_p=0.01) == [1, 0, 0, 0]
    assert frequencies([9.0, 99.0, 98.0], temperature=1e-37, count=20) == [0, 1, 0]
    assert frequencies([9.0, 99.0, 98.0], temperature=1e-300, count=20) == [0, 1, 0]
    assert frequencies([0.0, 0.0, 0.0], top_k=2) == pytest.approx(
        [0.5, 0.5, 0], abs=0.03
    )  # ties: the lower token first


def test_rows_are_drawn_alike_together_and_alone_and_a_bad_one_is_told_of():
    logits = torch.randn(5, 1000, generator=torch.Generator().manual_seed(3)) * 4
    chances = uniforms(9, 5)
    for settings in ((1.0, None, None), (0.7, 20, None), (1.3, None, 0.8), (1.0, 50, 0.5), (0.0, None, None)):
        together = draw(logits, *settings, chances)
        assert together.tolist() == [int(draw(logits[i : i + 1], *settings, chances[i : i + 1])) for i in range(5)]
        bad = logits.clone()
        bad[2, 7] = float("nan")
        assert draw(bad, *settings, chances).tolist() == [*together[:2], NOT_FINITE, *together[3:]]
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(torch.tensor([[-1e9, 0.0, 0.0, -1e9]] * 2), 1.0, None, None, ends).tolist() == [1, 2]


def test_bf16_models_sample_in_fp32(monkeypatch: pytest.MonkeyPatch):
    model = random_gpt(GROUPED).bfloat16()
    dtypes = set()

    def recording(logits: torch.Tensor, *settings) -> torch.Tensor:
        dtypes.add(logits.dtype)
        return draw(logits, *settings)

    monkeypatch.setattr("chatgot.model.generate.draw", recording)
    tokens = generate(model, random_ids(2, 4), 24, seed=1)
    assert [len(row) for row in tokens] == [24, 24]
    assert dtypes == {torch.float32}


def count_forwards(model: torch.nn.Module) -> list[int]:
    """A list whose only item counts the model's forwards from now on."""
    count = [0]

    def add(module, args, kwargs) -> None:
        count[0] += 1

    model.register_forward_pre_hook(add, with_kwargs=True)
    return count
