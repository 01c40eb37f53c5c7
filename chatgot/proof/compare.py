"""Proof that a run is the run it says it is: a digest of every step, and after a resume the comparison with the
journal.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from chatgot.checkpoint import rng
from chatgot.config.run import RunConfig
from chatgot.data.loader import TrainBatches
from chatgot.deepspeed_json.engine_config import EngineConfig
from chatgot.distributed import ControlGroup
from chatgot.engine.step import TrainingEngine
from chatgot.observe.journal import Journal
from chatgot.proof import digest
from chatgot.proof.digest import Digest, History, Setup
from chatgot.run_folder import flattened

_NO_NUMBER = (
    "train.log_every",
    "train.eval_every",
    "train.sample_",
    "ds.chatgot.checkpoint",
    "ds.chatgot.guard",
    "ds.wandb",
    "ds.tensorboard",
    "ds.csv_monitor",
    "ds.comet",
    "ds.steps_per_print",
    "ds.wall_clock_breakdown",
    "ds.memory_breakdown",
    "ds.dump_state",
    "ds.timers",
    "ds.flops_profiler",
    "ds.comms_logger",
    "ds.checkpoint",
    "ds.aio",
)
"""Settings, by the beginning of their names, that change no number of a run."""

_ROUNDING = (
    "ds.train_micro_batch_size_per_gpu",
    "ds.gradient_accumulation_steps",
    "ds.zero_",
    "ds.bf16",
    "ds.fp16",
    "ds.torch_autocast",
    "ds.data_types",
    "ds.communication_data_type",
    "ds.prescale_gradients",
    "ds.gradient_predivide_factor",
    "ds.activation_checkpointing",
    "ds.chatgot.activation_checkpointing",
    "ds.chatgot.compile",
    "ds.optimizer.params.torch_adam",
    "ds.optimizer.params.fused",
)
"""Settings that change roundings only."""


def changes_numbers(name: str) -> bool:
    """Whether the setting (named as overrides name it, or a line of run_folder.changed_settings) is meant to change a
    run's numbers.
    """
    return not name.startswith((*_NO_NUMBER, *_ROUNDING))


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
    """What the numbers of this start depend on.

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
        "layout": _hash({name: value for name, value in settings.items() if name.startswith(_ROUNDING)}),
    }
    return Setup(
        id=_hash({"numbers": numbers, "topology": topology, "deterministic": deterministic}),
        numbers=_hash(numbers),
        batches=_hash({"batches": [data, config.train.seed, engine.train_batch_size, config.model.max_seq_length]}),
        dropout=config.model.dropout > 0,
        deterministic=deterministic,
        topology=topology,
        changes=tuple(line for line in changes if changes_numbers(line)),
    )


def _hash(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode()).hexdigest()[:8]


@dataclass
class _Step:
    """A step whose loss may still be on its way from the device."""

    step: int
    loss: torch.Tensor
    grad_norm: torch.Tensor | float | None
    lr: float
    batch: int
    rng: int
    offset: int
    setup: str
    arrived: torch.cuda.Event | None


class Proof:
    """Every rank has one; rank 0 writes the digests and compares them.

    Reading a loss right after its step would make the CPU wait for a GPU: there it is copied away behind the step's
    kernels, and its digest follows one step later. `flush` catches up.
    """

    def __init__(self, ranks: ControlGroup, device: torch.device) -> None:
        self.overlap: Overlap | None = None
        """Rank 0's, after a resume."""
        self.setup_id = ""
        self.journal: Journal | None = None
        """Rank 0's, with the id of the setup; both are set before the first step."""
        self.losses: list[tuple[int, float]] = []
        """(step, loss as in its digest) of the steps whose losses have become known, on every rank; the guard takes
        them.
        """
        self.describe: Callable[[EngineConfig], Setup] | None = None
        """Rank 0's: the setup of this start with these settings."""
        self._ranks = ranks
        self.lags = device.type == "cuda"
        """Whether a digest follows one step after its own."""
        self._late: _Step | None = None
        self._rng = 0

    def settings_changed(self, config: EngineConfig) -> Setup | None:
        """From the coming step on it trains with these; rank 0's setup, for an event."""
        if self.describe is None:
            return None
        now = self.describe(config)
        self.setup_id = now.id
        if self.overlap is not None:
            self.overlap.settings_changed(now)
        return now

    def begin_step(self) -> None:
        """Before anything of the step draws a random number."""
        self._rng = rng.fingerprint(self._ranks.rank)

    def end_step(
        self,
        step: int,
        loss: torch.Tensor,
        engine: TrainingEngine,
        batches: TrainBatches,
        flags: Sequence[bool],
        offset: int = 0,
    ) -> tuple[bool, ...]:
        """After optimizer step `step`: write what is known of it, and share `flags` (see ControlGroup.any). The one
        collective of a step.

        Args:
            loss: this rank's, a scalar on the device.
            offset: of the digest.
        """
        done = _Step(
            step,
            loss,
            engine.raw_grad_norm,
            engine.learning_rate,
            batches.batch_hash,
            self._rng,
            offset,
            self.setup_id,
            None,
        )
        if self.lags:
            done.loss, done.grad_norm = _sent(loss), _sent(done.grad_norm)
            if loss.is_cuda:
                done.arrived = torch.cuda.Event()
                done.arrived.record()
            done, self._late = self._late, done
        return self._share(done, flags)

    def flush(self) -> None:
        """Write the digest that is late, if there is one. Collective."""
        late, self._late = self._late, None
        if late is not None:
            self._share(late, ())

    def _share(self, done: _Step | None, flags: Sequence[bool]) -> tuple[bool, ...]:
        sums = (0.0,) * 5
        if done is not None:
            if done.arrived is not None:
                done.arrived.synchronize()
            sums = (float(done.loss), *_halves(done.batch), *_halves(done.rng))
        raised, (loss, *halves) = self._ranks.exchange(flags, sums)
        if done is not None:
            self.losses.append((done.step, loss / self._ranks.world_size))
        if done is not None and self.journal is not None:
            norm = done.grad_norm
            found = Digest(
                batch=_hex(halves[0], halves[1]),
                loss=loss / self._ranks.world_size,
                grad_norm=None if norm is None else float(norm),
                lr=done.lr,
                rng=_hex(halves[2], halves[3]),
                setup=done.setup,
                offset=done.offset,
            )
            self.journal.digest(done.step, found.to_json())
            if self.overlap is not None:
                self.overlap.step(done.step, found)
        return raised

    def end(self) -> None:
        """The run ends: say how far the comparison got."""
        if self.overlap is not None:
            self.overlap.end()


class Overlap:
    """Compares the first steps after a resume with those that the journal has already. Rank 0's."""

    def __init__(
        self,
        from_step: int,
        now: Setup,
        known: History,
        event: Callable[..., None],
        say: Callable[[str], None],
        offset: int = 0,
    ) -> None:
        """
        Args:
            known: the digests after `from_step` of the run that the checkpoint belongs to, read before this start
                writes its own.
            event: writes to events.jsonl.
            offset: of the steps' digests that follow: those that were trained after a rollback, of which the checkpoint
                does not know, are other batches.
        """
        self.from_step = from_step
        self.expected = {step: digest for step, digest in known.digests.items() if digest.offset == offset}
        self.compared = 0
        self.difference: tuple[int, digest.Difference] | None = None
        self._event = event
        self._say = say
        self._known = known
        self._terms: dict[str, digest.Terms] = {}
        self.settings_changed(now)
        self._used: dict[str, digest.Terms] = {}
        self.compares_anything = any(terms.exactly for terms in self._terms.values())
        self._open = True
        if not self.expected and known.digests:
            self._nothing(
                f"{len(known.digests)} journaled steps follow the checkpoint, and were trained on other data after a "
                f"rollback"
            )
        elif not self.expected:
            self._nothing("the journal ends at the checkpoint")
        elif not self.compares_anything:
            why = _describe(self._terms)
            self._nothing(
                f"{len(self.expected)} journaled steps follow the checkpoint, and none can be compared: {why}"
            )

    def settings_changed(self, now: Setup) -> None:
        """The coming steps are compared as those of this setup."""
        self._terms = {
            name: digest.terms(self._known.setups.get(name), now) for name in {d.setup for d in self.expected.values()}
        }

    @property
    def exact(self) -> bool:
        """Whether the steps so far were compared bit for bit."""
        return all(terms.exact for terms in self._used.values())

    @property
    def compares(self) -> str:
        """What of them was compared, and why not more; 'bit for bit'."""
        return _describe(self._used)

    def _nothing(self, why: str) -> None:
        self._open = False
        self._event("resume_not_compared", from_step=self.from_step, why=why)

    def step(self, step: int, now: Digest) -> None:
        """Step `step` has been trained (again)."""
        if not self._open:
            return
        journal = self.expected.get(step)
        if journal is not None:
            self._used[journal.setup] = self._terms[journal.setup]
            found = digest.first_difference(journal, now, self._terms[journal.setup], step - self.from_step)
            if found is not None:
                self._differs(step, found)
                return
            self.compared += 1
        if step >= max(self.expected):
            self._verified()

    def _differs(self, step: int, found: digest.Difference) -> None:
        self._open, self.difference = False, (step, found)
        self._event(
            "resume_differs", step=step, field=found.field, journal=found.journal, now=found.now, **self._counts()
        )
        self._say(
            f"WARNING: resume differs at step {step}: {found} ({self.compared} of {len(self.expected)} journaled "
            f"steps repeated, compared "
            f"{self.compares}); training goes on"
        )

    def _verified(self) -> None:
        self._open = False
        self._event("resume_verified", **self._counts())
        how = "repeat the journal bit for bit" if self.exact else f"repeat the journal ({self.compares})"
        self._say(
            f"resume verified {self.compared}/{len(self.expected)}: steps {min(self.expected)}..{max(self.expected)} "
            f"{how}"
        )

    def _counts(self) -> dict[str, Any]:
        return {
            "from_step": self.from_step,
            "steps": self.compared,
            "of": len(self.expected),
            "exact": self.exact,
            "compares": self.compares,
        }

    def end(self, why: str = "the run ended first") -> None:
        """No more steps follow; if some were still to be compared, say so."""
        if not self._open:
            return
        self._open = False
        self._event("resume_verified", ended_first=True, **self._counts())
        how = f" ({self.compares})" if self.compared else ""
        self._say(f"resume verified {self.compared}/{len(self.expected)}{how}; {why}")


def _describe(terms: dict[str, digest.Terms]) -> str:
    reasons = [one.describe() for one in terms.values() if not one.exact]
    return "; ".join(dict.fromkeys(reasons)) or "bit for bit"


def _sent(value: Any) -> Any:
    """On its way to the CPU, if it is a tensor on a GPU; the caller waits for an event."""
    if not isinstance(value, torch.Tensor) or value.device.type == "cpu":
        return value
    host = torch.empty_like(value, device="cpu", pin_memory=True)
    return host.copy_(value, non_blocking=True)


def _halves(value: int) -> tuple[float, float]:
    """Upper and lower 32 bits of a 64-bit hash, which sum exactly in fp64."""
    return float(value >> 32), float(value & 0xFFFF_FFFF)


def _hex(high: float, low: float) -> str:
    """16 digits of the sum modulo 2**64 of which the halves' sums are given."""
    return f"{((int(high) << 32) + int(low)) % 2**64:016x}"
