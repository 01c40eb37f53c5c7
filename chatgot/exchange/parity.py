"""Proof that a folder in transformers' layout computes what a model of ours computes, on validation text."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from chatgot.config.run import ModelConfig
from chatgot.data.prepare import recorded_data
from chatgot.data.tokenizer import Tokenizer
from chatgot.errors import ChatGoTError, CheckpointError
from chatgot.model.gpt import GPT

logger = logging.getLogger(__name__)
WINDOWS = 64
TOGETHER = 128
"""Tokens of a forward."""
LARGEST_DIFFERENCE = 1e-4
OF_THE_LARGEST = 1e-5
"""Of the largest logit: where that is beyond 10, as in published models, fp32 rounds that much."""
TIE = 1e-3
"""Two logits that are as close may change their order."""
Logits = Callable[[torch.Tensor], torch.Tensor]
"""(B, T) int64 -> (B, T, V)."""


def prove(
    folder: Path,
    ours: Logits,
    tokenizer: Tokenizer,
    windows: torch.Tensor,
    what: str,
    instead: str = "nothing was exported",
    back: bool = True,
) -> list[str]:
    """Hold transformers' model and tokenizer of a folder against ours on windows (n, T); returns lines for the log.

    Args:
        what: names the model that is compared; `instead`: what happens where it differs.
        back: whether the tokenizer must decode as we do too: folders of others may be set to tidy spaces up.

    Raises:
        CheckpointError: they differ.
    """
    lines = []
    if (theirs := transformers_logits(folder)) is not None:
        lines.append(compare(ours, theirs, windows, what, instead))
    else:
        logger.warning("transformers is not installed: its own model was not compared (pip install transformers)")
    texts = [tokenizer.decode(row.numpy()) for row in windows]
    whole = [text for text in texts if "\ufffd" not in text]  # a window can begin or end within a character
    return [*lines, check_tokenizer(folder, tokenizer, whole, instead, back)]


@torch.no_grad()
def compare(ours: Logits, theirs: Logits, windows: torch.Tensor, what: str, instead: str) -> str:
    """Hold two models against each other; see `prove`.

    Raises:
        CheckpointError: logits are too far apart, or the likeliest token is another one although the two best are more
            than TIE apart.
    """
    largest = scale = torch.zeros(())
    other = 0
    for few in windows.split(max(1, TOGETHER // windows.shape[1])):
        one, two = ours(few).float().flatten(0, 1), theirs(few).float().flatten(0, 1)  # (n T, V)
        largest = torch.maximum(largest, (one - two).abs().max())  # keeps NaN
        scale = torch.maximum(scale, one.abs().max())
        best = one.topk(min(2, one.shape[-1]), dim=-1).values
        apart = best[:, 0] - best[:, -1] > TIE
        other += int((apart & (one.argmax(-1) != two.argmax(-1))).sum())
    line = f"{what}: max |Δlogits| {float(largest):.2e} over {windows.numel()} positions"
    most = max(LARGEST_DIFFERENCE, OF_THE_LARGEST * float(scale))
    if not float(largest) <= most or other:  # NaN fails too
        allowed = f"allowed are {most:.1e} and the same likeliest token"
        raise CheckpointError(f"{line}, {other} other likeliest tokens; {allowed}: {instead}")
    return line


def transformers_logits(folder: Path) -> Logits | None:
    """The folder as transformers loads it, in fp32; None where transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return None
    from transformers import AutoModelForCausalLM

    how: dict[str, Any] = {"dtype": "auto", "local_files_only": True}  # as it stands in the files, which stay mapped
    how |= {"trust_remote_code": False, "use_safetensors": True}
    model = AutoModelForCausalLM.from_pretrained(folder, **how).eval()
    own = dict(model.named_parameters(remove_duplicate=False))
    read_while_used(model, lambda name: own[name].float())
    return lambda ids: model(ids).logits


def check_tokenizer(folder: Path, tokenizer: Tokenizer, texts: Sequence[str], instead: str, back: bool) -> str:
    """Encode and decode the texts with the folder's tokenizer; see `prove`."""
    if importlib.util.find_spec("transformers") is not None:
        from transformers import AutoTokenizer

        theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        what, decode, encode = "AutoTokenizer", theirs.decode, theirs.encode
    elif importlib.util.find_spec("tokenizers") is not None:
        import tokenizers

        library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        what, decode = "the library tokenizers", lambda ids: library.decode(ids, skip_special_tokens=False)
        encode = lambda text, add_special_tokens: library.encode(text, add_special_tokens=add_special_tokens).ids  # noqa: E731
    else:
        return "the folder's tokenizer was not compared: neither transformers nor tokenizers is installed"
    for text in texts:
        ids = list(encode(text, add_special_tokens=False))
        if ids != tokenizer.encode(text).tolist() or (back and decode(ids) != text):
            raise CheckpointError(f"{what} does not encode and decode {text[:60]!r} as we do: {instead}")
    same = ", and the same text back" if back else ""
    return f"{what}: the same tokens{same}, for {sum(map(len, texts))} characters"


def windows_of(run: Path, fingerprint: str, vocab_size: int, length: int, data: str | None) -> torch.Tensor:
    """At most WINDOWS windows (n, T) of validation text; random tokens, with a warning, where it cannot be had. See
    `recorded_data`.
    """
    try:
        return evenly(recorded_data(run, fingerprint, data)[1].val, length, WINDOWS)
    except ChatGoTError as error:
        if data is not None:
            raise
        logger.warning(f"compared on random tokens, the validation text cannot be had: {error}; --data names it")
        return torch.randint(vocab_size, (WINDOWS, length), generator=torch.Generator().manual_seed(0))


def evenly(tokens: np.ndarray, length: int, most: int) -> torch.Tensor:
    """At most so many windows (n, length) int64 of tokens (N,), at even distances."""
    starts = np.linspace(0, len(tokens) - length, min(most, len(tokens) // length)).astype(np.int64)
    return torch.from_numpy(np.stack([tokens[start : start + length] for start in starts]).astype(np.int64))


def read_while_used(model: nn.Module, read: Callable[[str], torch.Tensor]) -> None:
    """Let a module have its parameters only while it runs, so that one of them is in memory at a time.

    Args:
        read: gives the parameter of a name, fp32.
    """
    for prefix, module in model.named_modules(remove_duplicate=False):
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue

        def take(module: nn.Module, _: Any, prefix: str = prefix, names: tuple[str, ...] = tuple(own)) -> None:
            for name in names:
                module._parameters[name] = nn.Parameter(read(f"{prefix}.{name}"), requires_grad=False)

        def give_back(module: nn.Module, _: Any, __: Any, own: dict[str, nn.Parameter] = own) -> None:
            module._parameters.update(own)

        module.register_forward_pre_hook(take)
        module.register_forward_hook(give_back)


def read_logits(config: ModelConfig, vocab_size: int, read: Callable[[str], torch.Tensor]) -> Logits:
    """Our model's, its parameters read by name while they are used; a tied head is its embedding."""
    with torch.device("meta"):
        model = GPT(config, vocab_size).eval()
    tied = {"lm_head.weight": "embed_tokens.weight"} if config.tie_embeddings else {}
    read_while_used(model, lambda name: read(tied.get(name, name)))
    return model
