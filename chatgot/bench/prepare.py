"""How fast text becomes tokens: `prepare` against the recipe `[stoi[c] for c in text]`, each in its own process."""

from __future__ import annotations

import argparse
import json
import platform
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chatgot.bench import measuring

METHODS = ("char", "byte", "list comprehension")


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare generated ASCII text with every method and print CPU time, speed and peak memory as a markdown table."""
    parser = measuring.suite_parser("prepare", __doc__)
    parser.add_argument("--megabytes", type=int, default=100, help="size of the generated text (default: 100)")
    rounds = "runs of each method, interleaved; the fastest counts (default: 2)"
    parser.add_argument("--rounds", type=int, default=2, help=rounds)
    parser.add_argument("--seed", type=int, default=0, help="seed of the generated text")
    parser.add_argument("--measure", nargs=3, metavar=("METHOD", "TEXT", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        print(json.dumps(_measure(*args.measure)))
        return 0
    results: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    with tempfile.TemporaryDirectory(prefix="chatgot-bench-") as folder:
        text = Path(folder) / "text.txt"
        size = generate(text, args.megabytes * 1_000_000, args.seed)
        for round_number in range(args.rounds):
            for method in METHODS:
                out = Path(folder) / f"{method.replace(' ', '-')}-{round_number}"
                words = ("--measure", method, str(text), str(out))
                results[method].append(measuring.in_own_process("prepare", *words))
    where = f"Python {platform.python_version()}, {platform.machine()}"
    print(f"{size / 1e6:.0f} MB of ASCII, {where}, best of {args.rounds}\n")
    measuring.print_head("method", "CPU s", "MB/s of CPU time", "wall s", "peak RSS MB")
    for method, runs in results.items():
        best = min(runs, key=lambda run: run["cpu_s"])
        cpu_s, rate = f"{best['cpu_s']:.2f}", f"{size / 1e6 / best['cpu_s']:.0f}"
        measuring.print_row(method, cpu_s, rate, f"{best['wall_s']:.2f}", f"{best['peak_rss_mb']:.0f}")
    return 0


def generate(path: Path, size: int, seed: int) -> int:
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


def _measure(method: Any, text: str, out: str) -> dict[str, float]:
    """CPU and wall seconds of one method after its imports, and the process's peak memory."""
    from chatgot.config.run import DataConfig
    from chatgot.data.prepare import prepare
    from chatgot.observe.meters import peak_memory_gib

    cpu, wall = time.process_time(), time.perf_counter()
    if method == "list comprehension":
        _list_comprehension(Path(text), Path(out))
    else:
        prepare(text, out, DataConfig(tokenizer=method))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"cpu_s": cpu, "wall_s": wall, "peak_rss_mb": peak_memory_gib("cpu") * 2**30 / 1e6}


def _list_comprehension(text: Path, out: Path) -> None:
    """The recipe of nanoGPT's data/shakespeare_char/prepare.py."""
    import numpy as np

    data = text.read_text(encoding="utf-8")
    stoi = {c: i for i, c in enumerate(sorted(set(data)))}
    cut = int(len(data) * 0.9)
    out.mkdir()
    for name, part in (("train", data[:cut]), ("val", data[cut:])):
        np.array([stoi[c] for c in part], dtype=np.uint16).tofile(out / f"{name}.bin")
