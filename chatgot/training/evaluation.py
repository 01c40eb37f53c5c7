"""What a run shows of itself while it trains: the loss over the whole held-out split, and samples."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from chatgot.config.run import TrainConfig
from chatgot.data.copies import covered, search
from chatgot.data.loader import IGNORE_INDEX, Batch
from chatgot.data.prepared import PreparedData
from chatgot.data.tokenizer import Tokenizer
from chatgot.distributed import ControlGroup
from chatgot.errors import ConfigError, NumericsError
from chatgot.files import write_atomically
from chatgot.model.generate import generate

Sample = tuple[str, str]
"""A prompt and its continuation."""
SEARCHED_TOKENS = 20_000_000
"""Of the training split, from its beginning, in which copies in samples are looked for: a fraction of a second."""
_EFFORT = 2_000_000
_APART = "\U0010ffff"
"""Between two samples: no character, so that it stands in no text."""


class Interrupted(Exception):
    """The run is asked to stop, on all ranks, while it shows something of itself."""


def evaluate(
    engine: Any, batches: Iterable[Batch], device: torch.device, between: Callable[[], object] = lambda: None
) -> float:
    """Mean loss over every target token of `batches`, on all ranks, in nats.

    Collective: every rank must have as many batches, because ZeRO-3 gathers in forward. Leaves training mode and the
    random state as they were, also when `between`, which is called after every batch, raises: nothing is drawn in
    evaluation mode.
    """
    was_training = engine.training
    engine.eval()
    total = torch.zeros(2, dtype=torch.float64)
    try:
        for input_ids, targets in batches:
            with torch.no_grad():
                loss = engine(input_ids.to(device), targets.to(device), reduction="sum")
            total += torch.tensor([float(loss), int((targets != IGNORE_INDEX).sum())], dtype=torch.float64)
            between()
    finally:
        engine.train(was_training)
    if dist.get_world_size() > 1:
        shared = total.to(device)
        dist.all_reduce(shared)
        total = shared.cpu()
    return float(total[0] / total[1])


def usable_prompts(prompts: tuple[str, ...], data: PreparedData) -> tuple[list[str], list[str]]:
    """Prompts that the tokenizer can encode, and notes. One with unseen characters is replaced by one from the text."""
    start = data.tokenizer.decode(data.val[:64].tolist()).strip()
    fallback = (start.split("\n")[0] or data.tokenizer.decode(data.val[:1].tolist()))[:24]
    usable, notes = [], []
    for prompt in prompts:
        try:
            if len(data.tokenizer.encode_prompt(prompt)) == 0:
                raise ConfigError("it is empty")
            usable.append(prompt)
        except ConfigError as error:
            notes.append(f"train.sample_prompts: {prompt!r} is replaced by {fallback!r} from the text: {error}")
            usable.append(fallback)
    return list(dict.fromkeys(usable)), notes


def draw(
    engine: Any,
    prompts: list[str],
    tokenizer: Tokenizer,
    config: TrainConfig,
    max_seq_length: int,
    ranks: ControlGroup,
    goes_on: Callable[[bool], bool] | None = None,
) -> list[Sample]:
    """Continue every prompt. Collective; all samples on every rank.

    Under ZeRO-3 every forward gathers weights from all ranks, so all ranks run the same number of rounds and, within a
    round, the same number of forwards: `goes_on` ends a round when the last rank is done, and a rank without a prompt,
    or whose logits are not finite, goes along with a dummy.

    Args:
        goes_on: shares, after every token, whether this rank has more to draw: whether any has. May raise on all.

    Raises:
        NumericsError: on all ranks; logits are not finite on one of them.
    """
    module, stop, failed = engine.module, config.sample_stop, None
    was_training, goes_on = module.training, goes_on or (lambda more: ranks.any(more)[0])
    mine: list[tuple[int, str, str]] = []
    module.eval()
    try:
        for first in range(0, len(prompts), ranks.world_size):
            index = first + ranks.rank
            prompt = prompts[index] if index < len(prompts) else None
            ids = np.zeros(1, dtype=np.int64) if prompt is None else tokenizer.encode_prompt(prompt).astype(np.int64)
            tokens = torch.from_numpy(ids)[None].to(engine.device)
            try:
                with torch.compiler.set_stance("force_eager"):  # else it compiles anew for every length of the cache
                    [new] = generate(
                        module,
                        tokens,
                        config.sample_max_new_tokens if prompt is not None else 1,
                        temperature=config.sample_temperature,
                        top_k=config.sample_top_k,
                        seed=config.sample_seed + index,
                        stop=(lambda new: stop in tokenizer.decode(new[-4 * len(stop) - 8 :])) if stop else None,
                        agree=lambda done: not goes_on(not done),
                        max_seq_length=max_seq_length,
                    )
                if prompt is not None:
                    mine.append((index, prompt, tokenizer.decode(new)))
            except NumericsError as error:
                failed = error
                with torch.no_grad():
                    while goes_on(False):
                        module(tokens[:, :1], last_only=True)
    finally:
        module.train(was_training)
    ranks.agree(failed)
    return [(prompt, text) for _, prompt, text in sorted(one for share in ranks.gather(mine) for one in share)]


@dataclass(frozen=True)
class Copied:
    """What samples have verbatim from the training text."""

    passages: list[list[tuple[int, int]]]
    """Begin and end in each continuation."""
    metrics: dict[str, float]
    searched_tokens: int


def copied(samples: list[Sample], data: PreparedData) -> Copied:
    """Look for what the model itself wrote in the first SEARCHED_TOKENS of the training split.

    Raises:
        ConfigError: the library ahocorasick_rs is missing.
    """
    written = [continued for _, continued in samples]
    found, searched = search(_APART.join(written), data, most=SEARCHED_TOKENS, effort=_EFFORT)
    begins = list(itertools.accumulate((len(one) + 1 for one in written), initial=0))
    passages: list[list[tuple[int, int]]] = [[] for _ in written]
    for one in found:
        index = bisect_right(begins, one.begin) - 1
        passages[index].append((one.begin - begins[index], one.end - begins[index]))
    characters, longest = sum(map(len, written)), max((one.end - one.begin for one in found), default=0)
    share = covered((one.begin, one.end) for one in found) / characters if characters else 0.0
    return Copied(passages, {"sample/copied_fraction": share, "sample/longest_copy": longest}, searched)


def write_samples(path: Path, text: str) -> None:
    """Write the file, and its folder if need be. Raises OSError."""
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, text)
