"""Rows of different lengths in one forward: each has the logits that it has alone."""

from __future__ import annotations

import pytest
import torch

from chatgot.config.run import ModelConfig
from chatgot.model.kv_cache import SlotCache
from tests.model.shapes import SHAPES, random_gpt, random_ids


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_rows_come_and_go_and_have_the_logits_that_they_have_alone(config: ModelConfig):
    model = random_gpt(config)
    cache = SlotCache(config, 4, torch.device("cpu"), torch.float32)
    texts: list[torch.Tensor] = []

    def begin(length: int, seed: int) -> None:
        text = random_ids(1, length, seed=seed)
        alone = cache.alone(len(texts))
        model(text, cache=alone)
        cache.lengths.append(alone.length)
        texts.append(text)

    def step() -> None:
        nonlocal texts
        texts = [torch.cat([text, random_ids(1, 1, seed=int(text.sum()))], dim=1) for text in texts]
        logits = model(torch.cat([text[:, -1:] for text in texts]), cache=cache, last_only=True)
        full = torch.cat([model(text, last_only=True) for text in texts])
        torch.testing.assert_close(logits, full, atol=1e-5, rtol=1e-5)

    with torch.no_grad():
        begin(3, 1)
        step()
        begin(7, 2)
        begin(1, 3)
        step()
        cache.remove(0)
        texts = [texts[2], texts[1]]
        step()
        begin(12, 4)
        step()
        cache.remove(2)
        texts.pop()
        for _ in range(4):
            step()
        assert cache.lengths == [text.shape[1] for text in texts] == [8, 14]
        assert cache.length == 14


def test_a_row_beyond_the_context_is_refused():
    config = SHAPES["modern"]
    cache = SlotCache(config, 2, torch.device("cpu"), torch.float32)
    cache.lengths = [3, config.max_seq_length]
    with pytest.raises(ValueError, match="more than max_seq_length"):
        random_gpt(config)(random_ids(2, 1), cache=cache)
