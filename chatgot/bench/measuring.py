"""What the suites share: runs of the real program that are stepped in turns, and the tables of BENCHMARKS.md.

Imports torch when a run is started, not before: the suite `prepare` measures the memory of a process without it.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chatgot.training.loop import Loop

ENDLESS = 10**6
"""Optimizer steps of a run that the benchmark ends."""


def suite_parser(suite: Callable[..., None]) -> argparse.ArgumentParser:
    """The command line of one suite."""
    prog, kind = f"launch/bench.py --suite {suite.__name__}", argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=prog, description=inspect.getdoc(suite), formatter_class=kind)


def in_own_process(suite: str, *words: str, timeout: float | None = None) -> Any:
    """The JSON that a suite prints in a fresh process, so that no memory of this one is counted.

    Raises:
        subprocess.CalledProcessError: it failed; its output is on the streams.
    """
    program = Path(__file__).resolve().parents[2] / "launch" / "bench.py"
    command = [sys.executable, str(program), "--suite", suite, *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=timeout)
    return json.loads(done.stdout.splitlines()[-1])


def start_run(deepspeed_config: str, config: str, data: str, folder: Path, overrides: Sequence[str] = ()) -> Loop:
    """The whole program, ready for its first step. It writes to `folder`, and what it says to log.txt there."""
    from chatgot.distributed import find_place
    from chatgot.observe.progress import Progress
    from chatgot.training.run import TrainArguments, prepare_run

    folder.mkdir(exist_ok=True)
    arguments = TrainArguments(deepspeed_config, folder / "run", config=config, data=data, overrides=tuple(overrides))
    progress = Progress(ENDLESS, stream=open(folder / "log.txt", "w"))  # noqa: SIM115 - lives as long as the run
    return prepare_run(arguments, find_place(), progress)


def start_shape(
    model: dict[str, Any], batch: int, stage: int, precision: str, data: str, folder: Path, **more: Any
) -> Loop:
    """`start_run` of a `model:` section; `batch` sequences a rank and step, and `more` keys of the JSON."""
    import yaml

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    adamw = {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1, "torch_adam": True, "fused": True}
    quiet = {"schedule": {"type": "cosine"}, "checkpoint": {"every_steps": None, "every_minutes": None}}
    engine = {
        "train_batch_size": batch * ranks,
        "train_micro_batch_size_per_gpu": batch,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": adamw},
        "zero_optimization": {"stage": stage, "overlap_comm": False},
        "timers": {"throughput": {"enabled": False}},
        "bf16": {"enabled": precision == "bf16"},
        **more,
        "chatgot": {**quiet, **more.get("chatgot", {})},
    }
    train = {"max_steps": ENDLESS, "eval_every": None, "sample_every": None, "log_every": 10}
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump({"model": model, "train": train}), encoding="utf-8")
    (folder / "engine.json").write_text(json.dumps(engine), encoding="utf-8")
    return start_run(str(folder / "engine.json"), str(folder / "run.yaml"), data, folder)


def timed(work: Callable[[], Any]) -> float:
    """Seconds that `work` takes, its CUDA kernels included."""
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def seconds_per_step(steps: Iterator[Any], count: int) -> float:
    """Mean over `count` steps."""
    return timed(lambda: [next(steps) for _ in range(count)]) / count


def take_turns(sides: Mapping[str, Callable[[], float]], turns: int) -> dict[str, list[float]]:
    """What each side measured, one entry per turn. The order rotates, so that drift hits all alike."""
    measured: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    for _ in range(turns):
        for name in order:
            measured[name].append(sides[name]())
        order.append(order.pop(0))
    return measured


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, and where the lowest and the highest tenth end."""
    ordered = sorted(values)
    return statistics.median(ordered), ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]


def print_head(*columns: str) -> None:
    """The head of a markdown table."""
    print_row(*columns)
    print("|" + "---|" * len(columns))


def print_row(*cells: str) -> None:
    """A row of a markdown table."""
    print(f"| {' | '.join(cells)} |", flush=True)


def describe_machine() -> str:
    """Processor, cores in use, threads, GPU and versions, in one line."""
    import torch

    processor, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        named = (line for line in info.read_text().splitlines() if line.startswith("model name"))
        processor = next((line.split(":", 1)[1].strip() for line in named), processor)
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads, python = torch.get_num_threads(), platform.python_version()
    return f"{processor}, {cores} cores, {threads} threads{gpu}; torch {torch.__version__}, Python {python}"
