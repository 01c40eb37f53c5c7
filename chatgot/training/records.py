"""What rank 0 writes of a run: progress, journal, events, dashboard, samples. The other ranks have none of it."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import chatgot.run_folder as run_folder
from chatgot.checkpoint.load import Found
from chatgot.config.run import RunConfig
from chatgot.data.prepared import PreparedData
from chatgot.devices import deterministic, device_name
from chatgot.distributed import ControlGroup, Place
from chatgot.engine.build import versions
from chatgot.engine.step import TrainingEngine
from chatgot.observe.journal import Events, Journal, TolerantWriter
from chatgot.observe.progress import Progress
from chatgot.observe.wandb_run import WandbRun
from chatgot.proof import digest
from chatgot.proof.compare import Overlap, Proof, setup
from chatgot.training import samples

logger = logging.getLogger(__name__)


@dataclass
class Records:
    """Rank 0's outputs; without journal, events and dashboard on the other ranks, whose progress is silent."""

    progress: Progress
    journal: Journal | None = None
    events: Events | None = None
    wandb: WandbRun | None = None
    _samples: TolerantWriter = field(default_factory=lambda: TolerantWriter("samples"))

    def event(self, kind: str, **fields: Any) -> None:
        """Append to events.jsonl."""
        if self.events is not None:
            self.events.event(kind, **fields)

    def metrics(self, step: int, metrics: dict[str, Any]) -> None:
        """Append a step's metrics to metrics.jsonl and send them to the dashboard."""
        if self.journal is not None:
            self.journal.append({"step": step, **metrics})
        if self.wandb is not None:
            self.wandb.log({name: value for name, value in metrics.items() if value is not None}, step)

    def sampled(self, step: int, drawn: list[samples.Sample], out_dir: Path) -> None:
        """Write samples/step-000500.txt, and show the beginning of the first sample."""
        if self.journal is None:
            return
        path, text = samples.path(out_dir / run_folder.SAMPLES, step), samples.as_text(drawn)
        if self._samples.attempt(lambda: samples.write(path, text)):
            self.event("sampled", step=step, path=str(path.relative_to(out_dir)))
        self.progress.say(f"sample at step {step}: {drawn[0].prompt}{drawn[0].text[:200]}")
        if self.wandb is not None:
            self.wandb.log_text("samples", text, step)

    def close(self) -> None:
        """Close the bar and the files. The dashboard is closed by its own `finish`, which waits for an upload."""
        self.progress.close()
        files: Iterable[Events | Journal | None] = (self.events, self.journal)
        for file in files:
            if file is not None:
                file.close()


def open_records(
    data_spec: str,
    out_dir: Path,
    run_name: str | None,
    progress: Progress,
    config: RunConfig,
    engine: TrainingEngine,
    data: PreparedData,
    resumed: Found | None,
    since_checkpoint: list[str],
    offset: int,
    ranks: ControlGroup,
    device: torch.device,
    place: Place,
) -> tuple[Records, Proof]:
    """Rank 0 opens journal, events and wandb, and writes the resolved settings; the others get silent ones.

    Args:
        since_checkpoint: what differs from the checkpoint, a line each; what differs from the settings in its run
            folder is found here.
        offset: samples that rollbacks have left out so far.
    """
    if place.rank != 0:
        return Records(progress), Proof(ranks, device)
    step = engine.engine.global_steps
    run, engine_json = config.to_dict(), engine.config.to_dict()
    changes = run_folder.changed_settings(resumed.folder.parent, run, engine_json) if resumed else []
    data_changes = [line for line in since_checkpoint if line.startswith("data:")]
    chip = (device_name(device), deterministic(device))
    now = setup(config, engine.config, data.fingerprint, place.world_size, *chip, versions(), [*data_changes, *changes])
    known = digest.history(resumed.folder.parent, after=step) if resumed else None
    extra = {
        **versions(),
        "data": {"spec": data_spec, "fingerprint": data.fingerprint},
        "launcher": place.launcher,
        "world_size": place.world_size,
    }
    run_folder.write_settings(out_dir, run, engine_json, run_folder.environment(extra), data.tokenizer)
    records = Records(progress, Journal(out_dir / run_folder.METRICS), Events(out_dir / run_folder.EVENTS))
    for change in changes:
        logger.info(f"changed since the checkpoint's run: {change}")
    records.wandb = WandbRun.start(
        engine.config.wandb,
        run_dir=out_dir,
        run_name=run_name or out_dir.resolve().name,
        run_config={"run": run, "deepspeed": engine_json},
        resumed_from_step=step if resumed else None,
    )
    for note in resumed.notes if resumed else ():
        records.event("resume_warning", message=note)
    origin: dict[str, Any] = {"from": str(resumed.path)} if resumed else {}
    records.event(
        "resumed" if resumed else "started",
        step=step,
        **origin,
        changes=list(dict.fromkeys([*since_checkpoint, *changes])),
        world_size=place.world_size,
        zero_stage=engine.config.zero_stage,
        precision=engine.config.precision,
        setup=now.to_json(),
    )
    overlap = Overlap(step, now, known, records.event, offset) if known else None
    return records, Proof(ranks, device, records.journal, now.id, overlap)
