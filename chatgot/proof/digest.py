"""The digest of an optimizer step, and how far the digests of two starts can be compared. Imports no torch.

One line of metrics.jsonl for every step: {"step": 7, "digest": {"batch": ..., "loss": ..., ...}}. JSON numbers are
written with repr, which gives back the same bits, so a loss of the journal *is* the loss, bit for bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

import chatgot.run_folder as run_folder
from chatgot.observe.journal import Branch, read_lines

FIRST_STEPS = 10
"""After a checkpoint, in which loss and gradient norm are compared where roundings differ: these grow exponentially."""
TOLERANCE = 1e-5
"""Relative, of the loss, for each of these steps, in fp32. Measured at up to three times a good rate: 4e-8 a step."""
TOLERANCE_16_BIT = 2e-3
"""The same where either side computes in 16 bit. Measured: 5e-4 a step; with lost moments the second step shows 3e-3 a
step and more."""
NORM_FACTOR = 50
"""By so much rounder is a gradient norm than a loss (measured: 30)."""

_SHAPES_DROPOUT = ("world_size", "micro_batch", "device", "compile", "torch")
"""What decides, besides the random state, which elements dropout drops."""


@dataclass(frozen=True)
class Digest:
    """What identifies one optimizer step."""

    batch: str
    """16 hex digits: the samples (index and tokens) that were fed to the model, however they were spread."""
    loss: float
    """Nats per token, mean over ranks in fp64 of each rank's fp32 loss."""
    grad_norm: float | None
    """Global norm before clipping; None where DeepSpeed does not measure it."""
    lr: float
    """Learning rate of the first parameter group after this step: a stock scheduler has moved on to the next one's."""
    rng: str
    """16 hex digits: the random state of all ranks at the start of the step."""
    setup: str
    """Id of the `Setup` that it was computed with."""
    offset: int = 0
    """First global sample of the step, minus that of a run which leaves nothing out: moved by rollbacks. Steps of
    different offsets are different batches by intention, and are not compared."""

    def to_json(self) -> dict[str, Any]:
        """As the journal stores it."""
        tree = asdict(self)
        if not self.offset:
            tree.pop("offset")
        return tree


@dataclass(frozen=True)
class Setup:
    """What the numbers of one start depend on, besides the run's state. Kept in its `started` or `resumed` event."""

    id: str
    """8 hex digits over all of it. Equal ids: equal numbers, bit for bit (where the device is deterministic)."""
    numbers: str
    """8 hex digits over the settings that are meant to change the numbers: rates, clipping, data, seed, schedule."""
    batches: str
    """8 hex digits over what decides which batch a step sees: data, seed, batch size, length of a sample."""
    dropout: bool
    deterministic: bool
    """Whether the device repeats its own results: a CPU does, a GPU with torch.use_deterministic_algorithms."""
    topology: dict[str, Any]
    """What changes roundings only: world_size, zero_stage, precision, micro_batch, device, ..."""
    changes: tuple[str, ...] = ()
    """'ds.optimizer.params.lr: 0.003 -> 0.001': the settings of `numbers` that this start changed."""


_DIGEST, _SETUP = TypeAdapter(Digest), TypeAdapter(Setup)


def short_hash(tree: dict[str, Any]) -> str:
    """8 hex digits over plain values."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode()).hexdigest()[:8]


def batches_id(data: str, seed: int, train_batch_size: int, block_size: int) -> str:
    """`Setup.batches`; `data` is the fingerprint of the tokens, `block_size` the length of a sample."""
    return short_hash({"batches": [data, seed, train_batch_size, block_size]})


def read_digest(tree: Any) -> Digest | None:
    """Read what `Digest.to_json` wrote; None for what is no digest."""
    with contextlib.suppress(ValidationError):
        return _DIGEST.validate_python(tree)


@dataclass(frozen=True)
class Terms:
    """How far two setups let the digests of a step be compared."""

    exactly: tuple[str, ...]
    """Fields of `Digest` that must be equal."""
    nearly: tuple[str, ...] = ()
    """Fields that must agree within `tolerance`."""
    tolerance: float = 0.0
    """Relative, of the loss, for each of FIRST_STEPS; of the norm NORM_FACTOR times as much."""
    why: str = ""
    """Why not everything is compared bit for bit; empty where it is."""

    @property
    def exact(self) -> bool:
        """Whether everything is compared bit for bit."""
        return not self.why

    def narrowed(self, earlier: Terms) -> Terms:
        """Allow no more than `earlier`, the terms of the steps before, has left in common."""
        if earlier.exact:
            return self
        exactly = tuple(name for name in self.exactly if name in earlier.exactly)
        nearly = tuple(name for name in self.nearly if name in (*earlier.exactly, *earlier.nearly))
        return Terms(exactly, nearly, self.tolerance, self.why or f"{earlier.why} before")

    def describe(self) -> str:
        """Say it: 'batch and lr; in the first 10 steps loss and grad_norm within ..., because world_size: 2 -> 1'."""
        if self.exact:
            return "bit for bit"
        parts = [" and ".join(self.exactly) or "nothing"]
        if self.nearly:
            within = f"{' and '.join(self.nearly)} within a relative {self.tolerance:g} per step"
            parts.append(f"{within} (grad_norm: {NORM_FACTOR} times that) in the first {FIRST_STEPS}")
        return f"{'; '.join(parts)}, because {self.why}"


@dataclass(frozen=True)
class Difference:
    """The first field that differs."""

    field: str
    journal: Any
    now: Any
    proves: bool
    """Whether it had to be equal, so that something is wrong; else roundings would have to be larger than usual."""

    def __str__(self) -> str:
        return f"{self.field} was {self.journal!r}, is now {self.now!r}"


EVERYTHING = ("batch", "rng", "lr", "loss", "grad_norm")
"""Fields in the order in which they are compared: the cause comes before its effect."""
BIT_FOR_BIT = Terms(EVERYTHING)


def terms(before: Setup | None, now: Setup | None) -> Terms:
    """Decide how digests of two setups may be compared; None: a setup that no event tells about."""
    if before is None or now is None:
        return Terms(("batch",), why="events.jsonl does not tell the settings of one of them")
    if before.numbers != now.numbers:
        what = "; ".join(now.changes) or "see the changes in events.jsonl"
        return Terms(("batch",) if before.batches == now.batches else (), why=f"settings were changed ({what})")
    keys = sorted(before.topology.keys() | now.topology.keys())
    changed = [key for key in keys if before.topology.get(key) != now.topology.get(key)]
    sixteen = any("16" in str(setup.topology.get("precision")) for setup in (before, now))
    tolerance = TOLERANCE_16_BIT if sixteen else TOLERANCE
    if not changed:
        if now.deterministic and before.deterministic:
            return BIT_FOR_BIT
        why = "this device's kernels do not repeat their own roundings"
        return Terms(("batch", "rng", "lr"), ("loss", "grad_norm"), tolerance, why)
    named = [f"{key}: {before.topology.get(key)} -> {now.topology.get(key)}" for key in changed if key != "layout"]
    why = ", ".join(named) or "engine settings that change roundings are others"
    if now.dropout and any(key in changed for key in _SHAPES_DROPOUT):
        return Terms(("batch", "lr"), why=f"{why}, and dropout draws differently then")
    exactly = ("batch", "rng", "lr")
    if any(one.topology.get("skips_delay_lr") for one in (before, now)):  # and other layouts can skip other steps
        exactly = ("batch", "rng")
    same_generators = not any(key in changed for key in ("world_size", "device", "torch"))
    exactly = exactly if same_generators else tuple(name for name in exactly if name != "rng")
    return Terms(exactly, ("loss", "grad_norm"), tolerance, why)


def first_difference(journal: Digest, now: Digest, by: Terms, steps: int) -> Difference | None:
    """Compare two digests of one step, `steps` steps after both had the same state; the first field that differs."""
    for name in EVERYTHING:
        before, after = getattr(journal, name), getattr(now, name)
        allowed = by.tolerance * steps * (NORM_FACTOR if name == "grad_norm" else 1)
        if name in by.exactly and repr(before) != repr(after):
            return Difference(name, before, after, proves=True)
        if name in by.nearly and steps <= FIRST_STEPS and not _near(before, after, allowed):
            return Difference(name, before, after, proves=False)
    return None


def after(journal: Digest, now: Digest, by: Terms) -> Terms:
    """What the steps after these two have in common: no losses, if only one was skipped, as another precision may."""
    norms = (journal.grad_norm, now.grad_norm)
    if len({norm is None or math.isfinite(norm) for norm in norms}) == 1:
        return by
    return Terms(tuple(name for name in by.exactly if name not in ("loss", "grad_norm")), why="a step was skipped")


def _near(before: float | None, after: float | None, tolerance: float) -> bool:
    """Compare, unless a norm was not measured or a step was skipped (which another precision need not skip)."""
    if before is None or after is None or not (math.isfinite(before) and math.isfinite(after)):
        return True
    return abs(before - after) <= tolerance * max(abs(before), abs(after))


@dataclass
class History:
    """The digests of a run as it stands, and the setups that its events tell about."""

    digests: dict[int, Digest] = field(default_factory=dict)
    """By step, in order."""
    setups: dict[str, Setup] = field(default_factory=dict)


def history(run: Path, after: int = 0) -> History:
    """Read the run as it stands: the digests of its latest branch, from step `after` + 1 on, and all setups."""
    branch: Branch[Digest] = Branch()
    for record in read_lines(run / run_folder.METRICS, after or None):
        if record is None or not isinstance(step := record.get("step"), int):
            continue
        branch.go_to(step)
        if step > after and (digest := read_digest(record.get("digest"))) is not None:
            branch.by_step[step] = digest
    return History(dict(sorted(branch.by_step.items())), setups(read_lines(run / run_folder.EVENTS)))


def setups(events: Iterable[Mapping[str, Any] | None]) -> dict[str, Setup]:
    """Collect the setups of the `started` and `resumed` events, by id."""
    known: list[Setup] = []
    for event in events:
        if event is not None and "setup" in event:
            with contextlib.suppress(ValidationError):  # an event of an earlier ChatGoT
                known.append(_SETUP.validate_python(event["setup"]))
    return {setup.id: setup for setup in known}
