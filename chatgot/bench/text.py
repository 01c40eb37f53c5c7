"""Time and memory of text: turning it into tokens, and finding what a sample has of it."""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from chatgot.bench import measuring

METHODS = ("char", "byte", "list comprehension")
COPIED = 300
"""Characters of the sample that stand in the text; the others are drawn from its letters."""


def prepare(argv: Sequence[str]) -> None:
    """How fast text becomes tokens: `prepare` against the recipe `[stoi[c] for c in text]`, each in its own process."""
    parser = measuring.suite_parser(prepare)
    parser.add_argument("--megabytes", type=int, default=100, help="size of the generated text (default: 100)")
    rounds = "runs of each method, interleaved; the fastest counts (default: 2)"
    parser.add_argument("--rounds", type=int, default=2, help=rounds)
    parser.add_argument("--seed", type=int, default=0, help="seed of the generated text")
    parser.add_argument("--measure", nargs=3, metavar=("METHOD", "TEXT", "OUT"), help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.measure:
        _measure_prepare(*given.measure)
        return
    results: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    with tempfile.TemporaryDirectory(prefix="chatgot-bench-") as folder:
        text = Path(folder) / "text.txt"
        size = write_text(text, given.megabytes * 1_000_000, given.seed)
        for round_number in range(given.rounds):
            for method in METHODS:
                out = Path(folder) / f"{method.replace(' ', '-')}-{round_number}"
                words = ("--measure", method, str(text), str(out))
                results[method] += measuring.in_own_process("prepare", *words)
    where = f"Python {platform.python_version()}, {platform.machine()}"
    print(f"{size / 1e6:.0f} MB of ASCII, {where}, best of {given.rounds}\n")
    measuring.print_head("method", "CPU s", "MB/s of CPU time", "wall s", "peak RSS MB")
    for method, runs in results.items():
        best = min(runs, key=lambda run: run["cpu_s"])
        cpu_s, rate = f"{best['cpu_s']:.2f}", f"{size / 1e6 / best['cpu_s']:.0f}"
        measuring.print_row(method, cpu_s, rate, f"{best['wall_s']:.2f}", f"{best['peak_rss_mb']:.0f}")


def copies(argv: Sequence[str]) -> None:
    """How long `--mark_copied` takes to find what a sample has verbatim from its training text, with places."""
    parser = measuring.suite_parser(copies)
    parser.add_argument("--megabytes", type=int, default=100, help="size of the generated text (default: 100)")
    parser.add_argument("--characters", type=int, default=1000, help="length of the sample (default: 1000)")
    parser.add_argument("--tokenizers", nargs="+", default=["char", "byte", "bpe"], metavar="KIND")
    parser.add_argument("--rounds", type=int, default=5, help="searches of each; medians and the fastest are printed")
    parser.add_argument("--measure", nargs=2, metavar=("PREPARED", "ROUNDS"), help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.measure:
        _measure_copies(Path(given.measure[0]), int(given.measure[1]), given.characters)
        return
    from chatgot.config.run import DataConfig
    from chatgot.data.prepare import prepare

    print(f"{given.megabytes} MB of ASCII, a sample of {given.characters} characters; {measuring.describe_machine()}\n")
    measuring.print_head("tokenizer", "CPU s", "wall s", "fastest", "peak RSS MB")
    with tempfile.TemporaryDirectory(prefix="chatgot-bench-") as folder:
        text = Path(folder) / "text.txt"
        write_text(text, given.megabytes * 1_000_000, seed=0)
        for kind in given.tokenizers:
            out = Path(folder) / kind
            prepare(str(text), out, DataConfig(tokenizer=kind, val_fraction=0.001))
            words = ("--measure", str(out), str(given.rounds), "--characters", str(given.characters))
            found = measuring.in_own_process("copies", *words)
            cpu_s, wall_s = ([one[name] for one in found] for name in ("cpu_s", "wall_s"))
            times = (statistics.median(cpu_s), statistics.median(wall_s), min(wall_s))
            measuring.print_row(kind, *(f"{one:.2f}" for one in times), f"{found[-1]['peak_rss_mb']:.0f}")


def write_text(path: Path, size: int, seed: int) -> int:
    """Write `size` bytes of drama-like ASCII, pages of random sentences in ever another order; returns the size."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlucmfwypvbgkqjxz", k=rng.randint(1, 9))) for _ in range(3000)]
    lines = []
    for _ in range(20_000):
        line = " ".join(rng.choices(words, k=rng.randint(3, 12)))
        lines.append(f"{rng.choice(words).upper()}: {line.capitalize()}{rng.choice('.,!?;')}\n")
    written = 0
    with path.open("w", encoding="ascii", newline="\n") as file:
        while written < size:
            page = "".join(rng.choices(lines, k=5000))[: size - written]
            written += file.write(page)
    return written


def _print_cost(work: Callable[[], object], rounds: int = 1) -> None:
    """CPU and wall seconds of each round, and the process's peak memory after it, as JSON."""
    from chatgot.observe.meters import peak_memory_gib

    costs = []
    for _ in range(rounds):
        cpu, wall = time.process_time(), time.perf_counter()
        work()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        costs.append({"cpu_s": cpu, "wall_s": wall, "peak_rss_mb": peak_memory_gib("cpu") * 2**30 / 1e6})
    print(json.dumps(costs))


def _measure_prepare(method: str, text: str, out: str) -> None:
    from chatgot.config.run import DataConfig
    from chatgot.data.prepare import prepare

    if method == "list comprehension":
        _print_cost(lambda: _list_comprehension(Path(text), Path(out)))
    else:
        config = DataConfig.model_validate({"tokenizer": method})
        _print_cost(lambda: prepare(text, Path(out), config))


def _list_comprehension(text: Path, out: Path) -> None:
    """The recipe of nanoGPT's data/shakespeare_char/prepare.py."""
    import numpy as np

    data = text.read_text(encoding="utf-8")
    stoi = {c: i for i, c in enumerate(sorted(set(data)))}
    cut = int(len(data) * 0.9)
    out.mkdir()
    for name, part in (("train", data[:cut]), ("val", data[cut:])):
        np.array([stoi[c] for c in part], dtype=np.uint16).tofile(out / f"{name}.bin")


def _measure_copies(prepared: Path, rounds: int, characters: int) -> None:
    from chatgot.data.copies import find_copies
    from chatgot.data.prepared import open_prepared

    data, rng = open_prepared(prepared), random.Random(0)
    copied = data.tokenizer.decode(data.train[-10 * COPIED : -9 * COPIED])[:COPIED]
    sample = copied + "".join(rng.choices("etaoin shrdlu", k=characters - len(copied)))
    _print_cost(lambda: find_copies(sample, data), rounds)
