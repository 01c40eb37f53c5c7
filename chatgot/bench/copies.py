"""How long `--mark_copied` takes to find what a sample has verbatim from its training text, with places."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chatgot.bench import measuring
from chatgot.bench.prepare import generate

COPIED = 300
"""Characters of the sample that stand in the text; the others are drawn from its letters."""


def main(argv: Sequence[str] | None = None) -> int:
    """Search generated ASCII, and print time and peak memory by tokenizer as a markdown table."""
    parser = measuring.suite_parser("copies", __doc__)
    parser.add_argument("--megabytes", type=int, default=100, help="size of the generated text (default: 100)")
    parser.add_argument("--characters", type=int, default=1000, help="length of the sample (default: 1000)")
    parser.add_argument("--tokenizers", nargs="+", default=["char", "byte", "bpe"], metavar="KIND")
    parser.add_argument("--rounds", type=int, default=5, help="searches of each; medians and the fastest are printed")
    parser.add_argument("--measure", nargs=2, metavar=("PREPARED", "ROUNDS"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        print(json.dumps(_measure(Path(args.measure[0]), int(args.measure[1]), args.characters)))
        return 0
    from chatgot.config.run import DataConfig
    from chatgot.data.prepare import prepare

    print(f"{args.megabytes} MB of ASCII, a sample of {args.characters} characters; {measuring.describe_machine()}\n")
    measuring.print_head("tokenizer", "CPU s", "wall s", "fastest", "peak RSS MB")
    with tempfile.TemporaryDirectory(prefix="chatgot-bench-") as folder:
        text = Path(folder) / "text.txt"
        generate(text, args.megabytes * 1_000_000, seed=0)
        for kind in args.tokenizers:
            out = Path(folder) / kind
            prepare(str(text), out, DataConfig(tokenizer=kind, val_fraction=0.001))
            words = ("--measure", str(out), str(args.rounds), "--characters", str(args.characters))
            found = measuring.in_own_process("copies", *words)
            times = (statistics.median(found["cpu_s"]), statistics.median(found["wall_s"]), min(found["wall_s"]))
            measuring.print_row(kind, *(f"{one:.2f}" for one in times), f"{found['peak_rss_mb']:.0f}")
    return 0


def _measure(prepared: Path, rounds: int, characters: int) -> dict[str, Any]:
    """CPU and wall seconds of each search, and the process's peak memory."""
    from chatgot.data.copies import find_copies
    from chatgot.data.prepared import open_prepared
    from chatgot.observe.meters import peak_memory_gib

    data, rng = open_prepared(prepared), random.Random(0)
    copied = data.tokenizer.decode(data.train[-10 * COPIED : -9 * COPIED])[:COPIED]
    sample = copied + "".join(rng.choices("etaoin shrdlu", k=characters - len(copied)))
    cpu_s, wall_s = [], []
    for _ in range(rounds):
        cpu, wall = time.process_time(), time.perf_counter()
        find_copies(sample, data)
        cpu_s.append(time.process_time() - cpu)
        wall_s.append(time.perf_counter() - wall)
    return {"cpu_s": cpu_s, "wall_s": wall_s, "peak_rss_mb": peak_memory_gib("cpu") * 2**30 / 1e6}
