"""Time of training and sampling: the program against a plain loop, the launchers against settings made by hand, the
heartbeat, sampling against transformers. The sides take turns, so that the machine's drift hits both, and the figure is
the median of the ratios of neighbouring turns.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from chatgot import run_folder
from chatgot.bench import measuring
from chatgot.bench.measuring import print_head, print_row, seconds_per_step, spread, take_turns, timed
from chatgot.config.run import ModelConfig
from chatgot.distributed import free_port
from chatgot.inference.batching import Batch, Generation
from chatgot.model.generate import generate as continue_ids
from chatgot.model.gpt import GPT
from chatgot.observe.journal import read_lines
from chatgot.training.loop import Loop
from chatgot.training.run import leave

SHAPES: dict[str, dict[str, Any]] = {
    "4x128": {"n_layers": 4, "d_model": 128, "n_head": 4, "d_hid": 512, "max_seq_length": 64, "batch": 12},
    "8x384": {"n_layers": 8, "d_model": 384, "n_head": 6, "d_hid": 1536, "max_seq_length": 256, "batch": 8},
    "12x768": {"n_layers": 12, "d_model": 768, "n_head": 12, "d_hid": 3072, "max_seq_length": 1024, "batch": 16},
}
"""nanoGPT's CPU and near-GPU recipes and GPT-2's 124 M, architecture gpt2, batch in sequences."""
STEPS, LOGGED, WARM = 40, 5, 2
"""Steps of a run of a launcher, steps to a line of its journal, and lines that do not count."""
SET = ("OMP_NUM_THREADS", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GOMP_SPINCOUNT")
BY_HAND = "OMP_NUM_THREADS=1"
ROOT = Path(__file__).resolve().parents[2]


def train(argv: Sequence[str]) -> None:
    """How much of a hand-written loop's speed the whole program keeps.

    The program (DeepSpeed engine, guards, loop, journal, progress) and a plain PyTorch loop of the same model take
    turns in one process, a few steps each.
    """
    parser = measuring.suite_parser(train)
    parser.add_argument("--shapes", nargs="+", default=["4x128", "8x384"], choices=list(SHAPES))
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--turns", type=int, default=20, help="turns of each side (default: 20)")
    parser.add_argument("--turn_seconds", type=float, default=1.0, help="length of a turn (default: 1)")
    parser.add_argument("--data", default="wars_of_the_roses")
    given = parser.parse_args(argv)
    print(measuring.describe_machine())
    columns = ("plain ms/step", "program ms/step", "program / plain speed", "10 % .. 90 %")
    print_head("layers x width", "ZeRO stage", *columns)
    for shape, stage in itertools.product(given.shapes, given.stages):
        with _running(shape, stage, given.precision, given.data) as loop:
            plain, program = _plain_steps(loop, given.precision), loop.steps()
            seconds_per_step(program, 3)
            seconds_per_step(plain, 3)
            count = max(1, round(given.turn_seconds / seconds_per_step(plain, 3)))
            sides = {"plain": plain, "program": program}
            turns = {name: partial(seconds_per_step, steps, count) for name, steps in sides.items()}
            times = take_turns(turns, given.turns)
        _print_times((shape, str(stage)), times, "plain", "program", 1)
    leave()


def launch(argv: Sequence[str]) -> None:
    """What the launchers' thread settings and the heartbeat cost.

    Threads: two ranks on this machine's cores, started by each launcher with nothing set, against launch/run with
    OMP_NUM_THREADS=1 set by hand, in turns; a turn is a run of its own, and its figure the median of `perf/step_ms`.
    Heartbeat: the program's own loop with its watchdog and without, in turns of a second in one process.
    """
    parser = measuring.suite_parser(launch)
    parser.add_argument("--stages", nargs="*", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--turns", type=int, default=3, help="runs of each launcher and stage (default: 3)")
    parser.add_argument("--pairs", type=int, default=9, help="turns with the heartbeat and without (default: 9)")
    given = parser.parse_args(argv)
    print(measuring.describe_machine())
    if given.stages:
        print_head("started by", "ZeRO stage", "ms/step", "ms/step / by hand", "least .. most")
    for stage in given.stages:
        sides = {name: partial(_step_ms, name, stage) for name in (BY_HAND, "launch/run", "deepspeed")}
        times = take_turns(sides, given.turns)
        for name, own in times.items():
            ratios = [one / hand for one, hand in zip(own, times[BY_HAND])]
            reach = f"{min(ratios):.2f} .. {max(ratios):.2f}"
            print_row(name, str(stage), f"{statistics.median(own):.1f}", f"{statistics.median(ratios):.2f}", reach)
    if given.pairs:
        print_head("layers x width", "without ms/step", "with ms/step", "with / without", "10 % .. 90 %")
        with _running("4x128") as loop:
            steps = loop.steps()
            count = max(1, round(1 / seconds_per_step(steps, 10)))

            def watched() -> float:
                with loop.watchdog:
                    return seconds_per_step(steps, count)

            times = take_turns({"without": partial(seconds_per_step, steps, count), "with": watched}, given.pairs)
        _print_times(("4x128",), times, "with", "without", 2)
        leave()


def generate(argv: Sequence[str]) -> None:
    """Tokens per second of sampling: against transformers' generate on the same weights, and many streams against one.

    All sides take turns in one process. The model is exported as `chatgot export` does it, and both draw at
    temperature 1.
    """
    parser = measuring.suite_parser(generate)
    for name, default in {"layers": 8, "d_model": 384, "n_head": 6, "max_seq_length": 256, "vocab_size": 96}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--architecture", choices=("gpt2", "modern"), default="gpt2")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of the prompt (default: 16)")
    parser.add_argument("--new_tokens", type=int, default=100, help="tokens to draw (default: 100)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--streams", type=int, default=16, help="texts of the server's batch (default: 16)")
    parser.add_argument("--turns", type=int, default=5)
    given = parser.parse_args(argv)
    config = ModelConfig(
        architecture=given.architecture,
        d_model=given.d_model,
        n_layers=given.layers,
        n_head=given.n_head,
        d_hid=4 * given.d_model,
        max_seq_length=given.max_seq_length,
    )
    ours = GPT(config, given.vocab_size)
    ours.init_weights(0)
    ours.eval()
    theirs = _exported(ours)
    new, draw = given.new_tokens, torch.Generator().manual_seed(0)
    sides: dict[str, Callable[[], float]] = {}
    for rows in given.batches:
        ids = torch.randint(given.vocab_size, (rows, given.prompt), generator=draw)

        @torch.inference_mode()
        def sample(ids: torch.Tensor = ids, **how: Any) -> torch.Tensor:
            how |= {"max_new_tokens": new, "min_new_tokens": new, "use_cache": True, "pad_token_id": 0}
            return theirs.generate(ids, eos_token_id=None, attention_mask=torch.ones_like(ids), **how)

        same = sample(do_sample=False)[:, given.prompt :].tolist()
        print(f"batch {rows}: greedy tokens equal: {continue_ids(ours, ids, new, temperature=0.0) == same}")
        sides[f"{rows} chatgot"] = partial(timed, partial(continue_ids, ours, ids, new))
        sides[f"{rows} transformers"] = partial(timed, partial(sample, do_sample=True, top_k=0))
    prompts = torch.randint(given.vocab_size, (given.streams, given.prompt), generator=draw).tolist()
    batch = Batch(ours, given.streams, given.streams)
    sides["streams at once"] = lambda: timed(lambda: _continue(batch, prompts, new))
    sides["streams one by one"] = lambda: timed(lambda: [_continue(batch, [prompt], new) for prompt in prompts])
    print(f"{measuring.describe_machine()}; {given.turns} turns")
    seconds = {name: values[1:] for name, values in take_turns(sides, given.turns + 1).items()}  # the first warms up
    print_head("texts", "side", "tokens/s", "other / this time", "10 % .. 90 % of the turns")
    pairs = [(rows, f"{rows} chatgot", f"{rows} transformers") for rows in given.batches]
    for rows, fast, slow in [*pairs, (given.streams, "streams at once", "streams one by one")]:
        median, low, high = spread([other / this for this, other in zip(seconds[fast], seconds[slow])])
        for name, *cells in ((slow, "1.00", ""), (fast, f"**{median:.2f}**", f"{low:.2f} .. {high:.2f}")):
            print_row(str(rows), name, f"{rows * new / statistics.median(seconds[name]):.0f}", *cells)
    batch.close()


@contextlib.contextmanager
def _running(shape: str, stage: int = 0, precision: str = "fp32", data: str = "wars_of_the_roses") -> Iterator[Loop]:
    """A run of a shape, before its first step."""
    sizes = dict(SHAPES[shape])
    batch = sizes.pop("batch")
    with tempfile.TemporaryDirectory() as folder:
        loop = measuring.start_shape({"architecture": "gpt2", **sizes}, batch, stage, precision, data, Path(folder))
        yield loop
        loop.engine.engine.destroy()


def _print_times(names: tuple[str, ...], times: dict[str, list[float]], over: str, under: str, digits: int) -> None:
    """Print the row of two sides, with the ratio of the one over the other."""
    ratio, low, high = spread([one / other for one, other in zip(times[over], times[under])])
    figures = (f"{1000 * statistics.median(side):.{digits}f}" for side in times.values())
    print_row(*names, *figures, f"{ratio:.3f}", f"{low:.3f} .. {high:.3f}")


def _plain_steps(loop: Loop, precision: str) -> Iterator[None]:
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


def _step_ms(launcher: str, stage: int) -> float:
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
        lines = read_lines(Path(folder) / "run" / run_folder.METRICS)
        times = [line["perf/step_ms"] for line in lines if line and "perf/step_ms" in line]
    return statistics.median(times[WARM:])


def _exported(ours: GPT) -> Any:
    """The same weights in transformers' class, by the table of `chatgot export`."""
    import transformers

    from chatgot.exchange.layout import transformers_config, transformers_parts

    tree, weights = transformers_config(ours.config, ours.vocab_size, "float32"), ours.state_dict()
    kind = getattr(transformers, tree["architectures"][0])
    theirs = kind(kind.config_class(**tree))
    exported = {}
    for part in transformers_parts(ours.config, ours.vocab_size):
        rows = weights[part.ours][part.start : part.start + part.rows]
        exported[part.name] = rows.T if part.transposed else rows
    missing, unexpected = theirs.load_state_dict(exported, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}  # tied
    return theirs.eval()


def _continue(batch: Batch, prompts: Sequence[list[int]], new: int) -> None:
    """Continue all of them at once, and wait for the end."""
    left = threading.Semaphore(0)
    asked = [
        Generation(prompt, new, lambda token, others: False, lambda _: left.release(), seed=i)
        for i, prompt in enumerate(prompts)
    ]
    batch.submit(asked)
    for _ in prompts:
        left.acquire()
