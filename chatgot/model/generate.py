"""Sampling from a GPT. Works on token ids only; text and DeepSpeed live elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from chatgot.errors import NumericsError
from chatgot.model.gpt import GPT
from chatgot.model.kv_cache import KVCache

NOT_FINITE = -1
"""In place of a token that cannot be drawn."""


def generate(
    model: nn.Module,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: Callable[[Sequence[int]], bool] | None = None,
    use_cache: bool = True,
    on_token: Callable[[int, int], None] | None = None,
    agree: Callable[[bool], bool] | None = None,
    max_seq_length: int | None = None,
) -> list[list[int]]:
    """Continue each row of input_ids.

    A row's tokens depend on its prompt, the settings and seed + row only: not on the other rows, not on `use_cache`,
    not on the global random state, which stays untouched like the training mode of every module. Texts longer than the
    context slide: see `context_start`.

    Under ZeRO-3 every forward is a collective, so all ranks must call the model equally often, however long their
    prompts are and however early their rows stop; their numbers of rows may differ too. Each turn of the loop is one
    forward (the whole context, or one token after a cache) and one call of `agree(done here)`, and the loop ends when
    agree, reducing by AND over the ranks, returns True. A rank that is done forwards a dummy token until then.

    Args:
        model: a GPT, or a module that wraps one and is called like it (DeepSpeedEngine, a compiled module).
        input_ids: (B, P) int64 with P >= 1, on the model's device.
        max_new_tokens: tokens per row, where `stop` doesn't end it before.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample from the k likeliest tokens only (more than the vocabulary: all of it).
        top_p: sample from the smallest set of likeliest tokens with this probability, after temperature and top_k.
        seed: row i draws from its own generator, seeded seed + i.
        stop: given a row's new tokens after each of them, whether the row ends there (the last token stays).
        use_cache: keep keys and values; without it the whole context is computed for each token.
        on_token: called with (row, token) as soon as a token is drawn.
        agree: given whether all rows here are done, returns whether all ranks are. None: this rank decides alone.
        max_seq_length: a context shorter than the model's.

    Returns:
        The new tokens of each row.

    Raises:
        ValueError: a value outside its range, or an empty prompt.
        NumericsError: logits that are not finite.
    """
    gpt = next((m for m in model.modules() if isinstance(m, GPT)), None)
    if gpt is None:
        raise ValueError(f"{type(model).__name__} contains no GPT")
    check_settings(max_new_tokens, temperature, top_k, top_p)
    if input_ids.ndim != 2 or input_ids.shape[0] < 1 or input_ids.shape[1] < 1:
        allowed = "expected (rows, tokens), one of each at least (an empty prompt?)"
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: {allowed}")
    window = gpt.config.max_seq_length if max_seq_length is None else max_seq_length
    if not 1 <= window <= gpt.config.max_seq_length:
        raise ValueError(f"max_seq_length = {window}: must be between 1 and the model's {gpt.config.max_seq_length}")

    rows, prompt_length = input_ids.shape
    chances = torch.stack([uniforms(seed + row, max_new_tokens) for row in range(rows)]).to(input_ids.device)
    new_ids: list[list[int]] = [[] for _ in range(rows)]
    running = [True] * rows
    text = torch.cat([input_ids, input_ids.new_zeros(rows, max_new_tokens)], dim=1)  # (B, P + max_new_tokens)
    cache = KVCache(gpt.config, rows) if use_cache else None
    cached_start = -1  # where the cached context begins in the text; -1: nothing is cached

    # Inference mode is a quarter cheaper per operation than no_grad, but what ZeRO-3 gathers in it could train no more.
    with torch.inference_mode() if model is gpt else torch.no_grad(), _evaluating(model):
        for length in range(prompt_length, prompt_length + max_new_tokens):
            start = context_start(length, window)
            first = start
            if cache is not None:
                if start == cached_start:
                    first = length - 1
                else:
                    cache.length, cached_start = 0, start
            logits = model(text[:, first:length], cache=cache, last_only=True)  # (B, 1, V)
            tokens = draw(logits[:, -1].float(), temperature, top_k, top_p, chances[:, length - prompt_length])
            text[:, length] = tokens  # a row that has ended goes on; nobody reads what follows
            drawn = tokens.tolist()  # the only thing that a GPU is waited for
            if NOT_FINITE in drawn:
                raise NumericsError(f"sampling: logits after {length} tokens are not finite; the weights have diverged")
            for row in range(rows):
                if not running[row]:
                    continue
                new_ids[row].append(drawn[row])
                if on_token is not None:
                    on_token(row, drawn[row])
                running[row] = len(new_ids[row]) < max_new_tokens and not (stop is not None and stop(new_ids[row]))
            done = not any(running)
            if agree(done) if agree is not None else done:
                return new_ids
            if done:
                break
        while True:  # done here, and other ranks are not: go on with dummy forwards
            model(text[:1, :1], last_only=True)
            assert agree is not None
            if agree(True):
                return new_ids


def context_start(length: int, max_seq_length: int) -> int:
    """First token of the context that predicts the token after `length` others.

    A pure function of the length, so that a cache changes nothing: 0 while the text fits, then it hops forward by a
    quarter of the context whenever that is full. A hop costs one pass over the context, as positions count from the
    start, and every token sees about three quarters of it at least.
    """
    if length <= max_seq_length:
        return 0
    hop = max(1, max_seq_length // 4)
    return -(-(length - max_seq_length) // hop) * hop


def uniforms(seed: int, count: int) -> Tensor:
    """What the next `count` tokens of a row are drawn with, (count,) float64 in [0, 1), on the CPU."""
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def draw(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, uniforms: Tensor) -> Tensor:
    """Draw a token for each row of logits (B, V) fp32, on their device; the settings are those of `generate`.

    Args:
        uniforms: (B,) float64 in [0, 1), where the inverse of the cumulative distribution is read.

    Returns:
        Tokens (B,) int64; NOT_FINITE for a row whose logits are not finite.
    """
    finite = torch.isfinite(logits).all(-1)
    if temperature < torch.finfo(logits.dtype).tiny:  # 0, or too small to divide by
        return logits.argmax(-1).where(finite, NOT_FINITE)
    # <= 0, so a small temperature underflows instead of overflowing
    scaled, tokens = (logits - logits.amax(-1, keepdim=True)) / temperature, None
    if top_k is not None or top_p is not None:
        scaled, tokens = scaled.sort(descending=True, stable=True)  # ties: the lower token id first
        scaled = scaled[:, :top_k]
    sums = scaled.double().softmax(-1).cumsum(-1)  # (B, V or k)
    end = sums[:, -1:]
    if top_p is not None:  # up to the first token with which they make top_p
        end = sums.gather(-1, torch.searchsorted(sums, end * top_p).clamp(max=sums.shape[-1] - 1))
    picked = torch.searchsorted(sums, end * uniforms[:, None], right=True).clamp(max=sums.shape[-1] - 1)  # (B, 1)
    return (picked if tokens is None else tokens.gather(-1, picked))[:, 0].where(finite, NOT_FINITE)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards each module's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def check_settings(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError, naming it, for a setting of `generate` outside its range."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens}: must be at least 1")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature = {temperature}: must be a finite number >= 0 (0: the likeliest token)")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k = {top_k}: must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p = {top_p}: must be > 0 and <= 1")
