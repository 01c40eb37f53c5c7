"""What the launchers' thread settings and the heartbeat cost.

Threads: two ranks on this machine's cores, started by each launcher with nothing set, against launch/run with
OMP_NUM_THREADS=1 set by hand, in turns; a turn is a run of its own, and its figure the median of `perf/step_ms`.
Heartbeat: the program's own loop with its watchdog and without, in turns of a second in one process.
"""

from __future__ import annotations

import functools
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from chatgot import run_folder
from chatgot.bench import measuring
from chatgot.bench.train import SHAPES
from chatgot.distributed import free_port
from chatgot.observe.journal import read_lines

STEPS, LOGGED, WARM = 40, 5, 2
"""Steps of a run, steps to a line, and lines of it that do not count."""
SET = ("OMP_NUM_THREADS", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GOMP_SPINCOUNT")
ROOT = Path(__file__).resolve().parents[2]
BY_HAND = "OMP_NUM_THREADS=1"


def main(argv: list[str] | None = None) -> int:
    """Print the tables of BENCHMARKS.md."""
    parser = measuring.suite_parser("launch", __doc__)
    parser.add_argument("--stages", nargs="*", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--turns", type=int, default=3, help="runs of each launcher and stage (default: 3)")
    parser.add_argument("--pairs", type=int, default=9, help="turns with the heartbeat and without (default: 9)")
    arguments = parser.parse_args(argv)
    print(measuring.describe_machine())
    if arguments.stages:
        measuring.print_head("started by", "ZeRO stage", "ms/step", "ms/step / by hand", "least .. most")
    for stage in arguments.stages:
        sides = {name: functools.partial(step_ms, name, stage) for name in (BY_HAND, "launch/run", "deepspeed")}
        times = measuring.take_turns(sides, arguments.turns)
        for name, own in times.items():
            ratios = [one / hand for one, hand in zip(own, times[BY_HAND])]
            low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
            figures = (f"{statistics.median(own):.1f}", f"{statistics.median(ratios):.2f}", f"{low} .. {high}")
            measuring.print_row(name, str(stage), *figures)
    if arguments.pairs:
        measuring.print_head("layers x width", "without ms/step", "with ms/step", "with / without", "10 % .. 90 %")
        heartbeat("4x128", arguments.pairs)
    return 0


def step_ms(launcher: str, stage: int) -> float:
    """Milliseconds of a step of two ranks: the median over the lines of a run's journal."""
    environ = {name: value for name, value in os.environ.items() if name not in SET}
    if launcher == BY_HAND:
        environ["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, str(ROOT / "launch" / "run"), "--nproc", "2", "--"]
    if launcher == "deepspeed":
        runner = str(Path(sys.executable).parent / "deepspeed")
        command = [runner, "--num_accelerators", "2", "--master_port", str(free_port()), str(ROOT / "launch/train.py")]
    with tempfile.TemporaryDirectory() as folder:
        words = ["--config", "tiny", "--deepspeed_config", "fp32_zero0", "--out_dir", f"{folder}/run"]
        words += [f"train.max_steps={STEPS}", f"train.log_every={LOGGED}", f"ds.zero_optimization.stage={stage}"]
        words += ["train.eval_every=null", "train.sample_every=null", "train.eval_tokens=10000"]
        subprocess.run([*command, *words], env=environ, capture_output=True, check=True)
        lines = [
            line["perf/step_ms"]
            for line in read_lines(Path(folder) / "run" / run_folder.METRICS)
            if line and "perf/step_ms" in line
        ]
    return statistics.median(lines[WARM:])


def heartbeat(shape: str, pairs: int) -> None:
    """Print the row of a shape."""
    from chatgot.training.run import leave

    sizes = dict(SHAPES[shape])
    batch = sizes.pop("batch")
    with tempfile.TemporaryDirectory() as folder:
        model = {"architecture": "gpt2", **sizes}
        loop = measuring.start_shape(model, batch, 0, "fp32", "wars_of_the_roses", Path(folder))
        steps = loop.steps()
        count = max(1, round(1 / measuring.seconds_per_step(steps, 10)))

        def watched() -> float:
            with loop.watchdog:
                return measuring.seconds_per_step(steps, count)

        sides = {"without": lambda: measuring.seconds_per_step(steps, count), "with": watched}
        times = measuring.take_turns(sides, pairs)
        loop.engine.engine.destroy()
    ratio, low, high = measuring.spread([one / other for one, other in zip(times["with"], times["without"])])
    figures = (f"{1000 * statistics.median(times[side]):.2f}" for side in sides)
    measuring.print_row(shape, *figures, f"{ratio:.3f}", f"{low:.3f} .. {high:.3f}")
    leave()
