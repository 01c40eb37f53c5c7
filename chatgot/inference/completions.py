"""OpenAI's completions over a batch: the answers, whole or as a stream, and what of them is copied.

Beyond OpenAI's keys: `top_k`; `seed` in every answer; `ended_by` beside `finish_reason`, which has no word for a limit
of time; and with `mark_copied`, `copied` in every choice that has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from starlette.concurrency import run_in_threadpool

from chatgot.data.tokenizer import Tokenizer
from chatgot.inference.batching import Alternatives, Batch, End, Generation
from chatgot.inference.copied import FedPlace, TrainingText
from chatgot.inference.requests import CompletionRequest, RefusedError
from chatgot.inference.sample import Reply

MOST_SEARCHED = 20_000
"""Characters, the last ones of a text, in which copies are looked for."""
MOST_SEARCHES = 8
"""Texts that may be searched or wait for it."""


class CopyFinder:
    """Looks for what stands in the training text word for word, one text after another, while others are answered."""

    def __init__(self, source: TrainingText, min_characters: int) -> None:
        self._source, self.min_characters = source, min_characters
        self._one, self._waiting = asyncio.Lock(), 0

    async def find(self, text: str, after: int = 0) -> dict[str, Any]:
        """The passages of a text that end beyond its first `after` characters, with where they stand.

        Raises:
            RefusedError: too many texts are waiting (429).
        """
        if self._waiting >= MOST_SEARCHES:
            raise RefusedError(429, "too many texts are being searched for copies; try again in a while")
        self._waiting += 1
        try:
            async with self._one:
                left_out = max(0, len(text) - MOST_SEARCHED)
                search = self._source.spans, text[left_out:], self.min_characters, max(0, after - left_out)
                spans = await run_in_threadpool(*search)
        finally:
            self._waiting -= 1
        copies = [
            {
                "begin": span.begin + left_out,
                "end": span.end + left_out,
                "count": span.count,
                "where": span.where,
                "places": [_place(one) for one in span.places],
            }
            for span in spans
        ]
        return {"min_characters": self.min_characters, "searched_from": left_out, "copies": copies}


def _place(one: FedPlace) -> dict[str, Any]:
    stands = {"file": one.place.file, "line": one.place.line, "token": one.place.begin}
    return {**stands, "fed_in_steps": one.fed.whole, "fed_in_part_in_steps": one.fed.part}


class Served(NamedTuple):
    """What the application answers from."""

    batch: Batch
    tokenizer: Tokenizer
    model: dict[str, Any]
    """As /v1/models lists it; `id` is its name."""
    max_seconds: float
    max_body: int
    """Bytes of one request."""
    finder: CopyFinder | None = None
    """Of passages that stand in the training text; None: they are not looked for."""


class Piece(NamedTuple):
    """What one choice gained: text that is sure, and its tokens; with the last one, why it ended."""

    choice: int
    text: str
    tokens: list[dict[str, Any]]
    end: End | None


class Completion:
    """A request under way. Made in the event loop; the batch's thread adds pieces."""

    def __init__(self, request: CompletionRequest, prompts: list[list[int]], served: Served) -> None:
        """`prompts` in tokens."""
        self._request, self._served, self._tokenizer = request, served, served.tokenizer
        self.id, self._created = f"cmpl-{secrets.token_hex(12)}", int(time.time())
        self.seed = secrets.randbits(31) if request.seed is None else request.seed % 2**63
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[Piece] = asyncio.Queue()
        self._prompts = [ids for ids in prompts for _ in range(request.n or 1)]
        self._prompt_tokens = sum(map(len, prompts))
        self.generations = [self._generation(index, ids) for index, ids in enumerate(self._prompts)]

    def _generation(self, index: int, ids: list[int]) -> Generation:
        request, stop = self._request, self._request.stop
        reply = Reply(self._tokenizer, [stop] if isinstance(stop, str) else stop or [])
        held: list[dict[str, Any]] = []  # tokens whose text is not sure yet

        def give(text: str, end: End | None) -> None:
            tokens = [one for one in held if one["offset"] < reply.given_out or one["end"] <= reply.given_out]
            del held[: len(tokens)]
            if text or tokens or end:
                with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
                    self._loop.call_soon_threadsafe(self._pieces.put_nowait, Piece(index, text, tokens, end))

        def on_token(token: int, alternatives: Alternatives | None) -> bool:
            offset = reply.decoded
            text = reply.push(token)
            if alternatives is not None:
                held.append({"id": token, "offset": offset, "end": reply.decoded, "alternatives": alternatives})
            give(text, None)
            return reply.ended

        def on_end(end: End) -> None:
            give(reply.flush(), end)

        return Generation(
            ids,
            request.max_tokens or 16,
            on_token,
            on_end,
            temperature=1.0 if request.temperature is None else request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            seed=(self.seed + index) % 2**63,
            alternatives=request.logprobs,
            seconds=self._served.max_seconds,
        )

    async def pieces(self) -> AsyncIterator[Piece]:
        """All pieces up to the end of the last choice. Leaving it early ends what is under way.

        Raises:
            RefusedError: the batch failed (500).
        """
        running = len(self.generations)
        try:
            while running:
                piece = await self._pieces.get()
                if piece.end == "error":
                    raise RefusedError(500, "the model failed on this batch; the server's log says why")
                running -= piece.end is not None
                yield piece
        finally:
            self._served.batch.cancel(self.generations)

    async def whole(self) -> dict[str, Any]:
        """The answer once everything has been drawn."""
        texts = ["" for _ in self.generations]
        tokens: list[list[dict[str, Any]]] = [[] for _ in self.generations]
        ends: list[End | None] = [None for _ in self.generations]
        async for piece in self.pieces():
            texts[piece.choice] += piece.text
            tokens[piece.choice] += piece.tokens
            ends[piece.choice] = piece.end or ends[piece.choice]
        choices = [
            self._choice(index, self._echoed(index) + text, tokens[index], ends[index], await self._copied(index, text))
            for index, text in enumerate(texts)
        ]
        return {**self._answer(choices), "usage": self._usage()}

    async def stream(self) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        with_usage = bool(self._request.stream_options and self._request.stream_options.include_usage)
        more = {"usage": None} if with_usage else {}
        for index in range(len(self.generations)):
            if self._request.echo:
                yield _event({**self._answer([self._choice(index, self._echoed(index), [], None, {})]), **more})
        texts = ["" for _ in self.generations]
        try:
            async for piece in self.pieces():
                texts[piece.choice] += piece.text
                copied = await self._copied(piece.choice, texts[piece.choice]) if piece.end else {}
                choice = self._choice(piece.choice, piece.text, piece.tokens, piece.end, copied)
                yield _event({**self._answer([choice]), **more})
        except RefusedError as error:
            yield _event(error.body)
            return
        if with_usage:
            yield _event({**self._answer([]), "usage": self._usage()})
        yield "data: [DONE]\n\n"

    def _echoed(self, index: int) -> str:
        return self._tokenizer.decode(self._prompts[index]) if self._request.echo else ""

    def _answer(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        about = {"id": self.id, "object": "text_completion", "created": self._created}
        return {**about, "model": self._served.model["id"], "choices": choices, "seed": self.seed}

    def _usage(self) -> dict[str, int]:
        drawn = sum(generation.drawn for generation in self.generations)
        sums = {"prompt_tokens": self._prompt_tokens, "completion_tokens": drawn}
        return {**sums, "total_tokens": self._prompt_tokens + drawn}

    async def _copied(self, index: int, text: str) -> dict[str, Any]:
        """What a choice says of its copies; their places are counted from its first new character."""
        if self._served.finder is None or not self._request.mark_copied:
            return {}
        prompt = self._tokenizer.decode(self._prompts[index])
        copies = (await self._served.finder.find(prompt + text, after=len(prompt)))["copies"]
        begins = len(prompt)
        return {"copied": [{**one, "begin": one["begin"] - begins, "end": one["end"] - begins} for one in copies]}

    def _choice(
        self, index: int, text: str, tokens: list[dict[str, Any]], end: End | None, more: dict[str, Any]
    ) -> dict[str, Any]:
        reason = None if end is None else "stop" if end == "stop" else "length"
        logprobs = None if self._request.logprobs is None else self._logprobs(tokens)
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return choice if end is None else {**choice, "ended_by": end, **more}

    def _logprobs(self, tokens: list[dict[str, Any]]) -> dict[str, list[Any]]:
        return {
            "tokens": [self._spelled(one["id"]) for one in tokens],
            "token_logprobs": [one["alternatives"].drawn for one in tokens],
            "top_logprobs": [
                {self._spelled(token): value for token, value in one["alternatives"].likeliest} for one in tokens
            ],
            "text_offset": [one["offset"] for one in tokens],
        }

    def _spelled(self, token: int) -> str:
        """A token's text; as OpenAI does, "bytes:\\\\xe2\\\\x80" for one that is part of a character."""
        raw = self._tokenizer.token_bytes(token)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _event(tree: dict[str, Any]) -> str:
    return f"data: {json.dumps(tree, ensure_ascii=False)}\n\n"
