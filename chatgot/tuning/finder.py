"""`"train_micro_batch_size_per_gpu": "auto"`: the largest micro-batch that fits, found by real steps; the global batch
stays.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from chatgot import run_folder
from chatgot.config.overrides import apply_overrides
from chatgot.deepspeed_json.batch import ACCUMULATION, MICRO, TOTAL
from chatgot.devices import device_facts
from chatgot.distributed import ControlGroup, Place
from chatgot.errors import MachineError
from chatgot.training.forecast import Forecast, this_device
from chatgot.tuning import micro_batch
from chatgot.tuning.micro_batch import Stored
from chatgot.tuning.probe import (
    OUTSIDE,
    Outcome,
    Probes,
    Task,
)

MARGIN = 0.05
"""Part of the memory that must stay free in a probe: a run holds more than its steps, and other processes come and
go.
"""


def wants_probe(tree: dict[str, Any]) -> bool:
    """Whether the JSON leaves the micro-batch to memory: "auto", and not determined by the other two batch numbers."""
    return (
        tree.get(MICRO) == "auto" and isinstance(tree.get(TOTAL), int) and not isinstance(tree.get(ACCUMULATION), int)
    )


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
    """The JSON of a probe: this micro-batch, and accumulation as in the run but for its length: 1, or 2 where there are
    several.
    """
    accumulation = min(2, tree[TOTAL] // (micro * world_size))
    kept = {key: value for key, value in tree.items() if key not in OUTSIDE}
    return {**kept, TOTAL: micro * accumulation * world_size, MICRO: micro, ACCUMULATION: accumulation}


def find(
    tree: dict[str, Any],
    overrides: dict[str, Any],
    model: dict[str, Any],
    vocab_size: int,
    device: str,
    out_dir: Path,
    place: Place,
    ranks: ControlGroup,
    say: Callable[[str], None],
) -> Stored:
    """The micro-batch for "auto". Collective: every rank probes on its own device, and the smallest answer counts.

    Args:
        tree: the JSON as read.
        device: its name.

    Raises:
        MachineError: on all ranks; not even one sample fits, or a probe failed for another reason.
    """
    tree = apply_overrides(json.loads(json.dumps(tree)), overrides)
    key = settings_key(tree, model, vocab_size, place.world_size, device)
    known = ranks.from_rank_0(micro_batch.read(out_dir) if place.rank == 0 else None)
    if known is not None and known.json == "auto" and known.key == key:
        say(f"{MICRO} = {known.micro_batch}: found by an earlier start, see {out_dir / run_folder.MICRO_BATCH}")
        return known
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    probes = Probes((place.rank,), place.world_size, MARGIN, address, place.local_rank, ranks.gather)
    smallest = min(
        ranks.gather(this_device(device_facts())), key=lambda one: one.memory
    )  # the same on all ranks: they probe together
    return search(tree, probes, Forecast(model, vocab_size, place.world_size, smallest), say, key)


def search(tree: dict[str, Any], probes: Probes, forecast: Forecast, say: Callable[[str], None], key: str) -> Stored:
    """Probe until the largest micro-batch that fits is known; what is beyond the plan is not probed. See `find`."""
    model, world_size = forecast.model, forecast.world_size
    tried: dict[int, Outcome] = {}

    def fits(micro: int) -> bool:
        probe = probe_tree(tree, micro, world_size)
        beyond = forecast.beyond(probe)
        outcome = Outcome(False, beyond) if beyond else probes.run(Task(probe, model, forecast.vocab_size))
        tried[micro] = outcome
        verdict = (
            f"fits, {outcome.peak_bytes / 2**30:.2f} of {outcome.limit_bytes / 2**30:.2f} GiB"
            if outcome.fits
            else outcome.reason
        )
        say(f"micro-batch {micro}: {verdict}")
        return outcome.fits

    sizes = candidates(tree[TOTAL], world_size)
    found = largest_that_fits(sizes, fits)
    if found is None:
        raise MachineError(
            f'{MICRO} = "auto": not even one sample of {model["max_seq_length"]} tokens fits ({tried[1].reason}). What needs less memory: '
            "an activation_checkpointing section, a higher zero_optimization.stage on several ranks, offload, a "
            "smaller model; "
            "`chatgot tune` tries some of them"
        )
    larger = [size for size in tried if size > found]
    limit = f"{min(larger)} does not ({tried[min(larger)].reason})" if larger else "that is all a rank has in a step"
    return Stored(found, "auto", f"fits with {probes.margin:.0%} of the memory free; {limit}", key=key)


def settings_key(tree: dict[str, Any], model: dict[str, Any], vocab_size: int, world_size: int, device: str) -> str:
    """What an answer depends on."""
    kept = {name: value for name, value in tree.items() if name not in OUTSIDE}
    return hashlib.sha256(
        json.dumps([kept, model, vocab_size, world_size, device], sort_keys=True, default=str).encode()
    ).hexdigest()
