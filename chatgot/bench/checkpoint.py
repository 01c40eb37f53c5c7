"""Time of checkpoints."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from chatgot.bench import measuring
from chatgot.checkpoint import manifest, pickles
from chatgot.checkpoint.load import Found, find
from chatgot.checkpoint.resume import resume
from chatgot.checkpoint.save import Saver
from chatgot.deepspeed_json.settings import CheckpointConfig
from chatgot.files import sync
from chatgot.training.loop import Loop
from chatgot.training.run import leave

QUIET = (
    f"train.max_steps={measuring.ENDLESS}",
    "train.eval_every=null",
    "train.sample_every=null",
    "ds.chatgot.checkpoint.every_steps=null",
    "ds.chatgot.checkpoint.every_minutes=null",
)


def checkpoint(argv: Sequence[str]) -> None:
    """What a checkpoint costs: saving and loading against torch and the disk alone, and how long training stands still.

    Every round measures each of them once, one after the other, so that the machine's drift hits all; the figures are
    medians.
    """
    parser = measuring.suite_parser(checkpoint)
    preset, steps = "chatgot_small_14M_clean", "steps per round that the step time is taken of (default: 2)"
    parser.add_argument("--config", default=preset, help="preset or run YAML (default: the 14 M one)")
    parser.add_argument("--deepspeed_config", default="ds_configs/fp32_zero0.json")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help=steps)
    parser.add_argument("--data", default="wars_of_the_roses")
    parser.add_argument("--dir", help="a folder on the disk to measure (default: the system's temporary folder)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=given.dir) as folder:
        overrides = (*QUIET, *given.overrides)
        loop = measuring.start_run(given.deepspeed_config, given.config, given.data, Path(folder), overrides)
        print(measuring.describe_machine())
        measured, size = measure(loop, Path(folder), given.rounds, given.steps)
        report(measured, size)
        loop.engine.engine.destroy()
    leave()


def measure(loop: Loop, folder: Path, rounds: int, steps_a_round: int) -> tuple[dict[str, list[float]], int]:
    """Seconds by what was measured, in the order of the rounds, and the bytes of a checkpoint."""
    savers = {
        name: Saver(folder / name, CheckpointConfig(keep_best=0, **{"async": name == "async"}), loop.ranks)
        for name in ("at once", "async")
    }
    steps = loop.steps()
    measuring.seconds_per_step(steps, 2)
    seconds: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds + 1):  # the first one warms up
        times = {"step": measuring.seconds_per_step(steps, steps_a_round)}
        times |= _at_once(loop, savers["at once"], folder)
        times |= _in_the_background(loop, savers["async"], steps)
        if number:
            for name, value in times.items():
                seconds[name].append(value)
    return dict(seconds), sum(entry["bytes"] for entry in _newest(savers["at once"]).manifest["files"].values())


def _begin(loop: Loop, saver: Saver) -> None:
    saver.begin(loop.engine.engine, loop.client_state(), {**loop.fields, "tokens": 0, "val_loss": None})


def _at_once(loop: Loop, saver: Saver, folder: Path) -> dict[str, float]:
    """One save and one load, and torch and the disk doing the same."""
    times = {"save at once": measuring.timed(lambda: (_begin(loop, saver), saver.finish()))}
    found = _newest(saver)
    names = [name for name in manifest.listed(found.path) if name.endswith(".pt")]
    states = {name: pickles.read(found.path / name) for name in names}
    sizes = [(found.path / name).stat().st_size for name in names]
    works = {
        "torch.save and fsync": lambda: [_save(folder / f"raw-{name}", state) for name, state in states.items()],
        "the disk alone": lambda: [_write(folder / f"bytes-{n}", size) for n, size in enumerate(sizes)],
        "hashing": lambda: [manifest.measure(found.path / name) for name in manifest.listed(found.path)],
        "torch.load": lambda: [pickles.read(folder / f"raw-{name}") for name in names],
        "load: verify": lambda: find(found.folder, found.tag),
        "load: into the engine": lambda: resume(loop.engine.engine, found, loop.fields, loop.ranks),
    }
    return times | {name: measuring.timed(work) for name, work in works.items()}


def _in_the_background(loop: Loop, saver: Saver, steps: Iterator[int]) -> dict[str, float]:
    """One save while training goes on."""
    started, count, saved = time.perf_counter(), 0, None
    _begin(loop, saver)
    while saved is None:
        if saver.busy:
            next(steps)
            count += 1
        else:
            saved = saver.advance()
    total = time.perf_counter() - started
    meanwhile = {"async: step meanwhile": (total - saved.stalled_seconds) / count} if count else {}
    return {"async: until published": total, "async: stall": saved.stalled_seconds, **meanwhile}


def report(seconds: dict[str, list[float]], size: int) -> None:
    """The medians, and what follows from them."""
    median = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"a checkpoint is {size / 1e6:.1f} MB; {len(seconds['step'])} rounds")
    measuring.print_head("", "median ms", "least .. most", "MB/s", "of a step")
    for name, values in seconds.items():
        rate = "" if "step" in name or "stall" in name else f"{size / 1e6 / median[name]:.0f}"
        reach = f"{1000 * min(values):.0f} .. {1000 * max(values):.0f}"
        share = f"{100 * median[name] / median['step']:.1f} %"
        measuring.print_row(name, f"{1000 * median[name]:.0f}", reach, rate, share)

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(seconds[a], seconds[b]))

    print(f"save at once / torch.save and fsync: {ratio('save at once', 'torch.save and fsync'):.2f}")
    print(f"disk's own speed kept by save at once: {ratio('the disk alone', 'save at once'):.2f}")
    print(f"hashing / save at once: {ratio('hashing', 'save at once'):.2f}")
    loading = ratio("load: verify", "torch.load") + ratio("load: into the engine", "torch.load")
    print(f"load (verify and into the engine) / torch.load: {loading:.2f}")
    print(f"stall, async / at once: {ratio('async: stall', 'save at once'):.3f}")


def _newest(saver: Saver) -> Found:
    found = find(saver.folder)
    assert found is not None
    return found


def _save(path: Path, state: dict[str, Any]) -> None:
    torch.save(state, path)
    sync(path)


def _write(path: Path, size: int) -> None:
    block, left = os.urandom(1 << 20) * 4, size
    with open(path, "wb", buffering=0) as file:
        while left:
            left -= file.write(block[: min(left, len(block))])
        os.fsync(file.fileno())
