"""What rank 0 writes of a run: progress, journal, events, dashboard, samples. The other ranks have none of it."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import chatgot.run_folder as run_folder
from chatgot.config.run import RunConfig
from chatgot.data.prepared import PreparedData
from chatgot.devices import deterministic, device_name
from chatgot.distributed import ControlGroup, Place
from chatgot.engine.build import versions
from chatgot.engine.step import TrainingEngine
from chatgot.errors import ConfigError
from chatgot.observe.goodput import Ledger
from chatgot.observe.journal import Events, Journal, Tolerant, read_lines
from chatgot.observe.progress import Progress
from chatgot.observe.report import ReportWriter
from chatgot.observe.wandb_run import WandbRun
from chatgot.proof import digest
from chatgot.proof.compare import Overlap, Proof, setup
from chatgot.proof.fed import Order
from chatgot.training import evaluation
from chatgot.training.evaluation import Copied, Sample
from chatgot.training.preparation import Resumed, TrainArguments

logger = logging.getLogger(__name__)


@dataclass
class Records:
    """Rank 0's outputs; without journal, events and dashboard on the other ranks, whose progress is silent."""

    progress: Progress
    journal: Journal | None = None
    events: Events | None = None
    wandb: WandbRun | None = None
    ledger: Ledger | None = None
    report: ReportWriter | None = None
    monitor: Any = None
    """DeepSpeed's, where the JSON has tensorboard, csv_monitor or comet."""
    _finds_copies: bool = True
    _monitored: Tolerant = field(default_factory=lambda: Tolerant("records of tensorboard, csv or comet"))
    _samples: Tolerant = field(default_factory=lambda: Tolerant("samples"))

    def event(self, kind: str, **fields: Any) -> None:
        """Append to events.jsonl, and tell the dashboard."""
        if self.events is not None:
            self.events.event(kind, **fields)
        if self.wandb is not None:
            self.wandb.event(kind, fields)

    def metrics(self, step: int, metrics: dict[str, Any]) -> None:
        """Append a step's metrics to metrics.jsonl and send them to the dashboards; now and then tell the ledger."""
        if self.ledger is not None:
            metrics = {**metrics, "goodput/wall_seconds": round(sum(self.ledger.seconds().values()), 3)}
        if self.journal is not None:
            self.journal.append({"step": step, **metrics})
        if self.wandb is not None:
            self.wandb.log(metrics, step)
        if self.monitor is not None:
            told = [(name, value, step) for name, value in metrics.items() if value is not None]
            self._monitored.attempt(lambda: self.monitor.write_events(told))
        self.account(step, due=False)

    def evaluated(self, step: int, metrics: dict[str, Any], improved: bool) -> None:
        """Journal and show an evaluation, and whether it is the best so far."""
        self.metrics(step, metrics)
        if improved and self.wandb is not None:
            self.wandb.summarize(best_val_loss=metrics["val/loss"], best_step=step)
        self.progress.line(step, metrics)

    def account(self, step: int, due: bool = True) -> dict[str, Any] | None:
        """Tell where the wall time has gone up to this step, if it is due or was not told for long; returns that."""
        if self.ledger is None or not (due or self.ledger.due()):
            return None
        told = self.ledger.tell(step)
        self.event("goodput", step=step, **told)
        if self.wandb is not None:
            parts = {f"goodput/{part}_seconds": seconds for part, seconds in told["seconds"].items()}
            self.wandb.log({"goodput/fraction": told["goodput"], **parts}, step)
        return told

    def sampled(self, step: int, samples: list[Sample], out_dir: Path, data: PreparedData) -> None:
        """Write samples/step-000500.txt, show the beginning of the first sample, and journal what is copied."""
        if self.journal is None:
            return
        path, copied = out_dir / run_folder.SAMPLES / f"step-{step:06d}.txt", self._copied(samples, data)
        text = "\n\n".join(f"=== {prompt!r}\n{prompt}{continued}" for prompt, continued in samples) + "\n"
        if self._samples.attempt(lambda: evaluation.write_samples(path, text)):
            searched = None if copied is None else copied.searched_tokens
            where = {"path": str(path.relative_to(out_dir)), "searched_tokens": searched, "of_tokens": len(data.train)}
            self.event("sampled", step=step, **where)
        self.progress.say(f"sample at step {step}: {samples[0][0]}{samples[0][1][:200]}")
        if self.wandb is not None:
            rows = [
                [step, prompt, continued, "\n".join(continued[begin:end] for begin, end in passages)]
                for (prompt, continued), passages in zip(samples, copied.passages if copied else [[]] * len(samples))
            ]
            self.wandb.log_table("samples", ("step", "prompt", "continuation", "copied"), rows, step)
        if copied is not None:
            self.metrics(step, copied.metrics)

    def _copied(self, samples: list[Sample], data: PreparedData) -> Copied | None:
        """What the samples have from the training text; None, said once, where it cannot be looked for."""
        if self._finds_copies:
            try:
                return evaluation.copied(samples, data)
            except ConfigError as error:
                self._finds_copies = False
                logger.warning(f"sample/copied_fraction and sample/longest_copy are left out: {error}")
        return None

    def rolled_back(self, from_step: int, to_step: int, **fields: Any) -> None:
        """The run goes back to the checkpoint of `to_step`."""
        if self.ledger is not None:
            self.ledger.go_back(from_step, to_step)
        self.event("rolled_back", from_step=from_step, to_step=to_step, **fields)

    def flush(self) -> None:
        """Let journal and events reach the disk, as every checkpoint does."""
        for lines in (self.journal, self.events):
            if lines is not None:
                lines.flush()

    def saved(self, device_type: str) -> None:
        """Begin to write the report after a save, unless training needs the processors itself."""
        if self.report is not None and device_type != "cpu":
            self.report.begin()

    def close(self) -> None:
        """Close the bar and the files. The dashboard is closed by its own `finish`, which waits for an upload."""
        self.progress.close()
        if self.events is not None and self.journal is not None:
            self.events.close()
            self.journal.close()


def open_records(
    arguments: TrainArguments,
    place: Place,
    progress: Progress,
    config: RunConfig,
    engine: TrainingEngine,
    data: PreparedData,
    resumed: Resumed | None,
    ranks: ControlGroup,
    ledger: Ledger,
) -> tuple[Records, Proof]:
    """Rank 0 opens journal, events and wandb, and writes the resolved settings; the others get silent ones."""
    device, out_dir = engine.device, arguments.out_dir
    if place.rank != 0:
        return Records(progress), Proof(ranks, device)
    step, run, engine_json = engine.engine.global_steps, config.to_dict(), engine.config.to_dict()
    differences, changes, offset, known = list[str](), list[str](), 0, None
    order = Order(0, engine.config.train_batch_size, config.train.seed, config.model.max_seq_length, data.fingerprint)
    if resumed is not None:  # all of it before this start writes its own
        earlier, offset = resumed.checkpoint.folder.parent, resumed.client_state.get("skipped_samples", 0)
        other = None if earlier.resolve() == out_dir.resolve() else str(earlier.resolve())
        order = replace(order, next_sample=resumed.client_state["next_sample"], run=other)
        differences, changes = resumed.changes, run_folder.changed_settings(earlier, run, engine_json)
        known = digest.history(earlier, after=step)
    data_changes = [line for line in differences if line.startswith("data:")]
    chip = (device_name(device), deterministic(device))
    now = setup(config, engine.config, data.fingerprint, place.world_size, *chip, versions(), [*data_changes, *changes])
    extra = {
        **versions(),
        "data": {"spec": arguments.data, "fingerprint": data.fingerprint},
        "launcher": place.launcher,
        "world_size": place.world_size,
    }
    run_folder.write_settings(out_dir, run, engine_json, run_folder.environment(extra))
    data.tokenizer.save(out_dir / run_folder.TOKENIZER)
    journal = out_dir / run_folder.METRICS
    ledger.go_on(read_lines(out_dir / run_folder.EVENTS), journal, step)
    records = Records(progress, Journal(journal), Events(out_dir / run_folder.EVENTS), ledger=ledger)
    records.report = ReportWriter(out_dir)
    for change in changes:
        logger.info(f"changed since the checkpoint's run: {change}")
    records.wandb = WandbRun(
        engine.config.wandb,
        run_dir=out_dir,
        run_name=arguments.run_name or out_dir.resolve().name,
        run_config={"run": run, "deepspeed": engine_json},
        resumed_from_step=step if resumed else None,
        tags=engine.config.chatgot.wandb.tags,
    )
    records.monitor = engine.engine.monitor if engine.engine.monitor.enabled else None
    for note in resumed.checkpoint.notes if resumed else ():
        records.event("resume_warning", message=note)
    origin = {"from": str(resumed.checkpoint.path)} if resumed else {}
    records.event(
        "resumed" if resumed else "started",
        step=step,
        **origin,
        adapted=[finding.text for finding in engine.config.findings if finding.level == "adapted"],
        changes=list(dict.fromkeys([*differences, *changes])),
        world_size=place.world_size,
        zero_stage=engine.config.zero_stage,
        precision=engine.config.precision,
        data_order=asdict(order),
        setup=asdict(now),
    )
    overlap = Overlap(step, now, known, records.event, offset) if known else None
    return records, Proof(ranks, device, records.journal, now.id, overlap)
