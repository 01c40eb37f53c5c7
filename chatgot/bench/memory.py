"""Memory of training: what activation checkpointing saves and costs, and what `chatgot plan` predicts against what runs
take.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from chatgot.bench import measuring
from chatgot.deepspeed_json.read import shipped_jsons
from chatgot.deepspeed_json.resolve import build_engine_config
from chatgot.deepspeed_json.rules import CUDA_ONLY
from chatgot.devices import GIB, device_facts, device_of_machine
from chatgot.distributed import find_place
from chatgot.engine import zero_view
from chatgot.engine.build import build, join, wire_activation_checkpointing
from chatgot.model.gpt import GPT
from chatgot.model.shapes import count_parameters
from chatgot.plan.command import read_request
from chatgot.plan.estimate import estimate
from chatgot.plan.memory import STATES
from chatgot.training.loop import Loop
from chatgot.training.memory import MemoryCheck
from chatgot.training.run import leave

MIB = 2**20
SECTION = "activation_checkpointing"
STEPS = 3
"""Optimizer steps that a plan is held against."""


@dataclass(frozen=True)
class Case:
    """One configuration of the grid, on one rank, with two micro batches to a step."""

    config: str
    deepspeed: str
    micro: int
    overrides: tuple[str, ...] = ()
    accumulation: int = 2
    vocab_size: int = 50257

    @property
    def name(self) -> str:
        """For tables and test ids."""
        words = (word.removeprefix("ds.") for word in self.overrides)
        return " ".join([self.config, self.deepspeed, f"micro {self.micro}", *words])

    def words(self) -> list[str]:
        """All overrides."""
        batch = {"train_micro_batch_size_per_gpu": self.micro, "train_batch_size": self.micro * self.accumulation}
        return [*(f"ds.{key}={value}" for key, value in batch.items()), *self.overrides]


GRID = (
    Case("gpt2_small", "fp32_zero0", 4),
    Case("modern_124M", "fp32_zero0", 4, accumulation=1),
    Case("gpt2_small", "fp32_zero1_act_ckpt", 8),
    Case("modern_124M", "fp32_zero0_muon", 4),
    Case("gpt2_small", "bf16_zero1", 8),
    Case("modern_124M", "bf16_zero1", 8, accumulation=1),
    Case("gpt2_small", "bf16_zero2", 16),
    Case("modern_124M", "bf16_zero2", 16, accumulation=1),
    Case("gpt2_small", "bf16_zero2_act_ckpt", 32),
    Case("modern_124M", "bf16_zero2_act_ckpt", 32),
    Case("modern_124M", "bf16_zero2_act_ckpt", 16, ("ds.chatgot.activation_checkpointing.every_n_layers=2",)),
    Case("gpt2_small", "fp16_zero2", 8),
    Case("gpt2_small", "bf16_zero3", 8),
    Case("modern_124M", "bf16_zero3_offload", 8),
    Case("gpt2_small", "bf16_zero2", 8, ("model.dropout=0.1",)),
    Case("modern_124M", "bf16_zero2", 8, ("model.n_kv_head=4",)),
    Case("chatgot_85M", "bf16_zero1", 16, vocab_size=100),
    Case("gpt2_medium", "bf16_zero1", 4),
    Case("modern_350M", "bf16_zero2_act_ckpt", 16),
    Case("gpt2_large", "bf16_zero2_act_ckpt", 8),
)
"""Twenty that a GPU of 40 GB holds."""


def act_ckpt(argv: Sequence[str]) -> None:
    """What activation checkpointing saves and costs: bytes kept for backward, peak memory of a step, step time.

    Every variant is a run of its own. All of them take turns in one process, so that the machine's drift hits all
    alike; the step time is given as the median of the ratios to `off` in the same turn.

    kept: bytes of the tensors that stand on the device between forward and backward, each storage once, parameters not
        counted: those that autograd saves (torch.autograd.graph.saved_tensors_hooks) and those that DeepSpeed's
        checkpoint() holds beside the graph.
    peak: most bytes allocated at one time in a step, above what stands between two steps. CUDA: max_memory_allocated.
        CPU: the allocations and frees that torch.profiler sees in a step, summed in order of time; torch's own tensors,
        no scratch memory of libraries.
    """
    parser = measuring.suite_parser(act_ckpt)
    parser.add_argument("--architectures", nargs="+", default=["modern", "gpt2"], choices=("modern", "gpt2"))
    parser.add_argument("--layers", type=int, default=6, help="(default: 6)")
    parser.add_argument("--d_model", type=int, default=256, help="a multiple of 64, the size of a head (default: 256)")
    parser.add_argument("--max_seq_length", type=int, default=128, help="tokens per sequence (default: 128)")
    parser.add_argument("--batch", type=int, default=8, help="sequences per step (default: 8)")
    parser.add_argument("--stage", type=int, default=0, choices=range(4), help="of ZeRO (default: 0)")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--turns", type=int, default=7, help="turns of each variant (default: 7)")
    parser.add_argument("--turn_seconds", type=float, default=0.3, help="length of a turn of `off` (default: 0.3)")
    parser.add_argument("--data", default="wars_of_the_roses")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch.profiler reports every start and stop on stderr otherwise
    on_cuda, every = device_facts().kind == "cuda", _variants(arguments.layers)
    chosen = {name: extra for name, extra in every.items() if on_cuda or not _cuda_only(extra)}
    print(measuring.describe_machine())
    shape = f"{arguments.layers} layers x {arguments.d_model}, {arguments.batch} x {arguments.max_seq_length} tokens"
    print(f"{shape} a step, {arguments.precision}, ZeRO stage {arguments.stage}, {arguments.turns} turns")
    for name in (name for name in every if name not in chosen):
        print(f"left out: {name}: DeepSpeed's cpu_checkpointing fails on the CPU accelerator, it needs CUDA")
    columns = ("kept MiB", "kept / off", "peak MiB", "peak / off", "ms/step", "time / off", "10 % .. 90 %")
    measuring.print_head("architecture", "recomputed", *columns)
    for architecture in arguments.architectures:
        with tempfile.TemporaryDirectory() as folder:
            sides = {name: _start(architecture, chosen[name], arguments, Path(folder) / name) for name in chosen}
            _measure_sides(sides, arguments.turns, arguments.turn_seconds)
        _report(architecture, sides)
        for side in sides.values():
            side.loop.engine.engine.destroy()
    leave()


def plan(argv: Sequence[str]) -> None:
    """What `chatgot plan` predicts of a run's memory, against what three steps take in a process of their own.

    On a GPU the figure is the peak of PyTorch's allocator. On a CPU, which has no such counter, the shapes are made
    tiny, and only the model states are compared, by their live tensors.
    """
    parser, every = measuring.suite_parser(plan), range(len(GRID))
    number: dict[str, Any] = {"type": int, "choices": every, "metavar": "I"}
    parser.add_argument("--cases", nargs="+", default=list(every), help="numbers in the grid", **number)
    parser.add_argument("--one", help="measure this one here, and print it as JSON", **number)
    arguments = parser.parse_args(argv)
    if arguments.one is not None:
        print(json.dumps(_measure_case(GRID[arguments.one])))
        return
    print(measuring.describe_machine())
    measuring.print_head("configuration", "predicted", "measured", "error")
    errors, what = [], ""
    for index in arguments.cases:
        measured = measuring.in_own_process("plan", "--one", str(index), timeout=270)
        errors.append(abs(measured["error"]))
        what, sizes = measured["what"], (f"{measured[side] / GIB:.3f} GiB" for side in ("predicted", "measured"))
        measuring.print_row(GRID[index].name, *sizes, f"{100 * measured['error']:+.1f} %")
    print(f"{what}: median error {100 * statistics.median(errors):.1f} %, worst {100 * max(errors):.1f} %")


def _measure_case(case: Case) -> dict[str, Any]:
    """Bytes predicted and measured, and the relative error of the prediction."""
    path = shipped_jsons()[case.deepspeed]
    facts = device_facts()
    request = read_request(path, case.config, 1, "h200", case.words(), case.vocab_size)
    shape = request.config.model
    if facts.kind == "cpu":
        shape = shape.model_copy(update={"d_model": 48, "n_head": 4, "n_layers": 2, "d_hid": 96, "max_seq_length": 32})
    device = join(find_place(), facts.kind)
    n_params = count_parameters(shape, case.vocab_size)
    tree, overrides = request.document.tree, request.overrides
    config = build_engine_config(tree, path.name, overrides, world_size=1, facts=facts, n_params=n_params)
    model = GPT(shape, case.vocab_size)
    model.init_weights(0)
    engine = build(model, config, device)
    predicted_plan = estimate(shape, case.vocab_size, config, 1, device_of_machine(facts, device))
    check = MemoryCheck(predicted_plan, engine.engine)
    size = (config.accumulation, config.micro_batch_size, shape.max_seq_length)
    for _ in range(STEPS):
        batches = ((ids, ids) for ids in torch.randint(case.vocab_size, size, device=device))
        engine.train_step(batches, before_update=check.look)
    if facts.kind == "cuda":
        what, predicted, measured = "peak in use", check.plan.peak, torch.cuda.max_memory_allocated()
    else:
        assert check.live is not None
        what = "model states"
        predicted = sum(check.plan.states.total(part) for part in STATES)
        measured = sum(check.live[part] for part in STATES)
    leave()
    sizes = {"what": what, "predicted": predicted, "measured": measured, "error": predicted / measured - 1}
    return {"case": case.name, **sizes, "peak_at": check.plan.peak_at, "parts": check.plan.parts}


def _variants(layers: int) -> dict[str, dict[str, Any]]:
    """What each row adds to the JSON."""

    def own(backend: str, every: int) -> dict[str, Any]:
        return {SECTION: {}, "chatgot": {SECTION: {"backend": backend, "every_n_layers": every}}}

    partition = {"partition_activations": True}
    contiguous = {**partition, "contiguous_memory_optimization": True, "number_checkpoints": layers}
    return {
        "off": {},
        "torch, every layer": own("torch", 1),
        "torch, every 2nd layer": own("torch", 2),
        "deepspeed, every layer": own("deepspeed", 1),
        "deepspeed, every 2nd layer": own("deepspeed", 2),
        "deepspeed, partition_activations": {SECTION: partition},
        "deepspeed, contiguous_memory_optimization": {SECTION: contiguous},
        "deepspeed, cpu_checkpointing": {SECTION: {"cpu_checkpointing": True}},
        "deepspeed, partition_activations + cpu_checkpointing": {SECTION: {**partition, "cpu_checkpointing": True}},
    }


class _Side:
    """One variant's run, before its first step, and what was measured of it."""

    def __init__(self, loop: Loop) -> None:
        self.loop, self.steps = loop, loop.steps()
        self.kept_bytes = self.peak_bytes = 0
        self.seconds: list[float] = []
        """Per step, one entry per turn."""

    def turn(self, count: int) -> float:
        """Seconds per step over `count` steps."""
        # DeepSpeed's settings belong to the process and not to the engine: set this side's.
        wire_activation_checkpointing(self.loop.engine.engine.module, self.loop.engine.config)
        return measuring.seconds_per_step(self.steps, count)


def _cuda_only(extra: dict[str, Any]) -> bool:
    """Whether the section asks for what fails on the CPU accelerator."""
    return any(value and f"{SECTION}.{key}" in CUDA_ONLY for key, value in extra.get(SECTION, {}).items())


def _start(architecture: str, extra: dict[str, Any], arguments: argparse.Namespace, folder: Path) -> _Side:
    """A run of this variant, before its first step."""
    width = arguments.d_model
    model = {
        "architecture": architecture,
        "n_layers": arguments.layers,
        "d_model": width,
        "n_head": width // 64,
        "d_hid": 4 * width if architecture == "gpt2" else 8 * width // 3 // 32 * 32,
        "max_seq_length": arguments.max_seq_length,
        "dropout": 0.0,
    }
    run = (arguments.batch, arguments.stage, arguments.precision, arguments.data, folder)
    return _Side(measuring.start_shape(model, *run, **extra))


def _measure_sides(sides: dict[str, _Side], turns: int, turn_seconds: float) -> None:
    """Fill in what the sides lack."""
    for side in sides.values():
        side.turn(2)  # the first step makes the optimizer's state
        side.kept_bytes, side.peak_bytes = _kept_bytes(side), _peak_bytes(side)
    count = max(1, round(turn_seconds / sides["off"].turn(2)))
    turns_of = {name: functools.partial(side.turn, count) for name, side in sides.items()}
    for name, seconds in measuring.take_turns(turns_of, turns).items():
        sides[name].seconds = seconds


def _kept_bytes(side: _Side) -> int:
    """What one forward leaves on the device for its backward."""
    module: nn.Module = side.loop.engine.engine.module
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Asked at every tensor: under ZeRO-3 a parameter has its storage only while its module runs.
        parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
        if tensor.device == side.loop.engine.device and storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage  # kept alive, so that no address is used twice
        return tensor

    def after(module: nn.Module, inputs: Any, loss: Tensor) -> None:
        saving.__exit__(None, None, None)
        for tensor in zero_view.checkpointed_inputs(loss):
            keep(tensor)

    saving = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    hooks = module.register_forward_pre_hook(lambda *_: saving.__enter__()), module.register_forward_hook(after)
    side.turn(1)
    for hook in hooks:
        hook.remove()
    return sum(storage.nbytes() for storage in storages.values())


def _peak_bytes(side: _Side) -> int:
    """Most bytes that one step has allocated at one time."""
    if side.loop.engine.device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        side.turn(1)
        return torch.cuda.max_memory_allocated() - before
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profile:
        side.turn(1)
    events: list[Any] = cast(Any, profile).kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(itertools.accumulate(change for _, change in changes))


def _report(architecture: str, sides: dict[str, _Side]) -> None:
    """The rows of one architecture."""
    off = sides["off"]
    for name, side in sides.items():
        ratio, low, high = measuring.spread([mine / its for mine, its in zip(side.seconds, off.seconds, strict=True)])
        pairs = ((side.kept_bytes, off.kept_bytes), (side.peak_bytes, off.peak_bytes))
        sizes = [cell for mine, its in pairs for cell in (f"{mine / MIB:.1f}", f"{mine / its:.2f}")]
        times = f"{1000 * statistics.median(side.seconds):.0f}", f"{ratio:.2f}", f"{low:.2f} .. {high:.2f}"
        measuring.print_row(architecture, name, *sizes, *times)
