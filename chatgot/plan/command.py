"""`chatgot plan`: one JSON or all of a folder, as text, a table of several, or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chatgot.deepspeed_json.read import find_json, shipped_jsons
from chatgot.devices import GIB
from chatgot.errors import ConfigError
from chatgot.plan.estimate import CUDA_CONTEXT, FRAGMENTATION, PARTS, PROCESS, Estimate
from chatgot.plan.request import Remedy, Request, find_remedies, read_request
from chatgot.plan.states import STATES

_NAMES = {
    **{part: part for part in PARTS},
    "master_weights": "fp32 master weights",
    "optimizer_states": "optimizer states",
    "buffers": "communication buffers",
    "gathered": "gathered parameters",
    "logits": "logits and loss",
    "libraries": "cuBLAS workspace",
}


@dataclass(frozen=True)
class PlanArguments:
    """The command line."""

    deepspeed_config: Path | None
    config: str
    world_size: int
    device: str
    overrides: tuple[str, ...] = ()
    vocab_size: int | None = None
    sweep: bool = False
    format: str = "text"


def plan(arguments: PlanArguments) -> str:
    """What the command prints.

    Raises:
        ConfigError: files, names or numbers are wrong, or the JSON is refused.
    """
    if arguments.sweep:
        return _sweep(arguments)
    if arguments.deepspeed_config is None:
        raise ConfigError("chatgot plan: which JSON? Give one, or --sweep for all of ds_configs/")
    request = _request(arguments, find_json(arguments.deepspeed_config))
    current = request.plan()
    remedies = [] if current.fits else find_remedies(request, current)
    if arguments.format == "json":
        return json.dumps(_tree(request, current, remedies), indent=2)
    return "\n".join(_text(request, current, remedies))


def _request(arguments: PlanArguments, path: Path) -> Request:
    overrides = list(arguments.overrides)
    return read_request(path, arguments.config, arguments.world_size, arguments.device, overrides, arguments.vocab_size)


def _sweep(arguments: PlanArguments) -> str:
    folder = arguments.deepspeed_config
    paths = sorted(folder.glob("*.json")) if folder is not None else list(shipped_jsons().values())
    if not paths:
        raise ConfigError(
            f"--sweep: {folder} is no folder with JSON files; name the one that holds them: chatgot plan FOLDER --sweep"
        )
    requests = [_request(arguments, path) for path in paths]
    plans = [_plan_or_refusal(request) for request in requests]
    if arguments.format == "json":
        return json.dumps([_tree(request, plan, []) for request, plan in zip(requests, plans)], indent=2)
    device = requests[-1].device
    head = f"{arguments.config}, {arguments.world_size} x {device.name}, of {device.memory / GIB:.1f} GiB"
    rows = [(path.name, plan) for path, plan in zip(paths, plans)]
    return "\n".join([head, *_table(rows), *(f"note: {note}" for note in requests[-1].notes)])


def _plan_or_refusal(request: Request) -> Estimate | str:
    try:
        return request.plan()
    except ConfigError as error:
        return str(error)


def _text(request: Request, plan: Estimate, remedies: list[Remedy]) -> Iterator[str]:
    """The whole plan, some twenty lines."""
    settings, model, on_cuda = plan.settings, plan.settings.model, plan.device.on_cuda
    every = settings.recompute_every
    recomputed = {None: "no recomputation", 1: "every block recomputed"}.get(every, f"one block in {every} recomputed")
    margin = f"{_size(CUDA_CONTEXT)} for CUDA and NCCL" if on_cuda else f"{_size(PROCESS)} for Python and torch"
    beyond = plan.needed - plan.peak - plan.margin
    spare = plan.capacity - plan.needed
    verdict = f"fits, {_size(spare)} to spare" if plan.fits else f"DOES NOT FIT, {_size(-spare)} too much"
    yield f"{request.document.name} on {settings.world_size} x {plan.device.name}"
    yield (
        f"model: {model.architecture}, {settings.numel:,} parameters, vocabulary {settings.vocab_size}, "
        f"{model.max_seq_length} tokens a sample"
    )
    yield (
        f"run: {settings.precision}, ZeRO stage {settings.stage}, micro batch {settings.micro_batch_size}, "
        f"accumulation {settings.accumulation}, {recomputed}\n"
    )
    yield f"memory of one rank at its peak, {plan.peak_at}:"
    yield from (f"  {_NAMES[part]:<24}{_size(size):>12}" for part, size in plan.parts.items() if size)
    yield f"  {'in use':<24}{_size(plan.peak):>12}"
    yield f"  {'margin':<24}{_size(plan.margin):>12}   {100 * FRAGMENTATION:.0f} % for the allocator, {margin}"
    if not on_cuda and beyond > 0:
        yield f"  {'offloaded':<24}{_size(beyond):>12}   the same memory on a CPU"
    yield f"  {'needed':<24}{_size(plan.needed):>12}   of {_size(plan.capacity)}: {verdict}"
    if on_cuda:
        offloaded = ", ".join(f"{_NAMES[part]} {_size(size)}" for part, size in plan.states.host.items())
        start = f"at the start, with the model in fp32; {offloaded or 'nothing offloaded'}"
        yield f"host memory of one rank: {_size(plan.host)} ({start if plan.starts_high else offloaded})"
    yield f"checkpoint: {_size(plan.checkpoint)} on disk"
    yield f"speed: {_speed(plan)}"
    yield from (f"note: {note}" for note in (*request.notes, *settings.notes))
    if not plan.fits:
        nothing = "\nno micro batch, recomputation, stage or offload makes it fit"
        yield "\ncheapest changes that make it fit:" if remedies else nothing
    for remedy in remedies:
        cost = "" if remedy.speed_ratio is None else f", {100 * (remedy.speed_ratio - 1):+.0f} % tokens/s"
        yield f"  {' '.join(remedy.words())}"
        yield f"      needs {_size(remedy.plan.needed)}{cost}"


def _speed(plan: Estimate) -> str:
    speed = plan.speed
    if speed is None:
        return f"not estimated: {plan.settings.precision} on {plan.device.name} has no known peak"
    share = f", {100 * speed.moving_share:.0f} % of it communication and offload" if speed.moving_share >= 0.005 else ""
    return (
        f"about {speed.tokens_per_sec:,.0f} tokens/s, {speed.step_ms:,.0f} ms a step{share}; "
        f"assumes {100 * speed.efficiency:.0f} % of the peak while computing"
    )


def _table(rows: list[tuple[str, Estimate | str]]) -> Iterator[str]:
    """One line per JSON; a text in place of an estimate says why it cannot run."""
    head = ("JSON", "fits", "needs", "states", "activations", "logits", "buffers", "host", "checkpoint", "tokens/s")
    lines = {"JSON": head} | {name: _cells(name, plan) for name, plan in rows if not isinstance(plan, str)}
    widths = [max(map(len, column)) for column in zip(*lines.values())]
    widths[0] = max(len(name) for name, _ in [("JSON", ""), *rows])
    for name, plan in [("JSON", None), *rows]:
        if isinstance(plan, str):
            yield f"{name:<{widths[0]}}  refused: {plan.splitlines()[0]}"
        else:
            cells = (f"{cell:>{width}}" for cell, width in zip(lines[name][1:], widths[1:]))
            yield "  ".join([f"{name:<{widths[0]}}", *cells])


def _cells(name: str, plan: Estimate) -> tuple[str, ...]:
    states = sum(plan.parts[part] for part in STATES)
    buffers = sum(plan.parts[part] for part in ("buffers", "gathered", "temporaries", "libraries"))
    activations, logits = plan.parts["activations"], plan.parts["logits"]
    sizes = (plan.needed, states, activations, logits, buffers, plan.host, plan.checkpoint)
    rate = f"{plan.speed.tokens_per_sec:,.0f}" if plan.speed else "?"
    return (name, "yes" if plan.fits else "NO", *map(_size, sizes), rate)


def _tree(request: Request, plan: Estimate | str, remedies: list[Remedy]) -> dict[str, Any]:
    """The plan, or why there is none, for programs. Sizes in bytes."""
    if isinstance(plan, str):
        return {"deepspeed_config": request.document.name, "refused": plan}
    settings = plan.settings
    digits = {"tokens_per_sec": 1, "step_ms": 3, "efficiency": 4, "moving_share": 4}
    return {
        "deepspeed_config": request.document.name,
        "device": plan.device.name,
        "world_size": settings.world_size,
        "parameters": settings.numel,
        "vocab_size": settings.vocab_size,
        "precision": settings.precision,
        "zero_stage": settings.stage,
        "micro_batch_size": settings.micro_batch_size,
        "accumulation": settings.accumulation,
        **{name: getattr(plan, name) for name in ("fits", "needed", "capacity", "peak", "peak_at", "margin", "parts")},
        "host": plan.host,
        "offloaded": plan.states.host,
        "checkpoint": plan.checkpoint,
        "speed": plan.speed and {name: round(value, digits[name]) for name, value in asdict(plan.speed).items()},
        "notes": [*request.notes, *settings.notes],
        "remedies": [
            {
                "overrides": one.words(),
                "needed": one.plan.needed,
                "speed_ratio": one.speed_ratio and round(one.speed_ratio, 4),
            }
            for one in remedies
        ],
    }


def _size(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
