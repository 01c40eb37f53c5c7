"""Proof that what was exported computes what the run's model computes, on its own validation text."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from chatgot.config.run import ModelConfig
from chatgot.data.recorded import recorded_data
from chatgot.data.tokenizer import Tokenizer
from chatgot.errors import ChatGoTError, CheckpointError
from chatgot.model.gpt import GPT

logger = logging.getLogger(__name__)
WINDOWS = 64
LARGEST_DIFFERENCE = 1e-4
TIE = 1e-3
"""Two logits that are as close may change their order."""
Logits = Callable[[torch.Tensor], torch.Tensor]
"""(B, T) int64 -> (B, T, V) fp32."""


@dataclass(frozen=True)
class Parity:
    """How far two models are apart over the same windows."""

    largest: float
    """Largest absolute difference of a logit."""
    top_1: int
    """Positions whose likeliest token differs although the two best are more than TIE apart."""
    positions: int

    def required(self, what: str) -> str:
        """A line for the log. Raises CheckpointError where it is not close enough."""
        line = f"{what}: max |Δlogits| {self.largest:.2e} over {self.positions} positions"
        if not self.largest <= LARGEST_DIFFERENCE or self.top_1:  # NaN fails too
            allowed = f"allowed are {LARGEST_DIFFERENCE:g} and the same likeliest token"
            raise CheckpointError(f"{line}, {self.top_1} other likeliest tokens; {allowed}: nothing was exported")
        return line


@torch.no_grad()
def compare(ours: Logits, theirs: Logits, windows: torch.Tensor) -> Parity:
    """Hold two models against each other on windows (n, T)."""
    largest = torch.zeros(())
    other = 0
    for window in windows:
        one, two = ours(window[None])[0], theirs(window[None])[0].float()  # (T, V)
        if one.shape != two.shape:
            raise CheckpointError(f"logits of shape {tuple(two.shape)}, ours are {tuple(one.shape)}")
        largest = torch.maximum(largest, (one - two).abs().max())  # keeps NaN
        best = one.topk(min(2, one.shape[-1]), dim=-1).values
        apart = best[:, 0] - best[:, -1] > TIE
        other += int((apart & (one.argmax(-1) != two.argmax(-1))).sum())
    return Parity(float(largest), other, windows.numel())


def transformers_logits(folder: Path) -> Logits | None:
    """The folder as transformers loads it, in fp32; None where transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return None
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    return lambda ids: model(ids).logits


def check_tokenizer(folder: Path, tokenizer: Tokenizer, texts: Sequence[str]) -> str:
    """Encode and decode the texts with the exported tokenizer. Raises CheckpointError where anything differs."""
    if importlib.util.find_spec("transformers") is not None:
        from transformers import AutoTokenizer

        theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        what, encode, decode = "AutoTokenizer", theirs.encode, theirs.decode
    elif importlib.util.find_spec("tokenizers") is not None:
        import tokenizers

        library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        what, encode, decode = "the library tokenizers", lambda text: library.encode(text).ids, library.decode
    else:
        return "the exported tokenizer was not compared: neither transformers nor tokenizers is installed"
    for text in texts:
        ids = list(encode(text))
        if ids != tokenizer.encode(text).tolist() or decode(ids) != text:
            raise CheckpointError(f"{what} does not encode and decode {text[:60]!r} as the run does: nothing exported")
    return f"{what}: the same tokens, and the same text back, for {sum(map(len, texts))} characters"


def windows_of(
    run: Path, fingerprint: str, tokenizer: Tokenizer, length: int, data: str | None
) -> tuple[torch.Tensor, list[str]]:
    """At most WINDOWS windows (n, T) of validation text, and their texts; random tokens, with a warning, where the
    text cannot be had. See `recorded_data`.
    """
    try:
        tokens = recorded_data(run, fingerprint, data)[1].val
        starts = np.linspace(0, len(tokens) - length, min(WINDOWS, len(tokens) // length)).astype(np.int64)
        windows = torch.from_numpy(np.stack([tokens[start : start + length] for start in starts]).astype(np.int64))
    except ChatGoTError as error:
        if data is not None:
            raise
        logger.warning(f"compared on random tokens, the validation text cannot be had: {error}; --data names it")
        generator = torch.Generator().manual_seed(0)
        windows = torch.randint(tokenizer.vocab_size, (WINDOWS, length), generator=generator)
    # A window can begin or end within a character.
    texts = [tokenizer.decode(row.numpy()) for row in windows]
    return windows, [text for text in texts if "\ufffd" not in text]


def model_logits(model: GPT) -> Logits:
    """Our model's."""
    return lambda ids: model(ids).float()


def with_weights(config: ModelConfig, vocab_size: int, weights: dict[str, torch.Tensor]) -> GPT:
    """Our model made of these tensors, without copies of them; a tied head is its embedding."""
    with torch.device("meta"):
        model = GPT(config, vocab_size)
    if config.tie_embeddings:
        weights = weights | {"lm_head.weight": weights["embed_tokens.weight"]}
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()
