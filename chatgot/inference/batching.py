"""Many texts continued at once: one thread, one forward for all of them, and texts that come and go at every token."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from chatgot.errors import NumericsError
from chatgot.model.generate import NOT_FINITE, context_start, draw, uniforms
from chatgot.model.gpt import GPT
from chatgot.model.kv_cache import SlotCache

log = logging.getLogger(__name__)
End = Literal["stop", "max_tokens", "time", "cancelled", "error"]


class QueueFullError(Exception):
    """There is no room for another text to wait; try again later."""


class Alternatives(NamedTuple):
    """What else might have been drawn, by the model's own log-probabilities: temperature 1, all tokens."""

    drawn: float
    """Of the token that was drawn."""
    likeliest: list[tuple[int, float]]


@dataclass(eq=False)
class Generation:
    """One text to be continued. The batch's thread calls back, and nothing in it may wait."""

    ids: list[int]
    """The prompt, at least one token. Once submitted, a list of its own: what the context sees, and new tokens."""
    max_new_tokens: int
    on_token: Callable[[int, Alternatives | None], bool]
    """Called with every token; whether the text ends with it."""
    on_end: Callable[[End], None]
    """Called once, after the last token, whatever ends it."""
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    alternatives: int | None = None
    """How many of the likeliest tokens are given with each; None: not even the drawn one's probability."""
    seconds: float = float("inf")
    """From now to its end, waiting included."""
    cancelled: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.deadline = time.monotonic() + self.seconds
        self.chances = uniforms(self.seed, self.max_new_tokens)
        self.drawn = 0
        self.start = -1  # where the cached context begins in ids; -1: nothing is cached


class Batch:
    """Continues up to `streams` texts at once; up to `waiting` more stand in a queue.

    A text's tokens are those of `model.generate.generate` with the same settings, whatever else is in the batch.
    """

    def __init__(self, model: GPT, streams: int, waiting: int) -> None:
        self.streams, self.most_waiting = streams, waiting
        self._model = model
        self._changed = threading.Condition()
        self._waiting: deque[Generation] = deque()
        self._active: list[Generation] = []  # in the order of the cache's rows
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="batch", daemon=True)
        self._thread.start()

    @property
    def counts(self) -> tuple[int, int]:
        """Texts that are being continued, and that wait."""
        return len(self._active), len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def submit(self, generations: Sequence[Generation]) -> None:
        """Queue all of them, or none.

        Raises:
            QueueFullError: more would wait than may, once those that wait have taken all free places.
        """
        with self._changed:
            room = self.streams - len(self._active) + self.most_waiting - len(self._waiting)
            if len(generations) > room:
                raise QueueFullError
            for (
                generation
            ) in generations:  # whole hops of the context are cut off, so that the next are where they were
                begin = context_start(len(generation.ids), self._model.config.max_seq_length)
                generation.ids = generation.ids[begin:]
            self._waiting.extend(generations)
            self._changed.notify()

    def cancel(self, generations: Sequence[Generation]) -> None:
        """End them; those that have ended already are left alone."""
        with self._changed:
            for generation in generations:
                generation.cancelled = True
            self._changed.notify()

    def close(self) -> None:
        """End all texts and the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        cache = self._empty_cache()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._active or self._closing)
                if self._closing:
                    break
                self._drop_from_queue()
                while self._waiting and len(self._active) < self.streams:
                    self._active.append(self._waiting.popleft())
                    cache.lengths.append(0)
            try:
                self._step(cache)
            except Exception:  # whatever it is, clients must not wait for ever, and the next ones may fare better
                log.exception("a batch of %d texts failed", len(self._active))
                failed, cache = self._active, self._empty_cache()
                self._active = []
                for generation in failed:
                    generation.on_end("error")
        for generation in (*self._active, *self._waiting):
            generation.on_end("cancelled")

    def _empty_cache(self) -> SlotCache:
        first = next(self._model.parameters())
        return SlotCache(self._model.config, self.streams, first.device, first.dtype)

    def _drop_from_queue(self) -> None:
        """End those that wait and are wanted no more, or have waited too long."""
        for generation in [*self._waiting]:
            if end := _ended(generation):
                self._waiting.remove(generation)
                generation.on_end(end)

    @torch.inference_mode()
    def _step(self, cache: SlotCache) -> None:
        """One more token for every text."""
        for row in reversed(range(len(self._active))):
            if end := _ended(self._active[row]):
                self._remove(cache, row, end)
        if not self._active:
            return
        logits = self._logits(cache)  # (B, V)
        tokens = self._draw(logits)
        shown = [row for row, generation in enumerate(self._active) if generation.alternatives is not None]
        alternatives = dict(zip(shown, self._alternatives(logits, tokens, shown))) if shown else {}
        ends: dict[int, End] = {}
        for row, (generation, token) in enumerate(zip(self._active, tokens.tolist())):
            if token == NOT_FINITE:
                raise NumericsError("logits are not finite")
            generation.ids.append(token)
            generation.drawn += 1
            if generation.on_token(token, alternatives.get(row)):
                ends[row] = "stop"
            elif generation.drawn == generation.max_new_tokens:
                ends[row] = "max_tokens"
        for row in sorted(ends, reverse=True):
            self._remove(cache, row, ends[row])

    def _remove(self, cache: SlotCache, row: int, end: End) -> None:
        """End the text of a row; the last one takes its place, as in the cache."""
        generation = self._active[row]
        self._active[row] = self._active[-1]
        self._active.pop()
        cache.remove(row)
        generation.on_end(end)

    def _logits(self, cache: SlotCache) -> Tensor:
        """Logits (B, V) fp32 of the next token of every text.

        The tokens that the cache lacks, of a new text or after a hop of the context, are computed text by text.
        """
        model, device = self._model, next(self._model.parameters()).device
        for row, generation in enumerate(self._active):
            start = context_start(len(generation.ids), model.config.max_seq_length)
            if start == generation.start:
                continue
            filling = cache.alone(row)
            if before := generation.ids[start:-1]:
                model(torch.tensor([before], device=device), cache=filling, last_only=True)
            cache.lengths[row], generation.start = filling.length, start
        last = torch.tensor([[generation.ids[-1]] for generation in self._active], device=device)
        return model(last, cache=cache, last_only=True)[:, -1].float()

    def _draw(self, logits: Tensor) -> Tensor:
        """Tokens (B,); rows with the same settings are drawn together."""
        settings: dict[tuple[float, int | None, float | None], list[int]] = {}
        for row, one in enumerate(self._active):
            settings.setdefault((one.temperature, one.top_k, one.top_p), []).append(row)
        chances = torch.stack([one.chances[one.drawn] for one in self._active]).to(logits.device)
        tokens = torch.empty(len(self._active), dtype=torch.long, device=logits.device)
        for (temperature, top_k, top_p), rows in settings.items():
            tokens[rows] = draw(logits[rows], temperature, top_k, top_p, chances[rows])
        return tokens

    def _alternatives(self, logits: Tensor, tokens: Tensor, rows: list[int]) -> list[Alternatives]:
        most = max(self._active[row].alternatives or 0 for row in rows)
        logs = logits[rows].log_softmax(-1)
        drawn = logs.gather(-1, tokens[rows, None])[:, 0].tolist()
        values, ids = (part.tolist() for part in logs.topk(min(most, logs.shape[-1]), dim=-1))
        return [
            Alternatives(drawn[i], [*zip(ids[i], values[i])][: self._active[row].alternatives])
            for i, row in enumerate(rows)
        ]


def _ended(generation: Generation) -> End | None:
    """Why a text ends before its next token."""
    if generation.cancelled:
        return "cancelled"
    return "time" if time.monotonic() > generation.deadline else None
