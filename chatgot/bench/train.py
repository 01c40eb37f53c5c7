"""How much of a hand-written loop's speed the whole program keeps.

The program (DeepSpeed engine, guards, loop, journal, progress) and a plain PyTorch loop of the same model take turns in
one process, a few steps each, so that the machine's drift hits both; the figure is the median of the ratios of
neighbouring turns.
"""

from __future__ import annotations

import functools
import math
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from chatgot.bench import measuring
from chatgot.model.gpt import GPT
from chatgot.training.loop import Loop
from chatgot.training.run import leave

SHAPES: dict[str, dict[str, Any]] = {
    "4x128": {"n_layers": 4, "d_model": 128, "n_head": 4, "d_hid": 512, "max_seq_length": 64, "batch": 12},
    "8x384": {"n_layers": 8, "d_model": 384, "n_head": 6, "d_hid": 1536, "max_seq_length": 256, "batch": 8},
    "12x768": {"n_layers": 12, "d_model": 768, "n_head": 12, "d_hid": 3072, "max_seq_length": 1024, "batch": 16},
}
"""nanoGPT's CPU and near-GPU recipes and GPT-2's 124 M, architecture gpt2, batch in sequences."""


def main(argv: list[str] | None = None) -> int:
    """Print the table of BENCHMARKS.md."""
    parser = measuring.suite_parser("train", __doc__)
    parser.add_argument("--shapes", nargs="+", default=["4x128", "8x384"], choices=list(SHAPES))
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--turns", type=int, default=20, help="turns of each side (default: 20)")
    parser.add_argument("--turn_seconds", type=float, default=1.0, help="length of a turn (default: 1)")
    parser.add_argument("--data", default="wars_of_the_roses")
    arguments = parser.parse_args(argv)
    print(measuring.describe_machine())
    columns = ("plain ms/step", "program ms/step", "program / plain speed", "10 % .. 90 %")
    measuring.print_head("layers x width", "ZeRO stage", *columns)
    for shape in arguments.shapes:
        sizes = dict(SHAPES[shape])
        batch = sizes.pop("batch")
        model = {"architecture": "gpt2", **sizes}
        for stage in arguments.stages:
            with tempfile.TemporaryDirectory() as folder:
                loop = measuring.start_shape(model, batch, stage, arguments.precision, arguments.data, Path(folder))
                plain, program = compare(loop, arguments.precision, arguments.turns, arguments.turn_seconds)
                loop.engine.engine.destroy()
            ratio, low, high = measuring.spread([one / other for one, other in zip(plain, program)])
            times = (f"{1000 * statistics.median(side):.1f}" for side in (plain, program))
            measuring.print_row(shape, str(stage), *times, f"{ratio:.3f}", f"{low:.3f} .. {high:.3f}")
    leave()
    return 0


def compare(loop: Loop, precision: str, turns: int, turn_seconds: float) -> tuple[list[float], list[float]]:
    """Seconds per step of the plain loop and of the program, one entry per turn."""
    plain, program = plain_steps(loop, precision), loop.steps()
    for steps in (program, plain):
        measuring.seconds_per_step(steps, 3)
    count = max(1, round(turn_seconds / measuring.seconds_per_step(plain, 3)))
    sides = {"plain": plain, "program": program}
    turns_of = {name: functools.partial(measuring.seconds_per_step, steps, count) for name, steps in sides.items()}
    seconds = measuring.take_turns(turns_of, turns)
    return seconds["plain"], seconds["program"]


def plain_steps(loop: Loop, precision: str) -> Iterator[None]:
    """A loop as written by hand for one device: the same model, data, fused AdamW, clipping and schedule."""
    model = GPT(loop.config.model, loop.data.tokenizer.vocab_size)
    model.init_weights(loop.config.train.seed)
    model.to(loop.engine.device)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    first_sample = step = 0
    while True:
        rate = 1e-3 * min((step + 1) / 100, 0.55 + 0.45 * math.cos(math.pi * step / 10**6))
        for group in optimizer.param_groups:
            group["lr"] = rate
        for input_ids, targets in loop.train_batches.micro_batches(first_sample):
            with torch.autocast(loop.engine.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
                loss = model(input_ids.to(loop.engine.device), targets.to(loop.engine.device))
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        first_sample += loop.train_batches.global_batch_size
        step += 1
        if step % 10 == 0:
            loss.item()  # pyright: ignore[reportPossiblyUnboundVariable] - a step has one
        yield
