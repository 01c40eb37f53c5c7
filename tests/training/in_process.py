"""The training program inside the test's own process: everything that a process of its own would not add to."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from chatgot import cli
from chatgot.checkpoint import manifest
from chatgot.checkpoint.load import find
from chatgot.checkpoint.portable import fp32_weights
from chatgot.distributed import find_place
from chatgot.launcher.arguments import given_to
from chatgot.observe.journal import read_journal
from chatgot.training import run
from chatgot.training.loop import Loop
from tests.support import live_metrics


@contextlib.contextmanager
def cpu_environment(**more: str | None) -> Iterator[None]:
    """One rank on the CPU, no dashboard; afterwards os.environ as it was, because other tests start processes with it.

    LOCAL_RANK stays: ZeRO-3 reads it while it trains (deepspeed/runtime/zero/utils.py), and a process that is started
    sets its own.
    """
    before = {**os.environ, "LOCAL_RANK": "0"}
    for name, value in {"DS_ACCELERATOR": "cpu", "WANDB_MODE": "disabled", "CHATGOT_REPORT": "off", **more}.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def argv(json: Path, out: Path, config: Path | str, data: Path | str, *more: str) -> list[str]:
    """The command line of train.py."""
    return ["--deepspeed_config", str(json), "--config", str(config), "--data", str(data), "--out_dir", str(out), *more]


def arguments(command_line: list[str]) -> run.TrainArguments:
    return given_to(run.TrainArguments, cli.train_parser().parse_args(command_line))


def train(command_line: list[str], **environment: str | None) -> int:
    """Train to the end; the exit code, or the refusal as an exception. A variable that is None is unset."""
    with cpu_environment(**environment):
        return run.train(arguments(command_line))


def prepare(command_line: list[str]) -> Loop:
    """A loop before its first step; end it with run.finish, or abandon it as a kill would."""
    with cpu_environment():
        return run.prepare_run(arguments(command_line), find_place())


def abandon_after(step: int, command_line: list[str]) -> None:
    """Train until `step` and leave everything as a kill would: nothing is closed, saved or reported."""
    for done in prepare(command_line).steps():
        if done == step:
            break


def refused(command_line: list[str]) -> int:
    """train.py's exit code for a command line that it refuses; what it says is on the streams."""
    with cpu_environment():
        try:
            cli.train(command_line)
        except SystemExit as end:
            return int(end.code or 0)
    raise AssertionError("cli.train returned")


def series(out: Path, metric: str) -> dict[int, float]:
    """{step: value} of a metric in the run as it stands."""
    return {record["step"]: record[metric] for record in live_metrics(out / "metrics.jsonl") if metric in record}


def events(out: Path, kind: str | None = None) -> list[dict[str, Any]]:
    return [record for record in read_journal(out / "events.jsonl")[0] if kind in (None, record["event"])]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def tags(out: Path) -> list[int]:
    """Steps of the published checkpoints."""
    return sorted(
        int(path.parent.name.removeprefix("step-")) for path in (out / "checkpoints").glob("step-*/manifest.json")
    )


def rehash(checkpoint: Path) -> None:
    """Make the manifest fit the files as they are now, as whoever forges a checkpoint would."""
    fields = json.loads((checkpoint / manifest.NAME).read_text())
    fields.pop("sha256")
    manifest.write(
        checkpoint,
        {**fields, "files": {name: manifest.measure(checkpoint / name) for name in manifest.listed(checkpoint)}},
    )


def weights(out: Path) -> dict[str, torch.Tensor]:
    """The fp32 weights of a run's newest checkpoint."""
    found = find(out / "checkpoints")
    assert found is not None
    return fp32_weights(found)
