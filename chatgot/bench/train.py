"""How much of a hand-written loop's speed the whole program keeps.

The program (DeepSpeed engine, guards, loop, journal, progress) and a plain PyTorch loop of the same model take turns in
one process, a few steps each, so that the machine's drift hits both; the figure is the median of the ratios of
neighbouring turns.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from chatgot.bench.machine import describe_machine
from chatgot.config.run import ModelConfig
from chatgot.distributed import find_place
from chatgot.model.gpt import GPT
from chatgot.observe.progress import Progress
from chatgot.training.loop import Loop
from chatgot.training.run import TrainArguments, leave, prepare_run

SHAPES: dict[str, dict[str, Any]] = {
    "4x128": {"n_layers": 4, "d_model": 128, "n_head": 4, "d_hid": 512, "max_seq_length": 64, "batch": 12},
    "8x384": {"n_layers": 8, "d_model": 384, "n_head": 6, "d_hid": 1536, "max_seq_length": 256, "batch": 8},
    "12x768": {"n_layers": 12, "d_model": 768, "n_head": 12, "d_hid": 3072, "max_seq_length": 1024, "batch": 16},
}
"""nanoGPT's CPU and near-GPU recipes and GPT-2's 124 M, architecture gpt2, batch in sequences."""


@dataclass(frozen=True)
class Row:
    """One comparison."""

    shape: str
    stage: int
    plain_ms: float
    program_ms: float
    ratio: float
    low: float
    high: float


def main(argv: list[str] | None = None) -> int:
    """Print the table of BENCHMARKS.md."""
    parser = argparse.ArgumentParser(prog="launch/bench.py --suite train", description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["4x128", "8x384"], choices=list(SHAPES))
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--turns", type=int, default=20, help="turns of each side (default: 20)")
    parser.add_argument("--turn_seconds", type=float, default=1.0, help="length of a turn (default: 1)")
    parser.add_argument("--data", default="wars_of_the_roses")
    arguments = parser.parse_args(argv)
    place = find_place()
    print(describe_machine())
    print("| layers x width | ZeRO stage | plain ms/step | program ms/step | program / plain speed | 10 % .. 90 % |")
    print("|---|---|---|---|---|---|")
    for shape in arguments.shapes:
        for stage in arguments.stages:
            with tempfile.TemporaryDirectory() as folder:
                row = compare(shape, stage, arguments, Path(folder), place)
            times = f"{row.plain_ms:.1f} | {row.program_ms:.1f}"
            print(
                f"| {row.shape} | {row.stage} | {times} | {row.ratio:.3f} | {row.low:.3f} .. {row.high:.3f} |",
                flush=True,
            )
    leave()
    return 0


def compare(shape: str, stage: int, arguments: argparse.Namespace, folder: Path, place) -> Row:
    """Interleave both sides on one shape and stage."""
    loop = _program(shape, stage, arguments, folder, place)
    sides = {"program": loop.steps(), "plain": plain_steps(loop, arguments.precision)}
    for steps in sides.values():
        for _ in range(3):
            next(steps)
    per_turn = max(1, round(arguments.turn_seconds / _turn(sides["plain"], 3, loop.device)))
    seconds: dict[str, list[float]] = {"program": [], "plain": []}
    for turn in range(arguments.turns):
        for side in ("program", "plain") if turn % 2 else ("plain", "program"):
            seconds[side].append(_turn(sides[side], per_turn, loop.device))
    ratios = sorted(plain / program for plain, program in zip(seconds["plain"], seconds["program"]))
    loop.engine.engine.destroy()
    return Row(
        shape,
        stage,
        1000 * statistics.median(seconds["plain"]),
        1000 * statistics.median(seconds["program"]),
        statistics.median(ratios),
        ratios[len(ratios) // 10],
        ratios[-1 - len(ratios) // 10],
    )


def _turn(steps: Iterator[Any], count: int, device: torch.device) -> float:
    """Seconds per step over `count` steps."""
    started = time.perf_counter()
    for _ in range(count):
        next(steps)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / count


def _program(shape: str, stage: int, arguments: argparse.Namespace, folder: Path, place) -> Loop:
    import yaml

    sizes = dict(SHAPES[shape])
    batch = sizes.pop("batch")
    run = {
        "model": {"architecture": "gpt2", **sizes},
        "train": {"max_steps": 10**6, "eval_every": None, "sample_every": None, "log_every": 10},
    }
    adamw = {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1, "torch_adam": True, "fused": True}
    engine = {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": batch,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": adamw},
        "zero_optimization": {"stage": stage, "overlap_comm": False},
        "timers": {"throughput": {"enabled": False}},
        "chatgot": {"schedule": {"type": "cosine"}, "checkpoint": {"every_steps": None, "every_minutes": None}},
    }
    if arguments.precision == "bf16":
        engine["bf16"] = {"enabled": True}
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    (folder / "engine.json").write_text(json.dumps(engine))
    loop = prepare_run(
        TrainArguments(
            deepspeed_config=str(folder / "engine.json"),
            out_dir=folder / "run",
            config=str(folder / "run.yaml"),
            data=arguments.data,
        ),
        place,
        progress=Progress(10**6, stream=open(folder / "log.txt", "w")),  # noqa: SIM115 - lives as long as the loop
    )
    return loop


def plain_steps(loop: Loop, precision: str) -> Iterator[None]:
    """The loop that a person would write by hand for one device: the same model, data, fused AdamW, clipping and
    schedule.
    """
    config: ModelConfig = loop.config.model
    model = GPT(config, loop.data.tokenizer.vocab_size)
    model.init_weights(loop.config.train.seed)
    model.to(loop.device)
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
            with torch.autocast(loop.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
                loss = model(input_ids.to(loop.device), targets.to(loop.device))
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        first_sample += loop.train_batches.global_batch_size
        step += 1
        if step % 10 == 0:
            loss.item()
        yield
