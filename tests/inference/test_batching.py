"""Texts in one batch: each is what it would be alone, whatever comes, goes and fails beside it."""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from chatgot.inference.batching import Alternatives, Batch, End, Generation, QueueFullError
from chatgot.model.generate import generate
from chatgot.model.gpt import GPT
from tests.model.shapes import MODERN, SHAPES, VOCAB, random_gpt

PATIENCE = 60


class Text:
    """A generation and what came of it."""

    def __init__(self, ids: list[int], new: int, stop: int | None = None, **settings: Any) -> None:
        self.tokens: list[int] = []
        self.alternatives: list[Alternatives | None] = []
        self.first = threading.Event()
        self.prompt, self.new, self.settings = list(ids), new, settings
        self._ends: queue.Queue[End] = queue.Queue()

        def on_token(token: int, alternatives: Alternatives | None) -> bool:
            self.tokens.append(token)
            self.alternatives.append(alternatives)
            self.first.set()
            return len(self.tokens) == stop

        self.generation = Generation(list(ids), new, on_token, self._ends.put, **settings)

    @property
    def end(self) -> End:
        """Waits for it."""
        return self._ends.get(timeout=PATIENCE)

    def alone(self, model: GPT) -> list[int]:
        settings = {name: value for name, value in self.settings.items() if name not in ("alternatives", "seconds")}
        return generate(model, torch.tensor([self.prompt]), self.new, **settings)[0]


@pytest.fixture
def batch() -> Iterator[Batch]:
    made = Batch(random_gpt(MODERN), streams=4, waiting=6)
    yield made
    made.close()
    assert not made.alive


def endless(seed: int = 0) -> Text:
    return Text([1, 2, 3], 10**6, seed=seed)


@pytest.mark.parametrize("name", SHAPES)
def test_every_text_is_what_it_is_alone(name: str):
    """20 texts of all lengths and settings through 5 places, past the context."""
    model, choose = random_gpt(SHAPES[name]), random.Random(1)
    batch = Batch(model, streams=5, waiting=15)
    texts = []
    for seed in range(20):
        prompt = [choose.randrange(VOCAB) for _ in range(choose.randint(1, 24))]
        settings: dict[str, Any] = choose.choice(
            [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8, "temperature": 1.2}]
        )
        texts.append(Text(prompt, choose.randint(1, 50), seed=seed, **settings))
    batch.submit([text.generation for text in texts])
    assert {text.end for text in texts} == {"max_tokens"}
    batch.close()
    assert [text.tokens for text in texts] == [text.alone(model) for text in texts]


def test_a_text_ends_by_stop_time_or_wish_and_its_place_is_free_again(batch: Batch):
    stopped, late, wanted = Text([1], 50, stop=7), endless(1), endless(2)
    late.generation.deadline = 0.0
    batch.submit([stopped.generation, late.generation, wanted.generation])
    assert stopped.end == "stop"
    assert len(stopped.tokens) == 7
    assert late.end == "time"
    assert wanted.first.wait(PATIENCE)
    batch.cancel([wanted.generation])
    assert wanted.end == "cancelled"
    after = Text([3], 5)
    batch.submit([after.generation])
    assert after.end == "max_tokens"
    batch.cancel([after.generation, stopped.generation])  # too late, and no harm
    assert batch.counts == (0, 0)


def test_the_queue_has_an_end_and_takes_all_of_a_request_or_nothing(batch: Batch):
    busy = [endless(i) for i in range(4)]
    batch.submit([text.generation for text in busy])
    assert all(text.first.wait(PATIENCE) for text in busy)
    waiting = [endless(10 + i) for i in range(5)]
    batch.submit([text.generation for text in waiting])
    with pytest.raises(QueueFullError):
        batch.submit([endless(20).generation, endless(21).generation])
    assert batch.counts == (4, 5)
    batch.cancel([waiting[0].generation])
    assert waiting[0].end == "cancelled"
    batch.submit([endless(20).generation, endless(21).generation])
    batch.cancel([text.generation for text in busy])
    assert all(text.first.wait(PATIENCE) for text in waiting[1:])


def test_closing_ends_every_text():
    batch = Batch(random_gpt(MODERN), streams=2, waiting=3)
    texts = [endless(i) for i in range(4)]
    batch.submit([text.generation for text in texts])
    assert texts[1].first.wait(PATIENCE)
    batch.close()
    assert [text.end for text in texts] == ["cancelled"] * 4


def test_alternatives_are_the_models_own_probabilities(batch: Batch):
    text = Text([5, 6], 4, seed=3, temperature=0.0, alternatives=3)
    sampled = Text([5, 6], 4, seed=3, temperature=2.0, alternatives=0)
    batch.submit([text.generation, sampled.generation, Text([1], 9).generation])
    assert (text.end, sampled.end) == ("max_tokens", "max_tokens")
    model = random_gpt(MODERN)
    for one in (text, sampled):
        with torch.no_grad():
            logs = model(torch.tensor([one.prompt + one.tokens]))[0, 1:-1].log_softmax(-1)
        for expected, token, given in zip(logs, one.tokens, one.alternatives):
            assert given is not None
            assert given.drawn == pytest.approx(float(expected[token]), abs=1e-4)
            best = expected.topk(len(given.likeliest))
            assert [token for token, _ in given.likeliest] == best.indices.tolist()
            assert [value for _, value in given.likeliest] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert [len(given.likeliest) for given in text.alternatives if given] == [3] * 4
    assert [len(given.likeliest) for given in sampled.alternatives if given] == [0] * 4


def test_a_failing_forward_ends_the_texts_in_it_and_not_the_thread(batch: Batch, caplog: pytest.LogCaptureFixture):
    model, broken = batch._model, Text([1], 30)
    weight = model.norm.get_parameter("weight")
    whole = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    batch.submit([broken.generation])
    assert broken.end == "error"
    assert "logits are not finite" in caplog.text
    with torch.no_grad():
        weight.copy_(whole)
    after = Text([1], 30)
    batch.submit([after.generation])
    assert after.end == "max_tokens"
    assert after.tokens == after.alone(model)
