"""`chatgot plan`: one JSON or all of a folder planned for one kind of device, and the changes that make it fit; as
text, a table of several, or JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from chatgot.config.overrides import parse_overrides
from chatgot.config.run import RunConfig, load_run_config
from chatgot.deepspeed_json.read import Document, find_json, read_document, shipped_jsons
from chatgot.deepspeed_json.resolve import EngineConfig, resolve
from chatgot.deepspeed_json.schema import ACCUMULATION, MICRO, TOTAL
from chatgot.devices import GIB, Device, find_device
from chatgot.errors import ConfigError
from chatgot.model.shapes import count_parameters
from chatgot.plan.estimate import CUDA_CONTEXT, FRAGMENTATION, PARTS, PROCESS, Estimate, estimate
from chatgot.plan.memory import STATES
from chatgot.plan.settings import Overrides, less_memory, words

CHARACTERS = 100
"""Vocabulary that is assumed for the char tokenizer, whose real one depends on the text."""

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
class Request:
    """One JSON on one kind of device."""

    document: Document = field(repr=False)
    """The JSON as read."""
    config: RunConfig
    vocab_size: int
    overrides: Overrides
    world_size: int
    device: Device
    notes: tuple[str, ...] = ()

    def engine_config(self, extra: Overrides) -> EngineConfig:
        """The JSON resolved for the device and the model, with more overrides.

        Raises:
            ConfigError: it is refused.
        """
        overrides, facts = {**self.overrides, **extra}, self.device.facts
        resolved = resolve(self.document, overrides, world_size=self.world_size, facts=facts)
        return resolved.complete(count_parameters(self.config.model, self.vocab_size)).engine_config()

    def plan(self, extra: Overrides | None = None) -> Estimate:
        """Estimate the run, with more overrides or without. Raises ConfigError as `engine_config`."""
        engine = self.engine_config(extra or {})
        return estimate(self.config.model, self.vocab_size, engine, self.world_size, self.device)

    def given(self, key: str) -> bool:
        """Whether the file or an override states a top-level key."""
        return self.document.tree.get(key) is not None or self.overrides.get(key) is not None


def read_request(
    path: Path,
    config: str,
    world_size: int,
    device: str,
    overrides: list[str] | None = None,
    vocab_size: int | None = None,
) -> Request:
    """Read what the command line names.

    Raises:
        ConfigError: a file cannot be read, a name is not known, a number is out of range.
    """
    for name, number in (("world_size", world_size), ("vocab_size", vocab_size)):
        if number is not None and number < 1:
            raise ConfigError(f"--{name} {number}: must be at least 1")
    run_overrides, ds_overrides = parse_overrides(overrides or [])
    run = load_run_config(config, run_overrides)
    notes: list[str] = []
    if vocab_size is None:
        vocab_size, note = _vocabulary(run)
        notes.append(note)
    kind = find_device(device)
    if kind.note:
        notes.append(f"{kind.name}: {kind.note}")
    return Request(read_document(path), run, vocab_size, ds_overrides, world_size, kind, tuple(notes))


def _vocabulary(run: RunConfig) -> tuple[int, str]:
    if run.data.tokenizer == "byte":
        return 256, "vocabulary 256: tokenizer byte"
    if run.data.tokenizer == "bpe":
        return run.data.bpe_vocab_size, f"vocabulary {run.data.bpe_vocab_size}: data.bpe_vocab_size"
    if run.data.tokenizer == "given":
        raise ConfigError("data.tokenizer = given: its vocabulary is not known here; --vocab_size says how large it is")
    return CHARACTERS, f"vocabulary {CHARACTERS}: assumed for tokenizer char; --vocab_size says it exactly"


@dataclass(frozen=True)
class Remedy:
    """Changes together, planned again."""

    overrides: Overrides
    plan: Estimate
    speed_ratio: float | None
    """Predicted tokens per second over those of the run as asked for; None where speed is not known."""

    def words(self) -> list[str]:
        """The changes as train.py and plan take them: ['ds.zero_optimization.stage=2']."""
        return words(self.overrides)


def find_remedies(request: Request, current: Estimate, limit: int = 5) -> list[Remedy]:
    """Smallest sets of changes that fit, by predicted speed, then by their number; empty where nothing helps.

    A change that is refused (16 bit at stage 0, offload with Muon) is left out, and so is a set that contains another
    one that fits.
    """
    engine = request.engine_config({})
    others = less_memory(engine, current.settings.model.n_layers, offload=current.device.on_cuda)
    knobs: list[list[Overrides | None]] = [[None, *knob] for knob in ([*_micro_batches(request, current)], *others)]
    best: dict[frozenset[int], Remedy] = {}
    for settings in sorted(product(*knobs), key=lambda settings: len(settings) - settings.count(None)):
        turned = frozenset(knob for knob, setting in enumerate(settings) if setting is not None)
        if not turned or any(smaller < turned for smaller in best):
            continue
        overrides = {key: value for setting in settings for key, value in (setting or {}).items()}
        try:
            plan = request.plan(overrides)
        except ConfigError:
            continue  # refused: no way to run it, so no remedy
        if plan.fits:
            ratio = plan.speed.tokens_per_sec / current.speed.tokens_per_sec if plan.speed and current.speed else None
            remedy = Remedy(overrides, plan, ratio)
            best[turned] = min(best.get(turned, remedy), remedy, key=_price)
    return sorted(best.values(), key=_price)[:limit]


def _price(remedy: Remedy) -> tuple[float, int]:
    """Speed lost, then the number of changes; of equals the first, which has the mildest setting of every knob."""
    return (-(remedy.speed_ratio or 0.0), len(remedy.overrides))


def _micro_batches(request: Request, current: Estimate) -> Iterator[Overrides]:
    """Every smaller micro batch that divides the present one; the global batch stays."""
    micro, accumulation = current.settings.micro_batch_size, current.settings.accumulation
    for smaller in range(micro // 2, 0, -1):
        if micro % smaller == 0:
            overrides: Overrides = {MICRO: smaller}
            if request.given(ACCUMULATION) or not request.given(TOTAL):
                overrides[ACCUMULATION] = accumulation * micro // smaller
            yield overrides


def plan(
    deepspeed_config: Path | None,
    config: str,
    world_size: int,
    device: str,
    overrides: Sequence[str] = (),
    vocab_size: int | None = None,
    sweep: bool = False,
    format: str = "text",
) -> str:
    """What the command prints, from its arguments.

    Raises:
        ConfigError: files, names or numbers are wrong, or the JSON is refused.
    """
    if not sweep and deepspeed_config is None:
        raise ConfigError("chatgot plan: which JSON? Give one, or --sweep for all of ds_configs/")
    if not sweep:
        paths = [find_json(deepspeed_config or "")]
    elif deepspeed_config is None:
        paths = list(shipped_jsons().values())
    else:
        paths = sorted(deepspeed_config.glob("*.json"))
    if not paths:
        where = f"{deepspeed_config} is no folder with JSON files"
        raise ConfigError(f"--sweep: {where}; name the one that holds them: chatgot plan FOLDER --sweep")
    requests = [read_request(path, config, world_size, device, list(overrides), vocab_size) for path in paths]
    last = requests[-1]
    if not sweep:
        current = last.plan()
        remedies = [] if current.fits else find_remedies(last, current)
        if format == "json":
            return json.dumps(_tree(last, current, remedies), indent=2)
        return "\n".join(_text(last, current, remedies))
    plans = [_plan_or_refusal(request) for request in requests]
    if format == "json":
        return json.dumps([_tree(request, plan, []) for request, plan in zip(requests, plans)], indent=2)
    head = f"{config}, {world_size} x {last.device.name}, of {last.device.memory / GIB:.1f} GiB"
    rows = [(path.name, plan) for path, plan in zip(paths, plans)]
    return "\n".join([head, *_table(rows), *(f"note: {note}" for note in last.notes)])


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
