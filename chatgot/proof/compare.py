"""Proof that a run is what it says: a digest of every step, and after a resume the comparison with the journal."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from chatgot.checkpoint import rng
from chatgot.config.overrides import effect
from chatgot.config.run import RunConfig
from chatgot.deepspeed_json.resolve import EngineConfig
from chatgot.distributed import ControlGroup
from chatgot.observe.journal import Journal
from chatgot.proof import digest
from chatgot.proof.digest import Digest, History, Setup, batches_id, short_hash
from chatgot.run_folder import flattened

logger = logging.getLogger(__name__)


def changes_numbers(name: str) -> bool:
    """Tell whether a setting, or a line of run_folder.changed_settings, is meant to change a run's numbers."""
    return effect(name) in ("batches", "numbers")


def setup(
    config: RunConfig,
    engine: EngineConfig,
    data: str,
    world_size: int,
    device: str,
    deterministic: bool,
    versions: dict[str, str],
    changes: list[str],
) -> Setup:
    """Collect what the numbers of this start depend on.

    Args:
        data: fingerprint of the tokens.
        device: its full name: other chips round differently.
        changes: lines of run_folder.changed_settings, and 'data: ...' where that has changed.
    """
    settings = flattened(config.to_dict()) | flattened(engine.to_dict(), "ds.")
    settings = {name: value for name, value in settings.items() if not name.endswith(".nvme_path")}
    numbers = {"data": data, **{name: value for name, value in settings.items() if changes_numbers(name)}}
    if engine.chatgot.schedule is None or engine.chatgot.schedule.type == "constant":
        numbers.pop("train.max_steps")  # the rate does not depend on how long the run will be
        changes = [line for line in changes if not line.startswith("train.max_steps:")]
    topology = {
        "world_size": world_size,
        "zero_stage": engine.zero_stage,
        "precision": engine.precision,
        "micro_batch": engine.micro_batch_size,
        "compile": engine.chatgot.compile.enabled,
        "device": device,
        "threads": torch.get_num_threads() if device.startswith("cpu") else None,
        "torch": versions["torch"],
        "deepspeed": versions["deepspeed"],
        "skips_delay_lr": True if engine.scheduler is not None and engine.precision == "fp16" else None,
        "layout": short_hash({name: value for name, value in settings.items() if effect(name) == "rounding"}),
    }
    return Setup(
        id=short_hash({"numbers": numbers, "topology": topology, "deterministic": deterministic}),
        numbers=short_hash(numbers),
        batches=batches_id(data, config.train.seed, engine.train_batch_size, config.model.max_seq_length),
        dropout=config.model.dropout > 0,
        deterministic=deterministic,
        topology=topology,
        changes=tuple(line for line in changes if changes_numbers(line)),
    )


@dataclass(frozen=True)
class TrainedStep:
    """An optimizer step that has just been made, seen by one rank. Its loss may still be on its way from the device."""

    step: int
    loss: Tensor
    """This rank's, a scalar."""
    grad_norm: Tensor | float | None
    """Before clipping; None where DeepSpeed does not measure it."""
    lr: float
    batch: int
    """64-bit hash of this rank's samples."""
    offset: int = 0
    """Of the digest."""


@dataclass
class _Pending:
    """A step whose digest is not written yet."""

    trained: TrainedStep
    rng: int
    arrived: torch.cuda.Event | None = None
    """Set when loss and norm have been copied to the CPU."""


KnownLoss = tuple[int, float]
"""A step and its loss, on every rank."""


@dataclass
class Proof:
    """Digests every step. Every rank has one; rank 0, which has journal and overlap, writes and compares the digests.

    Reading a loss right after its step would make the CPU wait for a GPU: there it is copied away behind the step's
    kernels, and its digest follows one step later. `flush` catches up.
    """

    ranks: ControlGroup
    device: torch.device
    journal: Journal | None = None
    setup_id: str = ""
    overlap: Overlap | None = None
    _late: _Pending | None = None
    _rng: int = 0
    lags: bool = field(init=False)
    """Whether a digest follows one step after its own."""

    def __post_init__(self) -> None:
        self.lags = self.device.type == "cuda"

    def begin_step(self) -> None:
        """Remember the random state, before anything of the step draws a number."""
        self._rng = rng.fingerprint(self.ranks.rank)

    def end_step(self, trained: TrainedStep, flags: Sequence[bool]) -> tuple[tuple[bool, ...], KnownLoss | None]:
        """Write what is known after an optimizer step, and share `flags`. The one collective of a step.

        Returns:
            ControlGroup.any of the flags, and the loss that has become known: on a GPU that of the step before.
        """
        pending: _Pending | None = _Pending(trained, self._rng)
        if self.lags:
            pending, self._late = self._late, _send(trained, self._rng)
        return self._share(pending, flags)

    def flush(self) -> KnownLoss | None:
        """Write the digest that is late, if there is one; returns its loss. Collective."""
        late, self._late = self._late, None
        return self._share(late, ())[1] if late is not None else None

    def end(self, why: str = "the run ended first") -> None:
        """Say how far the comparison got, if it is not at its end: no more journaled steps follow."""
        if self.overlap is not None:
            self.overlap.end(why)

    def _share(self, pending: _Pending | None, flags: Sequence[bool]) -> tuple[tuple[bool, ...], KnownLoss | None]:
        if pending is None:
            return self.ranks.exchange(flags, (0.0,) * 5)[0], None
        trained, norm = pending.trained, pending.trained.grad_norm
        if pending.arrived is not None:
            pending.arrived.synchronize()
        sums = (float(trained.loss), *_halves(trained.batch), *_halves(pending.rng))
        raised, (loss_sum, *halves) = self.ranks.exchange(flags, sums)
        loss = loss_sum / self.ranks.world_size
        if self.journal is not None:
            batch, random_state = _hex(*halves[:2]), _hex(*halves[2:])
            norm = None if norm is None else float(norm)
            now = Digest(batch, loss, norm, trained.lr, random_state, self.setup_id, trained.offset)
            self.journal.digest(trained.step, now.to_json())
            if self.overlap is not None:
                self.overlap.step(trained.step, now)
        return raised, (trained.step, loss)


class Overlap:
    """Compares the first steps after a resume with those that the journal has already. Rank 0's."""

    def __init__(self, from_step: int, now: Setup, known: History, event: Callable[..., None], offset: int = 0) -> None:
        """
        Args:
            known: the digests after `from_step` of the checkpoint's run, read before this start writes its own.
            event: writes to events.jsonl.
            offset: of the digests that follow. Steps trained after a rollback, of which the checkpoint does not know,
                are other batches.
        """
        self.from_step = from_step
        self.expected = {step: digest for step, digest in known.digests.items() if digest.offset == offset}
        self._last = max(self.expected, default=0)
        self.compared = 0
        self.difference: tuple[int, digest.Difference] | None = None
        self._event = event
        setups = {one.setup for one in self.expected.values()}
        self._terms = {name: digest.terms(known.setups.get(name), now) for name in setups}
        self._used: dict[str, digest.Terms] = {}
        self._in_common = digest.BIT_FOR_BIT
        self.compares_anything = any(terms.exactly for terms in self._terms.values())
        follow, why = "journaled steps follow the checkpoint, and", None
        if not known.digests:
            why = "the journal ends at the checkpoint"
        elif not self.expected:
            why = f"{len(known.digests)} {follow} were trained on other data after a rollback"
        elif not self.compares_anything:
            why = f"{len(self.expected)} {follow} none can be compared: {_describe(self._terms)}"
        self._open = why is None
        if why is not None:
            self._event("resume_not_compared", from_step=from_step, why=why)

    @property
    def exact(self) -> bool:
        """Whether the steps so far were compared bit for bit."""
        return all(terms.exact for terms in self._used.values())

    @property
    def compares(self) -> str:
        """What of them was compared, and why not more; 'bit for bit'."""
        return _describe(self._used)

    def step(self, step: int, now: Digest) -> None:
        """Compare a step that has been trained (again)."""
        if not self._open:
            return
        expected = len(self.expected)
        if (journal := self.expected.get(step)) is not None:
            terms = self._used[journal.setup] = self._terms[journal.setup].narrowed(self._in_common)
            self._in_common = digest.after(journal, now, terms)
            if difference := digest.first_difference(journal, now, terms, step - self.from_step):
                self.difference = (step, difference)
                self._close("resume_differs", step=step, **vars(difference))
                repeated = f"{self.compared} of {expected} journaled steps repeated, compared {self.compares}"
                logger.warning(f"resume differs at step {step}: {difference} ({repeated}); training goes on")
                return
            self.compared += 1
        if step >= self._last:
            self._close("resume_verified")
            how = "repeat the journal bit for bit" if self.exact else f"repeat the journal ({self.compares})"
            steps = f"steps {min(self.expected)}..{self._last}"
            logger.info(f"resume verified {self.compared}/{expected}: {steps} {how}")

    def end(self, why: str) -> None:
        """Say so if no more steps follow and some were still to be compared."""
        if not self._open:
            return
        self._close("resume_verified", ended_first=True)
        how = f" ({self.compares})" if self.compared else ""
        logger.info(f"resume verified {self.compared}/{len(self.expected)}{how}; {why}")

    def _close(self, kind: str, **fields: Any) -> None:
        self._open = False
        fields |= {"from_step": self.from_step, "steps": self.compared, "of": len(self.expected)}
        self._event(kind, **fields, exact=self.exact, compares=self.compares)


def _describe(terms: dict[str, digest.Terms]) -> str:
    reasons = [one.describe() for one in terms.values() if not one.exact]
    return "; ".join(dict.fromkeys(reasons)) or "bit for bit"


def _send(trained: TrainedStep, random_state: int) -> _Pending:
    """Start copying loss and norm from the GPU to the CPU, if they are there."""

    def sent(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.device.type == "cpu":
            return value
        return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)

    pending = _Pending(replace(trained, loss=sent(trained.loss), grad_norm=sent(trained.grad_norm)), random_state)
    if trained.loss.is_cuda:
        pending.arrived = torch.cuda.Event()
        pending.arrived.record()
    return pending


def _halves(value: int) -> tuple[float, float]:
    """Split a 64-bit hash in two halves of 32 bits, which sum exactly in fp64."""
    return float(value >> 32), float(value & 0xFFFF_FFFF)


def _hex(high: float, low: float) -> str:
    """Write the sum modulo 2**64 as 16 digits, given the sums of the halves."""
    return f"{((int(high) << 32) + int(low)) % 2**64:016x}"
