"""The smaller micro-batch of a run whose memory was not enough: computed, stored in the run folder, read by the next
start.

`micro_batch.json` holds the micro-batch to use, the one that the JSON asked for at the time (or "auto"), the reason, and
the attempt that ran out of memory. `launch/run` starts the ranks again by itself where
the attempt is its own.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import chatgot.run_folder as run_folder
from chatgot.deepspeed_json.batch import ACCUMULATION, MICRO
from chatgot.deepspeed_json.resolve import EngineConfig
from chatgot.errors import ChatGoTError, MachineError, RunAgainError
from chatgot.files import write_atomically
from chatgot.launcher.command import ATTEMPT
from chatgot.plan.request import less_memory, words


@dataclass(frozen=True)
class Stored:
    """What micro_batch.json says."""

    micro_batch: int
    json: int | Literal["auto"]
    """What the JSON came to by itself."""
    reason: str
    attempt: str | None = None
    """The start of the ranks that ran out of memory; None: nothing did, or nobody names starts."""
    key: str | None = None
    """For "auto": hash of the settings that the micro-batch was found for."""

    def store(self, out_dir: Path) -> None:
        """Replace the file. Ranks that do so together write the same."""
        write_atomically(out_dir / run_folder.MICRO_BATCH, json.dumps(dataclasses.asdict(self), indent=2) + "\n")


def read(out_dir: Path) -> Stored | None:
    """The file's content; None where there is none, or a damaged one, which costs a few probes or another restart."""
    try:
        fields = json.loads((out_dir / run_folder.MICRO_BATCH).read_text(encoding="utf-8"))
        return Stored(
            int(fields["micro_batch"]),
            fields.get("json", "auto"),
            str(fields["reason"]),
            **{name: fields.get(name) for name in ("attempt", "key")},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def stored(out_dir: Path, json_value: int | str, samples_per_rank: int) -> tuple[int, str] | None:
    """The micro-batch that an earlier start left for this one, and why.

    Args:
        json_value: the micro-batch that the JSON comes to by itself, or "auto".
        samples_per_rank: of one optimizer step.

    Returns:
        None where nothing is stored, or for another value of the JSON.
    """
    known = read(out_dir)
    if known is None or known.json != json_value:
        return None
    return largest_divisor(samples_per_rank, known.micro_batch), known.reason


def largest_divisor(per_rank: int, limit: int) -> int:
    """The largest micro-batch, not above `limit`, that divides the samples of a rank."""
    return next(size for size in range(min(limit, per_rank), 0, -1) if per_rank % size == 0)


def with_micro_batch(config: EngineConfig, micro: int, world_size: int) -> EngineConfig:
    """The same settings with another micro-batch and the accumulation that goes with it."""
    accumulation = config.train_batch_size // (micro * world_size)
    deepspeed = {**config.deepspeed, MICRO: micro, ACCUMULATION: accumulation}
    return dataclasses.replace(config, micro_batch_size=micro, accumulation=accumulation, deepspeed=deepspeed)


def shrink(
    out_dir: Path,
    config: EngineConfig,
    world_size: int,
    asked: int | Literal["auto"],
    where: str,
    error: BaseException | None = None,
) -> ChatGoTError:
    """Store the largest micro-batch that is not above half of this one and keeps the global batch. Any rank may do so.

    Args:
        config: the settings that this run used.
        asked: the micro-batch that the JSON comes to by itself, or "auto"; the file answers this JSON only.
        where: what was running: "step 12, the backward pass".
        error: the failed allocation.

    Returns:
        What to raise: RunAgainError (exit 75), or MachineError (exit 6) where the micro-batch is 1 already.
    """
    what = f"{where}: out of memory on rank {os.environ.get('RANK', '0')}"
    if error is not None and str(error):
        what += f" ({str(error).splitlines()[0]})"
    if config.micro_batch_size == 1:
        return MachineError(
            f"{what}, at micro-batch 1, the smallest; nothing of it was saved, and earlier checkpoints are untouched. "
            f"What needs less: {'; '.join(remedies(config))}. `chatgot plan` shows what each of them costs"
        )
    per_rank = config.train_batch_size // world_size
    micro = largest_divisor(per_rank, config.micro_batch_size // 2)
    attempt, known = os.environ.get(ATTEMPT), read(out_dir)
    reason = f"memory ran out with {config.micro_batch_size} ({where})"
    key = known.key if known is not None and asked == "auto" else None
    smaller = Stored(micro, asked, reason, attempt, key)
    try:
        smaller.store(out_dir)
    except OSError as failed:
        if read(out_dir) != smaller:  # else a rank on another machine wrote it at the same time
            return MachineError(
                f"{what}, at micro-batch {config.micro_batch_size}, and {out_dir / run_folder.MICRO_BATCH} cannot be "
                f"written ({failed}): set {MICRO} = {micro} and {ACCUMULATION} = {per_rank // micro} yourself"
            )
    go_on = "launch/run starts all ranks again" if attempt else "run the same command again"
    return RunAgainError(
        f"{what}; from the next start on micro-batch {config.micro_batch_size} -> {micro}, accumulation "
        f"{config.accumulation} -> {per_rank // micro}, global batch {config.train_batch_size} as before; {go_on}"
    )


def remedies(config: EngineConfig) -> list[str]:
    """What needs less memory and is not in use yet, as overrides where one says it."""
    recomputed, stages, offloads = less_memory(config)
    advice = [" ".join(words(options[-1])) for options in (recomputed, stages) if options]
    if stages:
        advice[-1] += " on several ranks"
    possible = [one for one in offloads if config.zero_stage == 3 or (config.zero_stage > 0 and len(one) == 1)]
    return [*advice, *(" ".join(words(one)) for one in possible[-1:]), "a smaller model.max_seq_length or model"]
