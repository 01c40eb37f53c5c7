"""OpenAI's completions over a batch: what a request may ask, and the answers, whole or as a stream.

Beyond OpenAI's keys: `top_k`, `seed` in every answer, and `ended_by` beside `finish_reason`, which has no word for
a limit of time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from chatgot.data.tokenizer import Tokenizer
from chatgot.errors import ConfigError, quoted
from chatgot.inference.batching import Alternatives, Batch, End, Generation
from chatgot.inference.reply import Reply

Number = Annotated[float, Field(allow_inf_nan=False, strict=True)]
Whole = Annotated[int, Field(strict=True)]
TokenId = Annotated[int, Field(strict=True, ge=0)]
Text = Annotated[str, Field(strict=True)]
StopText = Annotated[str, Field(strict=True, min_length=1, max_length=200)]
MOST_ALTERNATIVES = 20


class RefusedError(Exception):
    """An answer that is an error: HTTP status, message, and the parameter that it is about."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param

    @property
    def body(self) -> dict[str, Any]:
        """In OpenAI's form."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.status}}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    include_obfuscation: bool | None = None
    """Accepted; nothing is added to a stream."""


class CompletionRequest(BaseModel):
    """The body of POST /v1/completions. A key that would be ignored is refused."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    model: Text | None = None
    prompt: Text | list[TokenId] | list[Text] | list[list[TokenId]]
    max_tokens: Annotated[int, Field(strict=True, ge=1)] | None = 16
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = 1.0
    top_k: Annotated[int, Field(strict=True, ge=1)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(strict=True, ge=1, le=128)] | None = 1
    seed: Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    stream: Annotated[bool, Field(strict=True)] | None = False
    stream_options: StreamOptions | None = None
    logprobs: Annotated[int, Field(strict=True, ge=0, le=MOST_ALTERNATIVES)] | None = None
    echo: Annotated[bool, Field(strict=True)] | None = False
    user: Text | None = None
    best_of: Whole | None = None
    suffix: Text | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    logit_bias: dict[str, Number] | None = None


def read_request(body: bytes, most_tokens: int) -> CompletionRequest:
    """Check a request's body. Raises RefusedError (400) with the first thing that is wrong."""
    try:
        request = CompletionRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=True)[0]
        key = str(first["loc"][0]) if first["loc"] else None
        what = (
            f"{key} = {quoted(first['input'])}: " if key and first["type"] != "missing" else f"{key}: " if key else ""
        )
        raise RefusedError(400, f"{what}{first['msg']}", key) from None
    for key in ("suffix", "presence_penalty", "frequency_penalty", "logit_bias"):
        if getattr(request, key):
            raise RefusedError(400, f"{key}: is not supported; leave it out", key)
    if request.best_of not in (None, request.n or 1):
        raise RefusedError(400, f"best_of = {request.best_of}: is not supported beyond n = {request.n or 1}", "best_of")
    if request.echo and request.logprobs is not None:
        raise RefusedError(400, "echo with logprobs: probabilities of the prompt are not supported", "echo")
    if (request.max_tokens or 16) > most_tokens:
        raise RefusedError(400, f"max_tokens = {request.max_tokens}: at most {most_tokens} here", "max_tokens")
    return request


def read_prompts(request: CompletionRequest, tokenizer: Tokenizer) -> list[list[int]]:
    """Tokens of each prompt. Raises RefusedError (400) for one that is empty or cannot be encoded."""
    given = request.prompt
    prompts: list[Any] = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
    found: list[list[int]] = []
    for prompt in prompts:
        try:
            ids = tokenizer.encode_prompt(prompt).tolist() if isinstance(prompt, str) else list(prompt)
        except ConfigError as error:
            raise RefusedError(400, str(error), "prompt") from None
        if wrong := [token for token in ids if token >= tokenizer.vocab_size]:
            vocabulary = f"the vocabulary has {tokenizer.vocab_size}"
            raise RefusedError(400, f"prompt: token {wrong[0]} does not exist, {vocabulary}", "prompt")
        if not ids:
            raise RefusedError(400, "prompt: is empty; give the beginning of a text", "prompt")
        found.append(ids)
    if not found:
        raise RefusedError(400, "prompt: is an empty list; give the beginning of a text", "prompt")
    return found


class Piece(NamedTuple):
    """What one choice gained: text that is sure, and its tokens; with the last one, why it ended."""

    choice: int
    text: str
    tokens: list[dict[str, Any]]
    end: End | None


class Completion:
    """A request under way. Made in the event loop; the batch's thread adds pieces."""

    def __init__(
        self, request: CompletionRequest, prompts: list[list[int]], tokenizer: Tokenizer, name: str, seconds: float
    ) -> None:
        """`prompts` in tokens; `seconds` from now to the end of them all."""
        self._request, self._tokenizer = request, tokenizer
        self.id, self._created, self._name = f"cmpl-{secrets.token_hex(12)}", int(time.time()), name
        self.seed = secrets.randbits(31) if request.seed is None else request.seed % 2**63
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[Piece] = asyncio.Queue()
        self._prompts = [ids for ids in prompts for _ in range(request.n or 1)]
        self._prompt_tokens = sum(map(len, prompts))
        self.generations = [
            self._generation(
                index,
                ids,
                temperature=1.0 if request.temperature is None else request.temperature,
                top_k=request.top_k,
                top_p=request.top_p,
                seed=(self.seed + index) % 2**63,
                alternatives=request.logprobs,
                seconds=seconds,
            )
            for index, ids in enumerate(self._prompts)
        ]

    def _generation(self, index: int, ids: list[int], **settings: Any) -> Generation:
        stop = self._request.stop
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

        return Generation(ids, self._request.max_tokens or 16, on_token, on_end, **settings)

    async def pieces(self, batch: Batch) -> AsyncIterator[Piece]:
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
            batch.cancel(self.generations)

    async def whole(self, batch: Batch) -> dict[str, Any]:
        """The answer once everything has been drawn."""
        texts = ["" for _ in self.generations]
        tokens: list[list[dict[str, Any]]] = [[] for _ in self.generations]
        ends: list[End | None] = [None for _ in self.generations]
        async for piece in self.pieces(batch):
            texts[piece.choice] += piece.text
            tokens[piece.choice] += piece.tokens
            ends[piece.choice] = piece.end or ends[piece.choice]
        choices = [
            self._choice(index, self._echoed(index) + texts[index], tokens[index], ends[index])
            for index in range(len(self.generations))
        ]
        return {**self._answer(choices), "usage": self._usage()}

    async def stream(self, batch: Batch) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        with_usage = bool(self._request.stream_options and self._request.stream_options.include_usage)
        more = {"usage": None} if with_usage else {}
        for index in range(len(self.generations)):
            if self._request.echo:
                yield _event({**self._answer([self._choice(index, self._echoed(index), [], None)]), **more})
        try:
            async for piece in self.pieces(batch):
                choice = self._choice(piece.choice, piece.text, piece.tokens, piece.end)
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
        about = {"id": self.id, "object": "text_completion", "created": self._created, "model": self._name}
        return {**about, "choices": choices, "seed": self.seed}

    def _usage(self) -> dict[str, int]:
        drawn = sum(generation.drawn for generation in self.generations)
        sums = {"prompt_tokens": self._prompt_tokens, "completion_tokens": drawn}
        return {**sums, "total_tokens": self._prompt_tokens + drawn}

    def _choice(self, index: int, text: str, tokens: list[dict[str, Any]], end: End | None) -> dict[str, Any]:
        reason = None if end is None else "stop" if end == "stop" else "length"
        logprobs = None if self._request.logprobs is None else self._logprobs(tokens)
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return choice if end is None else {**choice, "ended_by": end}

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
