"""What may be asked of the server: OpenAI's completions, checked key by key, and refusals in OpenAI's form."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException

from chatgot.data.tokenizer import Tokenizer
from chatgot.errors import ConfigError, quoted

Number = Annotated[float, Field(allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0)]
StopText = Annotated[str, Field(min_length=1, max_length=200)]
MOST_ALTERNATIVES = 20
Body = TypeVar("Body", bound=BaseModel)


class RefusedError(HTTPException):
    """An answer that is an error: HTTP status, message, and the parameter that it is about."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(status, message, {"Retry-After": "1"} if status == 429 else None)
        self.param = param

    @property
    def body(self) -> dict[str, Any]:
        """In OpenAI's form."""
        kind = "invalid_request_error" if self.status_code < 500 else "server_error"
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.status_code}}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    include_obfuscation: bool | None = None
    """Accepted; nothing is added to a stream."""


class CompletionRequest(BaseModel):
    """The body of POST /v1/completions. A key that would be ignored is refused."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())
    model: str | None = None
    prompt: str | list[TokenId] | list[str] | list[list[TokenId]]
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = 1.0
    top_k: Annotated[int, Field(ge=1)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None
    echo: bool | None = False
    user: str | None = None
    best_of: int | None = None
    suffix: str | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    logit_bias: dict[str, Number] | None = None
    mark_copied: bool | None = False


class CopiedRequest(BaseModel):
    """The body of POST /v1/copied."""

    model_config = ConfigDict(extra="forbid", strict=True)
    text: str


def read_body(kind: type[Body], body: bytes) -> Body:
    """Check a request's body. Raises RefusedError (400) with the first thing that is wrong."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=True)[0]
        key = str(first["loc"][0]) if first["loc"] else None
        what = (
            f"{key} = {quoted(first['input'])}: " if key and first["type"] != "missing" else f"{key}: " if key else ""
        )
        raise RefusedError(400, f"{what}{first['msg']}", key) from None


def read_request(body: bytes, most_tokens: int) -> CompletionRequest:
    """Check a request for completions. Raises RefusedError (400) with the first thing that is wrong."""
    request = read_body(CompletionRequest, body)
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
