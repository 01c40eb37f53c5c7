"""The digest of an optimizer step, and how far the digests of two starts can be compared. Imports no torch.

One line of metrics.jsonl for every step: {"step": 7, "digest": {"batch": ..., "loss": ..., ...}}. JSON numbers are
written with repr, which gives back the same bits, so a loss of the journal *is* the loss, bit for bit.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

import chatgot.run_folder as run_folder
from chatgot.observe.journal import Branch, read_lines

TOLERANCE = 1e-5
"""Relative, for each step since the checkpoint: loss and gradient norm after a change of layout, in fp32."""
TOLERANCE_16_BIT = 2e-2
"""The same where either side computes in 16 bit."""
LARGEST_TOLERANCE = 0.1

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
    """Learning rate of the first parameter group in this step."""
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

    def to_json(self) -> dict[str, Any]:
        """As the event stores it."""
        return asdict(self)


_DIGEST, _SETUP = TypeAdapter(Digest), TypeAdapter(Setup)


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
    """Relative, for each step since the checkpoint, up to LARGEST_TOLERANCE in all."""
    why: str = ""
    """Why not everything is compared bit for bit; empty where it is."""

    @property
    def exact(self) -> bool:
        """Whether everything is compared bit for bit."""
        return not self.why

    def describe(self) -> str:
        """Say it: 'batch and lr; loss and grad_norm within a relative 1e-05 per step, because world_size: 2 -> 1'."""
        if self.exact:
            return "bit for bit"
        parts = [" and ".join(self.exactly) or "nothing"]
        if self.nearly:
            parts.append(f"{' and '.join(self.nearly)} within a relative {self.tolerance:g} per step")
        return f"{'; '.join(parts)}, because {self.why}"


@dataclass(frozen=True)
class Difference:
    """The first field that differs."""

    field: str
    journal: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.field} was {self.journal!r}, is now {self.now!r}"


EVERYTHING = ("batch", "rng", "lr", "loss", "grad_norm")
"""Fields in the order in which they are compared: the cause comes before its effect."""


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
            return Terms(EVERYTHING)
        why = "this device's kernels do not repeat their own roundings"
        return Terms(("batch", "rng", "lr"), ("loss", "grad_norm"), tolerance, why)
    named = [f"{key}: {before.topology.get(key)} -> {now.topology.get(key)}" for key in changed if key != "layout"]
    why = ", ".join(named) or "engine settings that change roundings are others"
    if now.dropout and any(key in changed for key in _SHAPES_DROPOUT):
        return Terms(("batch", "lr"), why=f"{why}, and dropout draws differently then")
    same_generators = not any(key in changed for key in ("world_size", "device", "torch"))
    return Terms(("batch", "rng", "lr") if same_generators else ("batch", "lr"), ("loss", "grad_norm"), tolerance, why)


def first_difference(journal: Digest, now: Digest, by: Terms, steps: int) -> Difference | None:
    """Compare two digests of one step, `steps` steps after the checkpoint; returns the first field that differs."""
    allowed = min(by.tolerance * steps, LARGEST_TOLERANCE)
    for name in EVERYTHING:
        before, after = getattr(journal, name), getattr(now, name)
        unequal = name in by.exactly and repr(before) != repr(after)
        if unequal or (name in by.nearly and not _near(before, after, allowed)):
            return Difference(name, before, after)
    return None


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
    for record in read_lines(run / run_folder.METRICS):
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
