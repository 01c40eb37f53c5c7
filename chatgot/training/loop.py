"""The training loop: step, log, evaluate, sample, save, stop. One generator, so that others can drive it by steps."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from chatgot.checkpoint import rng
from chatgot.checkpoint.manifest import ClientState, RunFields, StateFields
from chatgot.checkpoint.resume import parameter_groups, resume
from chatgot.config.run import RunConfig
from chatgot.data.loader import EvalBatches, TrainBatches
from chatgot.data.prepared import PreparedData
from chatgot.distributed import ControlGroup
from chatgot.engine.optimizer import schedule_factor
from chatgot.engine.step import TrainingEngine, mean_over_ranks
from chatgot.engine.zero_view import autocast_scale
from chatgot.errors import NumericsError
from chatgot.observe.meters import Mfu, Throughput, peak_memory_gib
from chatgot.proof.compare import KnownLoss, Proof, TrainedStep
from chatgot.training import evaluation
from chatgot.training.divergence import Divergence, Guard, describe_skip, describe_spike, stopped
from chatgot.training.memory import MemoryCheck
from chatgot.training.records import Records
from chatgot.training.saving import Position, Saving
from chatgot.training.stop import StopSignals
from chatgot.training.watchdog import PATIENCE, Watchdog

logger = logging.getLogger(__name__)

FIRST = "the first step"


@dataclass
class Loop:
    """One run in one process: holds what it works with, and owns the position in the data.

    The engine owns steps, optimizer, precision and micro-batch. Nobody else writes into a loop.
    """

    engine: TrainingEngine
    config: RunConfig
    data: PreparedData
    train_batches: TrainBatches
    eval_batches: EvalBatches
    ranks: ControlGroup
    records: Records
    out_dir: Path
    fields: RunFields
    """What identifies the run, for the manifest."""
    mfu: Mfu
    prompts: list[str]
    stop: StopSignals
    saving: Saving
    proof: Proof
    memory: MemoryCheck
    guard: Guard
    json_micro_batch: int
    """What the JSON says, or where it leaves that to memory what was found; less is used once memory has run out."""
    micro_batch_is_auto: bool
    position: Position
    watchdog: Watchdog
    meter: Throughput
    stopped_by: str | None = None
    """The signal that ended the loop."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.engine.engine.global_steps

    def steps(self) -> Iterator[int]:
        """Train to train.max_steps or until a signal; yields after every optimizer step, with its number."""
        train = self.config.train
        if self.position.owed:
            self._after_step(signalled=False, minutes_over=False)
        while self.step < train.max_steps and self.stopped_by is None:
            loss = self._train_step()
            # The one collective of a step, before any line of it: lines of metrics.jsonl never go back within a run.
            (signalled, minutes_over, writing), known = self._share(loss, self._flags())
            step, last = self.step, self.step == train.max_steps
            self._report(step, loss, last)
            if found := self._diverged(known):
                self.roll_back(found)
                yield self.step
                continue
            self._go_on_saving(writing)
            cadences = {"evaluation": train.eval_every, "samples": train.sample_every}
            self.position.owed = tuple(what for what, n in cadences.items() if last or (n and step % n == 0))
            self._after_step(signalled, minutes_over)
            yield self.step

    def _after_step(self, signalled: bool, minutes_over: bool) -> None:
        """Evaluate and sample what is owed, unless a signal comes, and save where it is due. Collective.

        What a signal cuts short stays owed: it is saved, and done when the run is resumed.
        """
        step, improved = self.step, False
        if self.position.owed:
            if found := self._diverged(self.proof.flush()):  # on a GPU the last loss has become known only now
                self.roll_back(found)
                return
            try:
                improved = self._show(step)
            except NumericsError as error:
                self.roll_back(Divergence(str(error), step + 1, several=True))
                return
            stopping, minutes_over, _ = self.ranks.any(*self._flags())
            signalled = signalled or stopping
        last = step >= self.config.train.max_steps and not self.position.owed
        if signalled and not last:
            self.stopped_by = self.ranks.from_rank_0(self.stop.asked_by) or "a signal on another rank"
        if last or signalled or self.saving.due(step, minutes_over, improved):
            self.save(must=last or signalled)

    def _show(self, step: int) -> bool:
        """Evaluate and sample as far as it is owed; whether the loss is the best so far. Collective."""
        improved = False
        with contextlib.suppress(evaluation.Interrupted):
            if "evaluation" in self.position.owed:
                improved = self._evaluate(step)
                self.position.owed = tuple(what for what in self.position.owed if what != "evaluation")
            if self.position.owed:
                self._sample(step)
            self.position.owed = ()
        self.records.account(step)
        return improved

    def _flags(self) -> tuple[bool, bool, bool]:
        """Of this rank: it is asked to stop, it is time to save, it still works on the save that is under way."""
        return self.stop.asked_by is not None, self.saving.minutes_over(self.step), self.saving.saver.busy

    def _poll(self, more: bool = False) -> bool:
        """Between two forwards of an evaluation or a sample: save what is due; whether any rank has `more`. Collective.

        Raises:
            Interrupted: on all ranks; one of them was asked to stop.
            NumericsError: on all ranks; the state that was to be saved is not finite.
        """
        self.watchdog.beat()
        signalled, minutes_over, writing, more = self.ranks.any(*self._flags(), more)
        if signalled:
            raise evaluation.Interrupted
        self._go_on_saving(writing)
        if minutes_over:
            self._save()
        return more

    def _go_on_saving(self, writing: bool) -> None:
        """Take the next part of the save that is under way, unless some rank still writes. Collective."""
        if self.saving.saver.pending and not writing:
            with self._doing(f"saving at step {self.step}", "save"):
                self.saving.go_on()

    def advance(self) -> None:
        """One optimizer step and its digest, and nothing else: no line in the log, no evaluation, no saving."""
        self._share(self._train_step(), ())

    def save(self, must: bool = False) -> None:
        """Save the state as it is, or roll back if it has diverged; see `Saving.save` for `must`. Collective."""
        if found := self._diverged(self.proof.flush()):
            self.roll_back(found, must)
            return
        try:
            self._save(must)
        except NumericsError as error:
            self.records.event("save_refused", step=self.step, error=str(error))
            self.roll_back(Divergence(str(error), self.step + 1, several=True), must)

    def _save(self, must: bool = False) -> None:
        with self._doing(f"saving at step {self.step}", "save"):
            val, tokens = self.position.last_val, self.position.next_sample * self.train_batches.block_size
            val_loss = val.get("val/loss") if val.get("step") == self.step else None
            fields: StateFields = {"tokens": tokens, "val_loss": val_loss, **self.fields}
            self.saving.save(self.engine.engine, self.client_state(), fields, must)
        self.records.account(self.step)
        self.records.saved(self.engine.device.type)

    def client_state(self) -> ClientState:
        """What DeepSpeed does not save. Collective: ZeRO 0-2 store only rank 0's, so it holds every rank's RNG."""
        return {
            "format": 1,
            "next_sample": self.position.next_sample,
            "skipped_samples": self.position.skipped_samples,
            "guard": self.guard.state(self.engine.skips_in_a_row),
            "best_val_loss": self.position.best_val_loss,
            "last_val": self.position.last_val,
            "owed": list(self.position.owed),
            "eval_targets": self.eval_batches.target_tokens,
            "micro_batch": {"json": self.json_micro_batch, "used": self.engine.config.micro_batch_size},
            "rng": self.ranks.gather(rng.capture()),
            "parameter_groups": parameter_groups(self.engine.engine),
            "grad_scaler": autocast_scale(self.engine.engine),
        }

    def _train_step(self) -> torch.Tensor:
        """One optimizer step; this rank's loss."""
        self.watchdog.beat(PATIENCE if self.watchdog.doing == FIRST else 1, f"step {self.step + 1}")
        self.proof.begin_step()
        if (schedule := self.engine.config.chatgot.schedule) is not None:
            self.engine.set_learning_rate(schedule_factor(self.step, self.config.train.max_steps, schedule))
        micro_batches = self.meter.waiting(self.train_batches.micro_batches(self.position.next_sample))
        try:
            loss = self.engine.train_step(self.watchdog.beating(micro_batches), before_update=self.memory.look)
        except NumericsError as error:
            raise self._stopped(str(error)) from error
        self.position.next_sample += self.train_batches.global_batch_size
        return loss

    def _share(self, loss: torch.Tensor, flags: tuple[bool, ...]) -> tuple[tuple[bool, ...], KnownLoss | None]:
        """Write the digest of the step that was just made, and share flags with all ranks. Collective."""
        engine, offset = self.engine, self.position.skipped_samples
        batch = self.train_batches.batch_hash(self._first_sample)
        trained = TrainedStep(self.step, loss, engine.raw_grad_norm, engine.learning_rate, batch, offset)
        return self.proof.end_step(trained, flags)

    @property
    def _first_sample(self) -> int:
        """Of the step that was just made."""
        return self.position.next_sample - self.train_batches.global_batch_size

    def _report(self, step: int, loss: torch.Tensor, last: bool) -> None:
        """Journal the step: why it was skipped, its metrics at the cadence, memory once. Collective."""
        self.meter.step(self.train_batches.tokens_per_step)
        if not self.engine.engine.was_step_applied():
            with self._doing(f"the diagnosis of step {step}", "diagnose"):
                args = (self.engine, self.train_batches, self.data.tokenizer, self.ranks, step, loss)
                said = describe_skip(*args, self._first_sample, self.memory.plan.fits)
                self.records.event("skipped_step", **said)
        if last or step % self.config.train.log_every == 0 or step == 1:
            self._log(step, loss)
        else:
            self.records.progress.step(step)
        if (compared := self.memory.compare(self.ranks)) is not None:
            self.records.event("memory", step=step, **compared)

    def _log(self, step: int, loss: torch.Tensor) -> None:
        mean_loss = mean_over_ranks(loss)  # waits for the device, so that the interval counts what has been computed
        interval = self.meter.interval()
        if not math.isfinite(mean_loss) and self.engine.engine.was_step_applied():
            why = "the weights are lost. The JSON has switched its check off"
            keys = "(zero_optimization.compute_grad_norm or bf16.check_grad_overflow = false)"
            raise self._stopped(f"step {step}: train/loss is {mean_loss}, and DeepSpeed applied the step: {why} {keys}")
        peak = max(self.ranks.gather(peak_memory_gib(self.engine.device.type)))
        if self.records.journal is None or interval is None:
            return
        metrics: dict[str, Any] = {
            "train/loss": mean_loss,
            "optim/lr": self.engine.step_rate,
            "optim/grad_norm": self.engine.grad_norm,
            "optim/loss_scale": self.engine.loss_scale,
            "optim/skipped_steps": self.engine.engine.skipped_steps,
            "perf/tokens_per_sec": interval.tokens_per_sec,
            "perf/step_ms": interval.step_ms,
            "perf/mfu": self.mfu(interval.tokens_per_sec),
            "mem/peak_gib": peak,
            "data/tokens": self.position.next_sample * self.train_batches.block_size,
        }
        self.records.metrics(step, metrics)
        eta = self.meter.eta_seconds(self.config.train.max_steps - step)
        self.records.progress.line(step, metrics, eta, self.saving.next_one(step))

    def _evaluate(self, step: int) -> bool:
        """Journal the loss over the validation split; whether it is the best so far. Collective."""
        with self._doing(f"the evaluation after step {step}", "eval"):
            loss = evaluation.evaluate(self.engine.engine, self.eval_batches, self.engine.device, self._poll)
        meta, best = self.data.meta.val, self.position.best_val_loss
        metrics = {"val/loss": loss, "val/bits_per_char": loss / math.log(2) / (meta.characters / meta.tokens)}
        improved = best is None or loss < best
        if improved:
            self.position.best_val_loss = loss
        self.position.last_val = {"step": step, **metrics}
        self.records.evaluated(step, metrics, improved)
        return improved

    def _sample(self, step: int) -> None:
        with self._doing(f"sampling after step {step}", "sample"):
            train, context = self.config.train, self.config.model.max_seq_length
            args = (self.engine.engine, self.prompts, self.data.tokenizer, train, context, self.ranks, self._poll)
            self.records.sampled(step, evaluation.draw(*args), self.out_dir, self.data)

    @contextlib.contextmanager
    def _doing(self, what: str, pause: str) -> Iterator[None]:
        """Leave what happens within out of the throughput, and name it in messages."""
        before = self.watchdog.doing
        self.watchdog.beat(PATIENCE, what)
        with self.meter.paused(pause):
            yield
        self.watchdog.beat(doing=before)  # not after an error, whose message names it

    def _diverged(self, known: KnownLoss | None) -> Divergence | None:
        return self.guard.divergence(self.step, self.engine.skips_in_a_row, known)

    def _stopped(self, why: str) -> NumericsError:
        self.saving.finish()
        return stopped(why, self.saving.saver, self.ranks)

    def roll_back(self, found: Divergence, must: bool = False) -> None:
        """Go back to the newest whole checkpoint, or stop, as chatgot.guard says. Collective.

        Weights, optimizer, random state and step number are the checkpoint's, but the data goes on where it was: all
        samples from the checkpoint's position to the last one that was fed are left out, and each later one is used
        some steps earlier. The checkpoint is saved again with the new position: a resume leaves out the same.

        Args:
            must: that save is the run's last chance.

        Raises:
            NumericsError: on all ranks; it shall stop, has no rollback left, or there is no checkpoint to go back to.
        """
        if found.spike_above is not None:
            sample = self._first_sample - (self.step - found.first_step) * self.train_batches.global_batch_size
            spike = describe_spike(self.engine, self.train_batches, self.data.tokenizer, self.ranks, found, sample)
            self.records.event("spike", **spike)
            found = found._replace(why=f"{found.why}; {spike['outliers']} of that batch are as bad by themselves")
        self.saving.finish()
        why, good = found.why, self.guard.checkpoint_to_go_back_to(found, self.saving.saver, self.ranks)
        self.proof.flush()
        self.proof.end("the run was rolled back first")
        from_step, end, earlier = self.step, self.position.next_sample, self.guard.rollbacks
        with self._doing(f"the rollback at step {from_step}", "rollback"):
            self.engine.restart_scheduler()
            client_state, _ = resume(self.engine.engine, good, self.fields, self.ranks)
        rng.resume(client_state["rng"], self.config.train.seed, self.ranks.rank, self.ranks.world_size, self.step)
        self.position = Position.of(client_state)
        self.guard.restore(client_state.get("guard"))
        self.engine.skips_in_a_row = 0
        first, number = self.position.next_sample, len(earlier) + 1
        self.position.next_sample = end
        self.position.skipped_samples += end - first
        done = {"from_step": from_step, "to_step": self.step, "first_sample": first, "samples": end - first}
        self.guard.rollbacks = [*earlier, {**done, "number": number, "why": why}]
        self.records.rolled_back(checkpoint=good.tag, **self.guard.rollbacks[-1])
        times = f"{number} of {self.guard.config.max_rollbacks} times"
        left_out = f"samples {first}..{end - 1} are left out, training goes on at sample {end}"
        logger.warning(f"{why}. Rolled back to {good.tag} ({times}); {left_out}")
        self.save(must)
