"""What activation checkpointing saves and costs: bytes kept for the backward pass, peak memory of a step, step time.

Every variant is a run of its own (prepare_run, a DeepSpeed engine, the loop). All of them take turns in one process, so
that the machine's drift hits all alike; the step time is given as the median of the ratios to `off` in the same turn.

kept: bytes of the tensors that stand on the device between forward and backward, each storage once, parameters not
    counted: those that autograd saves (torch.autograd.graph.saved_tensors_hooks) and those that DeepSpeed's
        checkpoint() holds beside the graph.
peak: most bytes allocated at one time in a step, above what stands between two steps. CUDA: max_memory_allocated. CPU:
    the allocations and frees that torch.profiler sees in a step, summed in order of time; torch's own tensors, no
    scratch memory of libraries.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chatgot.bench.machine import describe_machine
from chatgot.deepspeed_json.schema import CUDA_ONLY
from chatgot.devices import device_facts
from chatgot.distributed import Place, find_place
from chatgot.engine import activation_checkpointing
from chatgot.observe.progress import Progress
from chatgot.training.loop import Loop
from chatgot.training.run import TrainArguments, leave, prepare_run

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


@dataclass
class Side:
    """One variant's run and what was measured of it."""

    loop: Loop
    steps: Iterator[int]
    kept_bytes: int = 0
    peak_bytes: int = 0
    seconds: list[float] = field(default_factory=list)
    """Per step, one entry per turn."""

    def wire(self) -> None:
        """DeepSpeed's settings belong to the process and not to the engine: set this side's."""
        activation_checkpointing.wire(self.loop.engine.engine.module, self.loop.engine.config)

    def turn(self, count: int) -> float:
        """Seconds per step over `count` steps."""
        self.wire()
        started = time.perf_counter()
        for _ in range(count):
            next(self.steps)
        if self.loop.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / count


def main(argv: list[str] | None = None) -> int:
    """Print the table of BENCHMARKS.md."""
    parser = argparse.ArgumentParser(
        prog="launch/bench.py --suite act_ckpt",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
    place, kind = find_place(), device_facts().kind
    chosen = {
        name: extra for name, extra in variants(arguments.layers).items() if kind == "cuda" or not cuda_only(extra)
    }
    print(describe_machine())
    print(
        f"{arguments.layers} layers x {arguments.d_model}, {arguments.batch} x {arguments.max_seq_length} tokens a "
        f"step, "
        f"{arguments.precision}, ZeRO stage {arguments.stage}, {arguments.turns} turns"
    )
    for name in variants(arguments.layers):
        if name not in chosen:
            print(f"left out: {name}: DeepSpeed's cpu_checkpointing fails on the CPU accelerator, it needs CUDA")
    print(
        "| architecture | recomputed | kept MiB | kept / off | peak MiB | peak / off | ms/step | time / off | 10 % .. "
        "90 % |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for architecture in arguments.architectures:
        with tempfile.TemporaryDirectory() as folder:
            sides = {
                name: start(architecture, extra, arguments, Path(folder) / str(number), place)
                for number, (name, extra) in enumerate(chosen.items())
            }
            measure(sides, arguments.turns, arguments.turn_seconds, Path(folder))
        report(architecture, sides)
        for side in sides.values():
            side.loop.engine.engine.destroy()
    leave()
    return 0


def cuda_only(extra: dict[str, Any]) -> bool:
    """Whether the section asks for what fails on the CPU accelerator."""
    return any(value and f"{SECTION}.{key}" in CUDA_ONLY for key, value in extra.get(SECTION, {}).items())


def start(architecture: str, extra: dict[str, Any], arguments: argparse.Namespace, folder: Path, place: Place) -> Side:
    """A run of this variant, before its first step."""
    import yaml

    width = arguments.d_model
    run = {
        "model": {
            "architecture": architecture,
            "n_layers": arguments.layers,
            "d_model": width,
            "n_head": width // 64,
            "d_hid": 4 * width if architecture == "gpt2" else 8 * width // 3 // 32 * 32,
            "max_seq_length": arguments.max_seq_length,
            "dropout": 0.0,
        },
        "train": {"max_steps": 10**6, "eval_every": None, "sample_every": None, "log_every": 10**6},
    }
    quiet = {"schedule": {"type": "cosine"}, "checkpoint": {"every_steps": None, "every_minutes": None}}
    engine = {
        "train_batch_size": arguments.batch * place.world_size,
        "train_micro_batch_size_per_gpu": arguments.batch,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True, "fused": True}},
        "zero_optimization": {"stage": arguments.stage, "overlap_comm": False},
        "timers": {"throughput": {"enabled": False}},
        "bf16": {"enabled": arguments.precision == "bf16"},
        **extra,
        "chatgot": {**quiet, **extra.get("chatgot", {})},
    }
    folder.mkdir()
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    (folder / "engine.json").write_text(json.dumps(engine))
    loop = prepare_run(
        TrainArguments(
            str(folder / "engine.json"), folder / "run", config=str(folder / "run.yaml"), data=arguments.data
        ),
        place,
        progress=Progress(10**6, stream=open(folder / "log.txt", "w")),  # noqa: SIM115 - lives as long as the loop
    )
    return Side(loop, loop.steps())


def measure(sides: dict[str, Side], turns: int, turn_seconds: float, folder: Path) -> None:
    """Fill in what the sides lack; their order rotates from turn to turn."""
    for side in sides.values():
        side.turn(2)  # the first step makes the optimizer's state
        side.kept_bytes = kept_bytes(side)
        side.peak_bytes = peak_bytes(side, folder)
    count = max(1, round(turn_seconds / sides["off"].turn(2)))
    order = list(sides)
    for _ in range(turns):
        for name in order:
            sides[name].seconds.append(sides[name].turn(count))
        order.append(order.pop(0))


def kept_bytes(side: Side) -> int:
    """What one forward leaves on the device for its backward."""
    module: nn.Module = side.loop.engine.engine.module
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Asked at every tensor: under ZeRO-3 a parameter has its storage only while its module runs.
        if tensor.device == side.loop.device and storage.data_ptr() not in {
            p.untyped_storage().data_ptr() for p in module.parameters()
        }:
            storages[storage.data_ptr()] = storage  # kept alive, so that no address is used twice
        return tensor

    def after(module: nn.Module, inputs: Any, loss: Tensor) -> None:
        saving.__exit__(None, None, None)
        for tensor in beside_the_graph(loss):
            keep(tensor)

    saving = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    hooks = module.register_forward_pre_hook(lambda *_: saving.__enter__()), module.register_forward_hook(after)
    side.turn(1)
    for hook in hooks:
        hook.remove()
    return sum(storage.nbytes() for storage in storages.values())


def beside_the_graph(loss: Tensor) -> Iterator[Tensor]:
    """Inputs that DeepSpeed's checkpoint() keeps as attributes of its nodes, where no saved-tensor hook sees them.

    deepspeed/runtime/activation_checkpointing/checkpointing.py: CheckpointFunction.forward; the partition and CPU modes
        move an
    input's contents to its attribute saved_data.
    """
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting.extend(parent for parent, _ in node.next_functions)
        for tensor in getattr(node, "deepspeed_saved_tensors", None) or ():
            contents = getattr(tensor, "saved_data", None)
            yield tensor if contents is None else contents


def peak_bytes(side: Side, folder: Path) -> int:
    """Most bytes that one step has allocated at one time."""
    if side.loop.device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        side.turn(1)
        return torch.cuda.max_memory_allocated() - before
    trace = folder / "trace.json"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        side.turn(1)
    profiler.export_chrome_trace(str(trace))
    changes = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    total = peak = 0
    for event in sorted(changes, key=lambda event: event["ts"]):
        total += event["args"]["Bytes"]
        peak = max(peak, total)
    return peak


def report(architecture: str, sides: dict[str, Side]) -> None:
    """The rows of one architecture."""
    off = sides["off"]
    for name, side in sides.items():
        ratios = sorted(mine / its for mine, its in zip(side.seconds, off.seconds, strict=True))
        kept, peak = side.kept_bytes / MIB, side.peak_bytes / MIB
        cells = [
            architecture,
            name,
            f"{kept:.1f}",
            f"{side.kept_bytes / off.kept_bytes:.2f}",
            f"{peak:.1f}",
            f"{side.peak_bytes / off.peak_bytes:.2f}",
            f"{1000 * statistics.median(side.seconds):.0f}",
            f"{statistics.median(ratios):.2f}",
            f"{ratios[len(ratios) // 10]:.2f} .. {ratios[-1 - len(ratios) // 10]:.2f}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
