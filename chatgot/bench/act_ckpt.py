"""What activation checkpointing saves and costs: bytes kept for the backward pass, peak memory of a step, step time.

Every variant is a run of its own. All of them take turns in one process, so that the machine's drift hits all alike;
the step time is given as the median of the ratios to `off` in the same turn.

kept: bytes of the tensors that stand on the device between forward and backward, each storage once, parameters not
    counted: those that autograd saves (torch.autograd.graph.saved_tensors_hooks) and those that DeepSpeed's
    checkpoint() holds beside the graph.
peak: most bytes allocated at one time in a step, above what stands between two steps. CUDA: max_memory_allocated. CPU:
    the allocations and frees that torch.profiler sees in a step, summed in order of time; torch's own tensors, no
    scratch memory of libraries.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from chatgot.bench import measuring
from chatgot.deepspeed_json.rules import CUDA_ONLY
from chatgot.devices import device_facts
from chatgot.engine import activation_checkpointing, zero_view
from chatgot.training.loop import Loop
from chatgot.training.run import leave

ARCHITECTURES = ("modern", "gpt2")
MIB = 2**20
SECTION = "activation_checkpointing"


def variants(layers: int) -> dict[str, dict[str, Any]]:
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


class Side:
    """One variant's run, before its first step, and what was measured of it."""

    def __init__(self, loop: Loop) -> None:
        self.loop, self.steps = loop, loop.steps()
        self.kept_bytes = self.peak_bytes = 0
        self.seconds: list[float] = []
        """Per step, one entry per turn."""

    def turn(self, count: int) -> float:
        """Seconds per step over `count` steps."""
        # DeepSpeed's settings belong to the process and not to the engine: set this side's.
        activation_checkpointing.wire(self.loop.engine.engine.module, self.loop.engine.config)
        return measuring.seconds_per_step(self.steps, count)


def main(argv: list[str] | None = None) -> int:
    """Print the table of BENCHMARKS.md."""
    parser = measuring.suite_parser("act_ckpt", __doc__)
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
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
    on_cuda, every = device_facts().kind == "cuda", variants(arguments.layers)
    chosen = {name: extra for name, extra in every.items() if on_cuda or not cuda_only(extra)}
    print(measuring.describe_machine())
    print(
        f"{arguments.layers} layers x {arguments.d_model}, {arguments.batch} x {arguments.max_seq_length} tokens a "
        f"step, {arguments.precision}, ZeRO stage {arguments.stage}, {arguments.turns} turns"
    )
    for name in (name for name in every if name not in chosen):
        print(f"left out: {name}: DeepSpeed's cpu_checkpointing fails on the CPU accelerator, it needs CUDA")
    columns = ("kept MiB", "kept / off", "peak MiB", "peak / off", "ms/step", "time / off", "10 % .. 90 %")
    measuring.print_head("architecture", "recomputed", *columns)
    for architecture in arguments.architectures:
        with tempfile.TemporaryDirectory() as folder:
            sides = {
                name: start(architecture, extra, arguments, Path(folder) / str(number))
                for number, (name, extra) in enumerate(chosen.items())
            }
            measure(sides, arguments.turns, arguments.turn_seconds)
        report(architecture, sides)
        for side in sides.values():
            side.loop.engine.engine.destroy()
    leave()
    return 0


def cuda_only(extra: dict[str, Any]) -> bool:
    """Whether the section asks for what fails on the CPU accelerator."""
    return any(value and f"{SECTION}.{key}" in CUDA_ONLY for key, value in extra.get(SECTION, {}).items())


def start(architecture: str, extra: dict[str, Any], arguments: argparse.Namespace, folder: Path) -> Side:
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
    loop = measuring.start_shape(
        model, arguments.batch, arguments.stage, arguments.precision, arguments.data, folder, **extra
    )
    return Side(loop)


def measure(sides: dict[str, Side], turns: int, turn_seconds: float) -> None:
    """Fill in what the sides lack."""
    for side in sides.values():
        side.turn(2)  # the first step makes the optimizer's state
        side.kept_bytes, side.peak_bytes = kept_bytes(side), peak_bytes(side)
    count = max(1, round(turn_seconds / sides["off"].turn(2)))
    turns_of = {name: functools.partial(side.turn, count) for name, side in sides.items()}
    for name, seconds in measuring.take_turns(turns_of, turns).items():
        sides[name].seconds = seconds


def kept_bytes(side: Side) -> int:
    """What one forward leaves on the device for its backward."""
    module: nn.Module = side.loop.engine.engine.module
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Asked at every tensor: under ZeRO-3 a parameter has its storage only while its module runs.
        parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
        if tensor.device == side.loop.device and storage.data_ptr() not in parameters:
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


def peak_bytes(side: Side) -> int:
    """Most bytes that one step has allocated at one time."""
    if side.loop.device.type == "cuda":
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


def report(architecture: str, sides: dict[str, Side]) -> None:
    """The rows of one architecture."""
    off = sides["off"]
    for name, side in sides.items():
        ratio, low, high = measuring.spread([mine / its for mine, its in zip(side.seconds, off.seconds, strict=True)])
        pairs = ((side.kept_bytes, off.kept_bytes), (side.peak_bytes, off.peak_bytes))
        sizes = [cell for mine, its in pairs for cell in (f"{mine / MIB:.1f}", f"{mine / its:.2f}")]
        times = f"{1000 * statistics.median(side.seconds):.0f}", f"{ratio:.2f}", f"{low:.2f} .. {high:.2f}"
        measuring.print_row(architecture, name, *sizes, *times)
