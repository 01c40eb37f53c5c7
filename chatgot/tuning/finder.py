"""Find the largest micro-batch that fits by real steps, for `"train_micro_batch_size_per_gpu": "auto"`; the global
batch stays.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import chatgot.run_folder as run_folder
from chatgot.deepspeed_json.batch import ACCUMULATION, MICRO, TOTAL
from chatgot.devices import GIB, device_facts, device_of_machine
from chatgot.distributed import ControlGroup, Place
from chatgot.errors import MachineError
from chatgot.tuning import micro_batch
from chatgot.tuning.micro_batch import Stored
from chatgot.tuning.probe import OUTSIDE, Outcome, Probes, Task, read_task

logger = logging.getLogger(__name__)

MARGIN = 0.05
"""Part of the memory that must stay free in a probe: a run holds more than its steps, and other processes come and
go.
"""


def candidates(total: int, world_size: int) -> list[int]:
    """Micro-batches that make the global batch with whole accumulation steps, ascending; none if it cannot be shared
    out.
    """
    per_rank, rest = divmod(total, world_size)
    return [size for size in range(1, per_rank + 1) if per_rank % size == 0] if rest == 0 else []


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
    kept = {key: value for key, value in tree.items() if key not in OUTSIDE}
    return {**kept, TOTAL: micro * accumulation * world_size, MICRO: micro, ACCUMULATION: accumulation}


def find(
    tree: dict[str, Any],
    model: dict[str, Any],
    vocab_size: int,
    device: str,
    out_dir: Path,
    place: Place,
    ranks: ControlGroup,
) -> Stored:
    """Find the micro-batch for "auto". Collective: every rank probes on its own device, and the smallest answer counts.

    Args:
        tree: the JSON, overrides included.
        device: its name.

    Raises:
        MachineError: on all ranks; not even one sample fits, or a probe failed for another reason.
    """
    key = settings_key(tree, model, vocab_size, place.world_size, device)
    known = ranks.from_rank_0(micro_batch.read(out_dir) if place.rank == 0 else None)
    if known is not None and known.json == "auto" and known.key == key:
        logger.info(f"{MICRO} = {known.micro_batch}: found by an earlier start, see {out_dir / run_folder.MICRO_BATCH}")
        return known
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    smallest = min(ranks.gather(device_of_machine(device_facts())), key=lambda one: one.memory)
    probes = Probes(smallest, (place.rank,), place.world_size, MARGIN, address, place.local_rank, ranks.gather)
    return search(tree, model, vocab_size, probes, key)


def search(tree: dict[str, Any], model: dict[str, Any], vocab_size: int, probes: Probes, key: str = "") -> Stored:
    """Probe until the largest micro-batch that fits is known; what is far beyond the plan is not probed. See `find`."""
    tried: dict[int, Outcome] = {}

    def fits(micro: int) -> bool:
        outcome = probes.outcome(Task(probe_tree(tree, micro, probes.world_size), model, vocab_size))
        tried[micro] = outcome
        used = f"fits, {outcome.peak_bytes / GIB:.2f} of {outcome.limit_bytes / GIB:.2f} GiB"
        logger.info(f"micro-batch {micro}: {used if outcome.fits else outcome.reason}")
        return outcome.fits

    best = largest_that_fits(candidates(tree[TOTAL], probes.world_size), fits)
    if best is None:
        smallest = Task(probe_tree(tree, 1, probes.world_size), model, vocab_size)
        config = read_task(smallest, probes.world_size, probes.device.facts)[1]
        raise MachineError(
            f'{MICRO} = "auto": not even one sample of {model["max_seq_length"]} tokens fits ({tried[1].reason}). '
            f"What needs less memory: {'; '.join(micro_batch.remedies(config))}; `chatgot tune` tries some of them"
        )
    larger = [size for size in tried if size > best]
    limit = f"{min(larger)} does not ({tried[min(larger)].reason})" if larger else "that is all a rank has in a step"
    return Stored(best, "auto", f"fits with {probes.margin:.0%} of the memory free; {limit}", key=key)


def settings_key(tree: dict[str, Any], model: dict[str, Any], vocab_size: int, world_size: int, device: str) -> str:
    """Hash all that the answer depends on."""
    kept = {name: value for name, value in tree.items() if name not in OUTSIDE}
    return hashlib.sha256(
        json.dumps([kept, model, vocab_size, world_size, device], sort_keys=True, default=str).encode()
    ).hexdigest()
