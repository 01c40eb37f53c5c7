"""The real training program on the device: inside the test's process, or in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chatgot.run_folder as run_folder
from chatgot.cli import train_parser
from chatgot.distributed import find_place
from chatgot.training import run
from chatgot.training.loop import Loop
from tests.gpu.machine import KIND
from tests.support import ROOT, environment, live_metrics


def argv(json: Path, out: Path, config: Path | str, data: Path | str, *more: str) -> list[str]:
    """The command line of train.py."""
    return ["--deepspeed_config", str(json), "--config", str(config), "--data", str(data), "--out_dir", str(out), *more]


def prepare(command_line: list[str]) -> Loop:
    """A loop before its first step, in this process."""
    parsed = train_parser().parse_args(command_line)
    arguments = run.TrainArguments(
        deepspeed_config=parsed.deepspeed_config,
        out_dir=parsed.out_dir,
        config=parsed.config,
        data=parsed.data,
        resume_from=parsed.resume_from,
        overrides=tuple(parsed.overrides),
    )
    return run.prepare_run(arguments, find_place())


def train(
    command_line: list[str], abandon_after: int | None = None, inspect: Callable[[Loop], Any] | None = None
) -> Any:
    """Train in this process: to the end, or until a step after which everything is left as a kill would leave it.

    Returns:
        what `inspect` says of the loop before its first step.
    """
    loop = prepare(command_line)
    seen = inspect(loop) if inspect is not None else None
    if abandon_after is None:
        with loop.stop:
            run.finish(loop)
    else:
        for step in loop.steps():
            if step == abandon_after:
                break
        run_folder.release_lock(loop.out_dir)  # as the kernel does for a process that is gone
    loop.engine.engine.destroy()
    return seen


def start(program: list[str], kind: str = KIND, timeout: float = 240.0, **env: str) -> subprocess.CompletedProcess[str]:
    """`python program` as one rank in a process of its own, which sees a CUDA device only if `kind` is cuda.

    Raises:
        AssertionError: it failed or took too long, with what it printed.
    """
    surroundings = environment(**env, DS_ACCELERATOR=kind)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUBLAS_WORKSPACE_CONFIG"):
        if name not in env:
            surroundings.pop(name, None)  # of this process, which is a rank itself
    if kind == "cpu":
        surroundings["CUDA_VISIBLE_DEVICES"] = ""
    try:
        done = subprocess.run(
            [sys.executable, *program], env=surroundings, cwd=ROOT, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired as late:
        output = [
            part.decode(errors="replace") if isinstance(part, bytes) else part or ""
            for part in (late.stdout, late.stderr)
        ]
        raise AssertionError(
            f"{program}: not done after {timeout:.0f} s\n{output[0][-3000:]}\n{output[1][-6000:]}"
        ) from None
    assert done.returncode == 0, (
        f"{program}: ended with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    )
    return done


def series(out: Path, metric: str) -> dict[int, float]:
    """{step: value} of a metric in the run as it stands."""
    return {
        record["step"]: record[metric]
        for record in live_metrics(out / "metrics.jsonl")
        if record.get(metric) is not None
    }
