"""`chatgot data at-step RUN N` and `chatgot data where RUN TEXT`: from a step to its text, and back. Reads only, and
imports no torch before it runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import chatgot.run_folder as run_folder
from chatgot.errors import CheckpointError, ConfigError
from chatgot.launcher.arguments import Command
from chatgot.observe.journal import last_step

if TYPE_CHECKING:
    from chatgot.proof.fed import Feed


def add_commands(command: Command) -> None:
    """Add `chatgot data`."""
    add = command("data", _data, "the text that a step of a run was fed, or the steps that fed a text")
    add("what", choices=("at-step", "where"), help="at-step RUN N: the text of step N; where RUN TEXT: what fed it")
    add("run", type=Path, metavar="RUN", help="the run folder; it is only read")
    add("value", metavar="N|TEXT", help="the step, or a passage word for word")
    add("--rank", type=int, metavar="R", help="at-step: what this rank was fed (default: all of it)")
    add("--data", metavar="SPEC", help="the run's text (default: where the run had it)")


def _data(arguments: argparse.Namespace) -> None:
    if arguments.what == "where":
        if arguments.rank is not None:
            raise ConfigError("--rank belongs to `chatgot data at-step`; all ranks are looked at here")
        lines = where(arguments.run, arguments.value, arguments.data)
    else:
        if not arguments.value.isdecimal() or int(arguments.value) < 1:
            raise ConfigError(f"chatgot data at-step: {arguments.value!r} is no step; give a whole number from 1 on")
        lines = at_step(arguments.run, int(arguments.value), arguments.rank, arguments.data)
    for line in lines:
        print(line)


def at_step(run: Path, step: int, rank: int | None = None, spec: str | None = None) -> Iterator[str]:
    """Give the text of a step of the run as it stands, sample by sample, and prove it by the journal's hash.

    Args:
        rank: only this rank's samples, in the order in which it was fed them.
        spec: the text, as for --data; None: where the run had it.

    Raises:
        ConfigError: not a run folder, a step that was not trained, or a rank that there was not.
        DataError: the text is not there any more, or gives other tokens.
        CheckpointError: the journal has another hash.
    """
    from chatgot.data.copies import Places
    from chatgot.data.loader import DataOrder, TrainBatches
    from chatgot.data.prepare import recorded_data
    from chatgot.proof import digest

    feed, last = _feed(run)
    stretch = feed.at(step)
    if stretch is None:
        raise ConfigError(f"step {step}: {run} has trained {f'steps 1..{last}' if last else 'no step yet'}")
    if stretch.order is None:
        raise ConfigError(f"step {step}: not known; steps {stretch.first_step}..{stretch.last_step} {stretch.why}")
    order, first = stretch.order, stretch.sample_of(step)
    known = digest.history(run, after=step - 1)
    recorded = known.digests.get(step)
    setup = None if recorded is None else known.setups.get(recorded.setup)
    world_size, micro_batch = 1, order.train_batch_size
    if rank is not None:
        if setup is None:
            raise ConfigError(f"--rank {rank}: the records of {run} do not tell the ranks of step {step}")
        world_size, micro_batch = setup.topology["world_size"], setup.topology["micro_batch"]
        if not 0 <= rank < world_size:
            raise ConfigError(f"--rank {rank}: {world_size} rank(s) trained step {step}, 0..{world_size - 1}")
    _, data = recorded_data(run, order.data, spec)
    data_order = DataOrder(len(data.train), order.block_size, order.seed)
    fed = TrainBatches(data.train, data_order, order.train_batch_size, micro_batch, rank or 0, world_size)
    indices = fed.indices(first)
    starts = data_order.starts(indices)
    places = Places(data, "train").read(int(starts.max()) + 1)
    which = "" if rank is None else f", rank {rank}: {len(indices)} of them"
    yield f"step {step} was fed samples {first}..{first + order.train_batch_size - 1} of {data.meta.source}{which}"
    for index, start in zip(indices.tolist(), starts.tolist()):
        end = start + order.block_size
        yield f"\n--- sample {index}: {places.of_token(start)}, tokens {start}..{end} of the training split"
        yield data.tokenizer.decode(data.train[start : end + 1])
    everything = TrainBatches(data.train, data_order, order.train_batch_size, order.train_batch_size, 0, 1)
    batch = f"{everything.batch_hash(first):016x}"
    if recorded is None:
        yield f"\nnot proved: metrics.jsonl has no digest of step {step}"
    elif recorded.batch != batch:
        differs = f"metrics.jsonl has the hash {recorded.batch} at step {step}, this text gives {batch}"
        raise CheckpointError(f"{run}: {differs}; the records contradict each other, see `chatgot verify`")
    else:
        yield f"\nproved: the hash {batch} of these samples is the one that metrics.jsonl has at step {step}"


def where(run: Path, text: str, spec: str | None = None) -> Iterator[str]:
    """Give every place of a passage in the text of a run, and the steps of the run as it stands that fed it.

    Raises:
        ConfigError: not a run folder, or no text.
        DataError: the text is not there any more, or gives other tokens.
    """
    from chatgot.data.copies import KEPT_PLACES, find_copies
    from chatgot.data.prepare import recorded_data

    if not text:
        raise ConfigError("chatgot data where: the passage is empty; give some characters")
    feed, last = _feed(run)
    recorded = run_folder.read(run, run_folder.ENVIRONMENT).get("data")
    fingerprint = recorded.get("fingerprint") if isinstance(recorded, dict) else None
    _, data = recorded_data(run, str(fingerprint), spec)
    found, n_tokens = 0, len(data.train)
    for split in data.meta.splits:
        for one in find_copies(text, data, len(text), split):
            found += one.count
            for place in one.places:
                fed = feed.fed(data.fingerprint, n_tokens, place.begin, place.end) if split == "train" else "never fed"
                yield f"{place} ({split}): {fed}"
            if one.count > KEPT_PLACES:
                yield f"... and {one.count - KEPT_PLACES} more places ({split})"
    if not found:
        yield f"it does not stand word for word in {data.meta.source}"
    for line in feed.unknown(data.fingerprint):
        yield f"not known whether fed: {line}"
    yield f"the run stands at step {last or 0}"


def _feed(run: Path) -> tuple[Feed, int | None]:
    """What a run was fed up to where it stands, and the step of that."""
    from chatgot.proof.fed import Feed

    last = last_step(run / run_folder.METRICS)
    return Feed.of(run, last or 0), last
