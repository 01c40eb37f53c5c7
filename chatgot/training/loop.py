"""The training loop: step, log, evaluate, sample, save, stop. One generator, so that a benchmark can drive it step by
step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from chatgot import run_folder
from chatgot.checkpoint import manifest, rng
from chatgot.checkpoint.portable import parameter_groups
from chatgot.checkpoint.save import Saved, Saver
from chatgot.config.run import RunConfig
from chatgot.data.loader import EvalBatches, TrainBatches
from chatgot.data.prepared import PreparedData
from chatgot.distributed import ControlGroup
from chatgot.engine.step import TrainingEngine, mean_over_ranks
from chatgot.errors import CheckpointError, NumericsError
from chatgot.observe.journal import Events, Journal, TolerantWriter
from chatgot.observe.memory import peak_memory_gib
from chatgot.observe.meters import Mfu, Throughput
from chatgot.observe.progress import Progress
from chatgot.observe.wandb_run import WandbRun
from chatgot.proof.compare import KnownLoss, Proof, TrainedStep
from chatgot.training import rollback, samples, schedule, skipped
from chatgot.training.evaluate import Evaluation, evaluate
from chatgot.training.guard import Guard
from chatgot.training.memory import MemoryCheck
from chatgot.training.stop import StopSignals


@dataclass
class Records:
    """Rank 0's outputs; None of them on the other ranks but the silent progress."""

    progress: Progress
    journal: Journal | None = None
    events: Events | None = None
    wandb: WandbRun | None = None
    samples: TolerantWriter = field(default_factory=lambda: TolerantWriter("samples"))
    """Writes the files of samples/."""

    def event(self, kind: str, **fields: Any) -> None:
        """To events.jsonl, on rank 0."""
        if self.events is not None:
            self.events.event(kind, **fields)


@dataclass
class Position:
    """What the loop knows and the engine does not; saved in every checkpoint."""

    next_sample: int = 0
    """Global index of the first sample that has not been trained on."""
    skipped_samples: int = 0
    """How many of the samples before it rollbacks have left out."""
    best_val_loss: float | None = None
    last_val: dict[str, float] = field(default_factory=dict)


@dataclass
class Loop:
    """One run in one process. The engine owns steps, optimizer and precision; this object only holds what it works
    with.
    """

    engine: TrainingEngine
    config: RunConfig
    data: PreparedData
    train_batches: TrainBatches
    eval_batches: EvalBatches
    ranks: ControlGroup
    records: Records
    out_dir: Path
    device: torch.device
    fields: dict[str, Any]
    """Of the manifest: what identifies the run."""
    mfu: Mfu
    prompts: list[str]
    stop: StopSignals
    saver: Saver
    proof: Proof
    memory: MemoryCheck
    guard: Guard
    json_micro_batch: int
    """What the JSON says; smaller ones are used after memory has run out."""
    position: Position = field(default_factory=Position)
    stopped_by: str | None = None
    meter: Throughput = field(default_factory=Throughput)
    _last_save: float = field(default_factory=time.monotonic)
    _failed_saves: int = 0

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.engine.engine.global_steps

    def steps(self) -> Iterator[int]:
        """Train to train.max_steps or until a signal; yields after every optimizer step, with its number."""
        train = self.config.train
        while self.step < train.max_steps and self.stopped_by is None:
            loss = self._train_step()
            # The one collective a step, before any line of this step: those of metrics.jsonl never go back within a
            # run.
            (signalled, minutes_over, writing), known = self.share(
                loss, self.stop.received is not None, self._minutes_over(), self.saver.busy
            )
            step, last = self.step, self.step == train.max_steps
            self.meter.step(self.train_batches.tokens_per_step)
            if not self.engine.engine.was_step_applied():
                skipped.report(self, step, loss, self.position.next_sample - self.train_batches.global_batch_size)
            if last or step % train.log_every == 0 or step == 1:
                self._log(step, loss)
            else:
                self.records.progress.step(step)
            if (compared := self.memory.compare(self.ranks)) is not None:
                fields, line = compared
                self.records.event("memory", step=step, **fields)
                self.records.progress.say(line)
            if why := self._diverged(step, known):
                rollback.diverged(self, why)
                yield self.step
                continue
            improved, evaluated = False, last or (train.eval_every is not None and step % train.eval_every == 0)
            sampled = last or (train.sample_every is not None and step % train.sample_every == 0)
            if evaluated:
                improved = self._evaluate(step)
            if sampled:
                self._sample(step)
            if evaluated or sampled:  # a signal may have come meanwhile
                signalled = self.ranks.any(signalled or self.stop.received is not None)[0]
            if self.saver.pending and not writing:
                self._go_on_saving()
            if signalled and not last:
                self.stopped_by = self.ranks.from_rank_0(self.stop.received) or "a signal on another rank"
            if last or signalled or self._save_due(step, minutes_over, improved):
                self._save(last or signalled)
            yield step

    def advance(self) -> None:
        """One optimizer step and its digest, and nothing else: no line in the log, no evaluation, no saving."""
        self.share(self._train_step())

    def share(self, loss: torch.Tensor, *flags: bool) -> tuple[tuple[bool, ...], KnownLoss | None]:
        """After `_train_step`: the step's digest to the journal, and whether any rank raised each flag. Collective."""
        engine = self.engine
        trained = TrainedStep(
            self.step,
            loss,
            engine.raw_grad_norm,
            engine.learning_rate,
            self.train_batches.batch_hash,
            self.position.skipped_samples,
        )
        return self.proof.end_step(trained, flags)

    def _diverged(self, step: int, known: KnownLoss | None) -> str | None:
        return self.guard.divergence(step, self.engine.skips_in_a_row, [known] if known is not None else [])

    def _train_step(self) -> torch.Tensor:
        self.proof.begin_step()
        scheduled = self.engine.config.chatgot.schedule
        if scheduled is not None:
            self.engine.set_learning_rate(schedule.factor(self.step, self.config.train.max_steps, scheduled))
        try:
            loss = self.engine.train_step(self.train_batches.micro_batches(self.position.next_sample))
        except NumericsError as error:
            raise rollback.stopped(self, str(error), hint="") from error
        self.position.next_sample += self.train_batches.global_batch_size
        return loss

    def _log(self, step: int, loss: torch.Tensor) -> None:
        mean_loss = mean_over_ranks(
            loss
        )  # waits for the device, so that the interval below counts what has really been computed
        interval = self.meter.interval()
        if not math.isfinite(mean_loss) and self.engine.engine.was_step_applied():
            raise rollback.stopped(
                self,
                f"step {step}: train/loss is {mean_loss}, and DeepSpeed applied the step: the weights are lost. The "
                f"JSON has switched its "
                "check off (zero_optimization.compute_grad_norm or bf16.check_grad_overflow = false)",
                hint="",
            )
        peak = max(self.ranks.gather(peak_memory_gib(self.device.type)))
        if self.records.journal is None or interval is None:
            return
        metrics: dict[str, Any] = {
            "train/loss": mean_loss,
            "optim/lr": self.engine.learning_rate,
            "optim/grad_norm": self.engine.grad_norm,
            "optim/loss_scale": self.engine.loss_scale,
            "optim/skipped_steps": self.engine.engine.skipped_steps,
            "perf/tokens_per_sec": interval.tokens_per_sec,
            "perf/step_ms": interval.step_ms,
            "perf/mfu": self.mfu(interval.tokens_per_sec),
            "mem/peak_gib": peak,
            "data/tokens": self.position.next_sample * self.train_batches.block_size,
        }
        self._record(step, metrics)
        self.records.progress.line(step, metrics, self.meter.eta_seconds(self.config.train.max_steps - step))

    def _record(self, step: int, metrics: dict[str, Any]) -> None:
        if self.records.journal is not None:
            self.records.journal.append({"step": step, **metrics})
        if self.records.wandb is not None:
            self.records.wandb.log({name: value for name, value in metrics.items() if value is not None}, step)

    def evaluation(self) -> Evaluation:
        """Loss over the whole validation split. Collective."""
        with self.meter.paused("eval"):
            return evaluate(self.engine.engine, self.eval_batches, self.device)

    def _evaluate(self, step: int) -> bool:
        result = self.evaluation()
        metrics = {
            "val/loss": result.loss,
            "val/bits_per_char": result.bits_per_char(self.data.meta.val.characters / self.data.meta.val.tokens),
        }
        improved = self.position.best_val_loss is None or result.loss < self.position.best_val_loss
        if improved:
            self.position.best_val_loss = result.loss
        self.position.last_val = {"step": step, **metrics}
        self._record(step, metrics)
        self.records.progress.line(step, metrics)
        return improved

    def _sample(self, step: int) -> None:
        with self.meter.paused("sample"):
            drawn = samples.draw(
                self.engine.engine,
                self.prompts,
                self.data.tokenizer,
                self.config.train,
                self.config.model.max_seq_length,
                self.ranks,
            )
            if self.ranks.rank == 0:
                path, text = samples.path(self.out_dir / run_folder.SAMPLES, step), samples.as_text(drawn)
                if self.records.samples.attempt(lambda: samples.write(path, text)):
                    self.records.event("sampled", step=step, path=str(path.relative_to(self.out_dir)))
                self.records.progress.say(f"sample at step {step}: {drawn[0].prompt}{drawn[0].text[:200]}")
                if self.records.wandb is not None:
                    self.records.wandb.log_text("samples", text, step)

    def _minutes_over(self) -> bool:
        minutes = self.engine.config.chatgot.checkpoint.every_minutes
        return minutes is not None and self.ranks.rank == 0 and time.monotonic() - self._last_save >= 60 * minutes

    def _save_due(self, step: int, minutes_over: bool, improved: bool) -> bool:
        config = self.engine.config.chatgot.checkpoint
        by_step = config.every_steps is not None and step % config.every_steps == 0
        return by_step or minutes_over or (improved and config.keep_best > 0)

    def save_now(self, must: bool = False) -> None:
        """Save the state as it is, whatever is due; see `finish_saving` for `must`. Collective."""
        self._save(must)

    def _save(self, must: bool) -> None:
        """Save, in the background if chatgot.checkpoint.async says so; a failure leaves training going, until it is the
        last chance.
        """
        if why := self._diverged(self.step, self.proof.flush()):  # on a GPU the last loss has become known only now
            rollback.diverged(self, why, must)
            return
        with self.meter.paused("save"):
            self.finish_saving()
            try:
                self.saver.begin(self.engine.engine, self.client_state(), self._manifest())
            except CheckpointError as error:
                self._failed(error, must)
                return
            except NumericsError as error:
                self.records.event("save_refused", step=self.step, error=str(error))
                rollback.diverged(self, str(error), must)
                return
            self._last_save = time.monotonic()
            if must or not self.engine.config.chatgot.checkpoint.async_:
                self.finish_saving(must)

    def _go_on_saving(self) -> None:
        with self.meter.paused("save"):
            try:
                self._published(self.saver.advance())
            except CheckpointError as error:
                self._failed(error, must=False)

    def finish_saving(self, must: bool = False) -> None:
        """Wait until the pending save is published, if there is one. Collective.

        Args:
            must: a failure ends the run, because it is the last chance.

        Raises:
            CheckpointError: it failed, and it must not, or two before it have failed too.
        """
        if self.saver.pending:
            try:
                self._published(self.saver.finish())
            except CheckpointError as error:
                self._failed(error, must)

    def _failed(self, error: CheckpointError, must: bool) -> None:
        """Training goes on after a save that failed, until it is the third in a row."""
        self._failed_saves += 1
        self.records.event("save_failed", step=self.saver.failed_step, error=str(error), in_a_row=self._failed_saves)
        if must or self._failed_saves >= 3:
            raise error
        self.records.progress.say(f"WARNING: {error}; training goes on, the next save will try again")

    def _published(self, saved: Saved | None) -> None:
        if saved is None:
            return
        self._failed_saves = 0
        for note in saved.notes:
            self.records.progress.say(f"WARNING: {note}")
        seconds, stalled = round(saved.seconds, 3), round(saved.stalled_seconds, 3)
        self.records.event(
            "saved", step=saved.step, tag=saved.tag, seconds=seconds, stalled_seconds=stalled, pruned=list(saved.pruned)
        )

    def client_state(self) -> dict[str, Any]:
        """What DeepSpeed does not save. Collective: for ZeRO 0-2 only rank 0's client state is stored, so it holds
        every rank's RNG.
        """
        return {
            "format": 1,
            "next_sample": self.position.next_sample,
            "skipped_samples": self.position.skipped_samples,
            "guard": self.guard.state(self.engine.skips_in_a_row),
            "best_val_loss": self.position.best_val_loss,
            "last_val": self.position.last_val,
            "micro_batch": {"json": self.json_micro_batch, "used": self.engine.config.micro_batch_size},
            "rng": self.ranks.gather(rng.capture()),
            "parameter_groups": parameter_groups(self.engine.engine),
        }

    def restore(self, client_state: dict[str, Any]) -> list[str]:
        """Counterpart of `client_state`; returns notes."""
        self.position = Position(
            next_sample=client_state["next_sample"],
            skipped_samples=client_state.get("skipped_samples", 0),
            best_val_loss=client_state["best_val_loss"],
            last_val=client_state["last_val"],
        )
        self.engine.skips_in_a_row = self.guard.restore(client_state.get("guard"))
        return rng.resume(
            client_state["rng"], self.config.train.seed, self.ranks.rank, self.ranks.world_size, self.step
        )

    def _manifest(self) -> dict[str, Any]:
        val = self.position.last_val
        return {
            "tokens": self.position.next_sample * self.train_batches.block_size,
            "val_loss": val.get("val/loss") if val.get("step") == self.step else None,
            **self.fields,
        }


__all__ = ["Loop", "Position", "Records", "manifest"]
