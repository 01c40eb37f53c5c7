"""Samples at a cadence: the prompts are shared out over the ranks, and every rank stays in step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from chatgot.config.run import TrainConfig
from chatgot.data.tokenizer import Tokenizer
from chatgot.distributed import ControlGroup
from chatgot.errors import ConfigError
from chatgot.model.generate import generate


@dataclass(frozen=True)
class Sample:
    """One prompt with its continuation."""

    prompt: str
    text: str


def usable_prompts(prompts: tuple[str, ...], tokenizer: Tokenizer, fallback: str) -> tuple[list[str], list[str]]:
    """Prompts that the tokenizer can encode, and notes. One with characters that the text never had is replaced by
    `fallback`.
    """
    usable, notes = [], []
    for prompt in prompts:
        try:
            if len(tokenizer.encode_prompt(prompt)) == 0:
                raise ConfigError("it is empty")
            usable.append(prompt)
        except ConfigError as error:
            notes.append(f"train.sample_prompts: {prompt!r} is replaced by {fallback!r} from the text: {error}")
            usable.append(fallback)
    return list(dict.fromkeys(usable)), notes


def draw(
    engine, prompts: list[str], tokenizer: Tokenizer, config: TrainConfig, max_seq_length: int, ranks: ControlGroup
) -> list[Sample]:
    """Continue every prompt. Collective; all samples on every rank.

    Under ZeRO-3 every forward gathers weights from all ranks, so all ranks run the same number of rounds and, within a
    round, the same number of forwards: `agree` ends a round when the last rank is done, and a rank without a prompt
    goes along with a dummy.
    """
    was_training = engine.module.training
    engine.module.eval()
    mine: list[tuple[int, Sample]] = []
    for first in range(0, len(prompts), ranks.world_size):
        index = first + ranks.rank
        prompt = prompts[index] if index < len(prompts) else None
        ids = np.zeros(1, dtype=np.int64) if prompt is None else tokenizer.encode_prompt(prompt).astype(np.int64)
        with torch.compiler.set_stance(
            "force_eager"
        ):  # a compiled model would be compiled anew for every length of the cache
            [new] = generate(
                engine.module,
                torch.from_numpy(ids)[None].to(engine.device),
                config.sample_max_new_tokens if prompt is not None else 1,
                temperature=config.sample_temperature,
                top_k=config.sample_top_k,
                seed=config.sample_seed + index,
                stop=_stop(tokenizer, config.sample_stop),
                agree=lambda done: not ranks.any(not done)[0],
                max_seq_length=max_seq_length,
            )
        if prompt is not None:
            mine.append((index, Sample(prompt, tokenizer.decode(new))))
    engine.module.train(was_training)
    found = sorted(pair for part in ranks.gather([(i, s.prompt, s.text) for i, s in mine]) for pair in part)
    return [Sample(prompt, text) for _, prompt, text in found]


def path(folder: Path, step: int) -> Path:
    """samples/step-000500.txt of the run folder."""
    return folder / f"step-{step:06d}.txt"


def as_text(samples: list[Sample]) -> str:
    """What the file holds."""
    return "\n\n".join(f"=== {s.prompt!r}\n{s.prompt}{s.text}" for s in samples) + "\n"


def write(path: Path, text: str) -> None:
    """Write the file, and its folder if need be. Raises OSError."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _stop(tokenizer: Tokenizer, text: str | None):
    if text is None:
        return None
    return lambda ids: text in tokenizer.decode(ids[-4 * len(text) - 8 :])
