"""The micro-batch that memory allows, for the same global batch: found by real steps for "auto", made smaller after a
run that ran out of memory, and stored in the run folder for the next start.

`micro_batch.json` holds the micro-batch to use, the one that the JSON asked for at the time (or "auto"), the reason,
and the attempt that ran out of memory; `launch/run` starts the ranks again by itself where that attempt is its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import chatgot.run_folder as run_folder
from chatgot.deepspeed_json.resolve import EngineConfig
from chatgot.deepspeed_json.schema import ACCUMULATION, MICRO, TOTAL
from chatgot.devices import GIB, device_facts, device_of_machine
from chatgot.distributed import ControlGroup, Place
from chatgot.errors import ChatGoTError, MachineError, RunAgainError
from chatgot.files import write_atomically
from chatgot.launcher.command import ATTEMPT
from chatgot.plan.settings import less_memory, words
from chatgot.tuning.probe import OUTSIDE, Outcome, Probes, Task, read_task

logger = logging.getLogger(__name__)

MARGIN = 0.05
"""Share of the memory that stays free in a probe: a run holds more than its steps, other processes come and go."""


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
        fields = json.loads(run_folder.read_bytes(out_dir / run_folder.MICRO_BATCH))
        micro, reason = int(fields["micro_batch"]), str(fields["reason"])
        return Stored(micro, fields.get("json", "auto"), reason, fields.get("attempt"), fields.get("key"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def stored(out_dir: Path, json_value: int | str, samples_per_rank: int) -> tuple[int, str] | None:
    """The micro-batch that an earlier start left for this value of the JSON, and why; None where nothing is stored.

    Args:
        json_value: the micro-batch that the JSON comes to by itself, or "auto".
        samples_per_rank: of one optimizer step.
    """
    known = read(out_dir)
    if known is None or known.json != json_value:
        return None
    return largest_divisor(samples_per_rank, known.micro_batch), known.reason


def largest_divisor(per_rank: int, limit: int) -> int:
    """The largest micro-batch, not above `limit`, that divides the samples of a rank."""
    return next(size for size in range(min(limit, per_rank), 0, -1) if per_rank % size == 0)


def shrink(
    out_dir: Path,
    config: EngineConfig,
    world_size: int,
    asked: int | Literal["auto"],
    where: str,
    error: BaseException | None = None,
    helps: bool = True,
) -> ChatGoTError:
    """Store the largest micro-batch that is not above half of this one and keeps the global batch. Any rank may do so.

    Args:
        config: the settings that this run used.
        asked: the micro-batch that the JSON comes to by itself, or "auto"; the file answers this JSON only.
        where: what was running: "step 12, the backward pass".
        error: the failed allocation.
        helps: whether a smaller micro-batch needs less memory there.

    Returns:
        What to raise: RunAgainError (exit 75), or MachineError (exit 6) where it is 1 already or does not help.
    """
    what = f"{where}: out of memory on rank {os.environ.get('RANK', '0')}"
    if error is not None and str(error):
        what += f" ({str(error).splitlines()[0]})"
    if config.micro_batch_size == 1 or not helps:
        size = "at micro-batch 1, the smallest" if helps else "whatever the micro-batch"
        return MachineError(
            f"{what}, {size}; nothing of it was saved, and earlier checkpoints are untouched. "
            f"What needs less: {'; '.join(remedies(config))}. `chatgot plan` shows what each of them costs"
        )
    per_rank = config.train_batch_size // world_size
    micro = largest_divisor(per_rank, config.micro_batch_size // 2)
    attempt, known = os.environ.get(ATTEMPT), read(out_dir)
    key = known.key if known is not None and asked == "auto" else None
    smaller = Stored(micro, asked, f"memory ran out with {config.micro_batch_size} ({where})", attempt, key)
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


def candidates(total: int, world_size: int) -> list[int]:
    """Micro-batches that make the global batch with whole accumulation steps, ascending."""
    per_rank, rest = divmod(total, world_size)
    return [size for size in range(1, per_rank + 1) if per_rank % size == 0 and rest == 0]


def largest_that_fits(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """Search ascending `sizes`, by doubling and then bisection, for the last one that fits; what fits, fits smaller."""
    good, bad, stride = -1, len(sizes), 1
    while good + 1 < bad:
        index = min(good + stride, bad - 1) if bad == len(sizes) else (good + bad) // 2
        if fits(sizes[index]):
            good, stride = index, 2 * stride
        else:
            bad = index
    return sizes[good] if good >= 0 else None


def probe_tree(tree: dict[str, Any], micro: int, world_size: int) -> dict[str, Any]:
    """The JSON of a probe: this micro-batch, and of the accumulation steps that go with it two at most."""
    accumulation = min(2, tree[TOTAL] // (micro * world_size))
    return {**tree, TOTAL: micro * accumulation * world_size, MICRO: micro, ACCUMULATION: accumulation}


def find(
    tree: dict[str, Any],
    model: dict[str, Any],
    vocab_size: int,
    device: str,
    out_dir: Path,
    place: Place,
    ranks: ControlGroup,
    tried: Callable[[], object] = lambda: None,
) -> Stored:
    """Find the micro-batch for "auto". Collective: every rank probes on its own device, and the smallest answer counts.

    Args:
        tree: the JSON, overrides included.
        device: its name.
        tried: called before each probe.

    Raises:
        MachineError: on all ranks; not even one sample fits, or a probe failed for another reason.
    """
    kept = {name: value for name, value in tree.items() if name not in OUTSIDE}
    depends_on = [kept, model, vocab_size, place.world_size, device]
    key = hashlib.sha256(json.dumps(depends_on, sort_keys=True, default=str).encode()).hexdigest()
    known = ranks.on_rank_0(lambda: read(out_dir))
    if known is not None and known.json == "auto" and known.key == key:
        logger.info(f"{MICRO} = {known.micro_batch}: found by an earlier start, see {out_dir / run_folder.MICRO_BATCH}")
        return known
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    smallest = min(ranks.gather(device_of_machine(device_facts())), key=lambda one: one.memory)
    local_rank = int(os.environ.get("LOCAL_RANK", place.local_rank))  # 0 where a scheduler shows only one device
    probes = Probes(smallest, (place.rank,), place.world_size, MARGIN, address, local_rank, ranks.gather)
    return search(tree, model, vocab_size, probes, key, tried)


def search(
    tree: dict[str, Any],
    model: dict[str, Any],
    vocab_size: int,
    probes: Probes,
    key: str = "",
    tried: Callable[[], object] = lambda: None,
) -> Stored:
    """Probe until the largest micro-batch that fits is known; what is far beyond the plan is not probed. See `find`."""
    outcomes: dict[int, Outcome] = {}

    def task(micro: int) -> Task:
        return Task(probe_tree(tree, micro, probes.world_size), model, vocab_size)

    def fits(micro: int) -> bool:
        tried()
        outcomes[micro] = outcome = probes.outcome(task(micro))
        used = f"fits, {outcome.peak_bytes / GIB:.2f} of {outcome.limit_bytes / GIB:.2f} GiB"
        logger.info(f"micro-batch {micro}: {used if outcome.fits else outcome.reason}")
        return outcome.fits

    best = largest_that_fits(candidates(tree[TOTAL], probes.world_size), fits)
    if best is None:
        config = read_task(task(1), probes.world_size, probes.device.facts)[1]
        raise MachineError(
            f'{MICRO} = "auto": not even one sample of {model["max_seq_length"]} tokens fits ({outcomes[1].reason}). '
            f"What needs less memory: {'; '.join(remedies(config))}; `chatgot tune` tries some of them"
        )
    larger = min((size for size in outcomes if size > best), default=None)
    limit = f"{larger} does not ({outcomes[larger].reason})" if larger else "that is all a rank has in a step"
    return Stored(best, "auto", f"fits with {probes.margin:.0%} of the memory free; {limit}", key=key)
