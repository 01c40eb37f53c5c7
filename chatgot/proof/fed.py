"""Which samples each step of a run was fed, from its events alone, and back: which steps fed a passage of the text.
`chatgot data at-step RUN N` and `chatgot data where RUN TEXT`. Reads only, and imports no torch before it runs.

Within a stretch of steps the samples follow each other; a resume that changes something and a rollback begin a new one.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

import chatgot.run_folder as run_folder
from chatgot.errors import ChatGoTError, CheckpointError, ConfigError
from chatgot.launcher.arguments import Command
from chatgot.observe.journal import last_step, read_lines
from chatgot.proof import digest
from chatgot.proof.digest import batches_id

_END = 2**62
"""The last step of a stretch that may still go on."""
_NAMED = 6
_RUNS = 20
"""So many runs are followed back, each started from a checkpoint of the one before."""


@dataclass(frozen=True)
class Order:
    """From which sample on a start goes, in which order. In its `started` or `resumed` event, as `data_order`."""

    next_sample: int
    train_batch_size: int
    seed: int
    block_size: int
    data: str
    """Fingerprint of the text."""
    run: str | None = None
    """The other run folder whose checkpoint it began with; None: its own, or none."""


@dataclass(frozen=True)
class Stretch:
    """Steps first_step..last_step, fed with samples in their order."""

    first_step: int
    last_step: int
    first_sample: int
    """Of first_step."""
    order: Order | None
    """None: not known."""
    why: str = ""
    """Why not."""

    def sample_of(self, step: int) -> int:
        """The first sample of a step."""
        assert self.order is not None
        return self.first_sample + (step - self.first_step) * self.order.train_batch_size

    def goes_on_with(self, order: Order, step: int) -> bool:
        """Whether a start after `step` changes nothing."""
        if self.order is None or self.last_step != step or self.sample_of(step + 1) != order.next_sample:
            return False
        return self.order == replace(order, next_sample=self.order.next_sample, run=self.order.run)


@dataclass(frozen=True)
class Fed:
    """The steps that fed a passage, in order."""

    whole: tuple[int, ...] = ()
    """In which one sample held all of it."""
    part: tuple[int, ...] = ()
    """In which samples held a part of it only."""

    all_known: bool = True
    """Whether the samples of all steps are known."""

    def __str__(self) -> str:
        """'fed in steps 118, 402 and in part in 3 others', 'fed in part in step 731'."""
        if not self.whole and not self.part:
            return "not fed so far" if self.all_known else "steps not known"
        said = f"fed in {_named(self.whole)}" if self.whole else f"fed in part in {_named(self.part)}"
        if self.whole and self.part:
            said += f" and in part in {len(self.part)} other{'s' * (len(self.part) > 1)}"
        return said if self.all_known else f"{said}; other steps are not known"


class Feed:
    """What a run was fed, up to a checkpoint or to its end."""

    def __init__(self, stretches: list[Stretch]) -> None:
        self.stretches = stretches

    @classmethod
    def of(cls, run: Path, last_step: int, tag: str | None = None) -> Feed:
        """Read the events of a run folder, up to step `last_step`.

        Args:
            tag: only what had been fed when this checkpoint was saved, whatever was given up since.

        Raises:
            ConfigError: not a run folder.
        """
        run_folder.check(run)
        return cls([one for one in _ended(_stretches(run, tag, _RUNS), last_step) if one.last_step >= one.first_step])

    def at(self, step: int) -> Stretch | None:
        """The stretch of a step; None: it has not been trained."""
        return next((one for one in self.stretches if one.first_step <= step <= one.last_step), None)

    def unknown(self, data: str) -> list[str]:
        """Say which steps cannot be searched for passages of this text, and why, a line each."""
        lines = []
        for one in self.stretches:
            why = one.why if one.order is None else "had another text" if one.order.data != data else ""
            if why:
                lines.append(f"steps {one.first_step}..{one.last_step} {why}")
        return lines

    def fed(self, data: str, n_tokens: int, begin: int, end: int) -> Fed:
        """Find all steps that fed any of the tokens begin..end - 1 of the training split of a text.

        Args:
            data: its fingerprint.
            n_tokens: of the training split.
        """
        from chatgot.data.loader import DataOrder

        whole, part = set[int](), set[int]()
        for one in self.stretches:
            if one.order is None or one.order.data != data:
                continue
            order = DataOrder(n_tokens, one.order.block_size, one.order.seed)
            samples, starts = order.samples_with(begin, end, one.first_sample, one.sample_of(one.last_step + 1) - 1)
            steps = one.first_step + (samples - one.first_sample) // one.order.train_batch_size
            holds_all = (starts <= begin) & (starts + order.block_size + 1 >= end)
            whole.update(steps[holds_all].tolist())
            part.update(steps[~holds_all].tolist())
        return Fed(tuple(sorted(whole)), tuple(sorted(part - whole)), all(one.order for one in self.stretches))


def _named(steps: tuple[int, ...]) -> str:
    more = f" and {len(steps) - _NAMED} more (up to {steps[-1]})" if len(steps) > _NAMED else ""
    return f"step{'s' * (len(steps) > 1)} {', '.join(map(str, steps[:_NAMED]))}{more}"


_ORDER = TypeAdapter(Order)


def _stretches(run: Path, tag: str | None, runs: int) -> list[Stretch]:
    events = [event for event in read_lines(run / run_folder.EVENTS) if event is not None]
    saves = [i for i, event in enumerate(events) if event.get("event") == "saved" and event.get("tag") == tag]
    found: list[Stretch] = []
    for event in events[: saves[-1] if saves else None]:
        kind = event.get("event")
        with contextlib.suppress(KeyError, TypeError, ValueError):  # a damaged event says nothing
            if kind in ("started", "resumed"):
                found = _begun(run, event, found, runs)
            elif kind == "rolled_back":
                found = _rolled_back(event, found)
    return found


def _begun(run: Path, event: dict[str, Any], found: list[Stretch], runs: int) -> list[Stretch]:
    """Go on from a start or a resume."""
    step, order, why = int(event["step"]), None, "were recorded by an earlier ChatGoT, without the position in the data"
    if "data_order" in event:
        with contextlib.suppress(ValidationError):
            order = _ORDER.validate_python(event["data_order"])
    else:
        order = _inferred(run, event, found)
    if step and ((order is not None and order.run is not None) or not found):
        found = _of_other_run(event, order, step, runs)
    found = _ended(found, step)
    if order is not None and found and found[-1].goes_on_with(order, step):
        return [*found[:-1], replace(found[-1], last_step=_END)]
    return [*found, Stretch(step + 1, _END, 0 if order is None else order.next_sample, order, why)]


def _of_other_run(event: dict[str, Any], order: Order | None, step: int, runs: int) -> list[Stretch]:
    """What the run had been fed from whose checkpoint this one began."""
    origin = Path(str(event.get("from", "")))
    other = origin.parent.parent if order is None or order.run is None else Path(order.run)
    before: list[Stretch] = []
    if runs and (other / run_folder.EVENTS).is_file():
        with contextlib.suppress(ChatGoTError):  # it is no run folder any more
            before = _stretches(other, origin.name, runs - 1)
    return before or [Stretch(1, step, 0, None, f"are of {other}, whose events cannot be read here")]


def _rolled_back(event: dict[str, Any], found: list[Stretch]) -> list[Stretch]:
    step, sample = int(event["to_step"]), int(event["first_sample"]) + int(event["samples"])
    last = found[-1]
    return [*_ended(found, step), replace(last, first_step=step + 1, last_step=_END, first_sample=sample)]


def _ended(found: Iterable[Stretch], step: int) -> list[Stretch]:
    """Give up what follows a step."""
    return [replace(one, last_step=min(one.last_step, step)) for one in found if one.first_step <= step]


def _inferred(run: Path, event: dict[str, Any], found: list[Stretch]) -> Order | None:
    """The order of a start that an earlier ChatGoT recorded, where that is certain: the settings of the run's newest
    start decide the same batches, and no rollback has moved the position.
    """
    from chatgot.config.run import load_run_config

    step = int(event["step"])
    try:
        config = load_run_config(str(run / run_folder.RUN))
        batch = int(run_folder.read(run, run_folder.DS_CONFIG)["train_batch_size"])
        data = str(run_folder.read(run, run_folder.ENVIRONMENT)["data"]["fingerprint"])
        batches = event["setup"]["batches"]
    except (ConfigError, KeyError, TypeError, ValueError):
        return None
    seed, block_size = config.train.seed, config.model.max_seq_length
    straight = all(
        one.order is not None and one.order.train_batch_size == batch and one.sample_of(1) == 0 for one in found
    )
    if batches != batches_id(data, seed, batch, block_size) or (step and not (found and straight)):
        return None
    return Order(step * batch, batch, seed, block_size, data)


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

    last = last_step(run / run_folder.METRICS)
    stretch = Feed.of(run, last or 0).at(step)
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
    last = last_step(run / run_folder.METRICS)
    feed = Feed.of(run, last or 0)
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
