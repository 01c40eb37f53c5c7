"""A plan as people and programs read it: text, a table of several, JSON."""

from __future__ import annotations

from typing import Any

from chatgot.devices import GIB
from chatgot.plan.estimate import CUDA_CONTEXT, FRAGMENTATION, PARTS, PROCESS, Estimate
from chatgot.plan.remedies import Remedy
from chatgot.plan.request import Request
from chatgot.plan.states import STATES

_NAMES = {
    "parameters": "parameters",
    "gradients": "gradients",
    "master_weights": "fp32 master weights",
    "optimizer_states": "optimizer states",
    "buffers": "communication buffers",
    "gathered": "gathered parameters",
    "activations": "activations",
    "logits": "logits and loss",
    "temporaries": "temporaries",
    "libraries": "cuBLAS workspace",
}


def text(request: Request, plan: Estimate, remedies: list[Remedy]) -> str:
    """The whole plan, some twenty lines."""
    settings, model = plan.settings, plan.settings.model
    offloaded = plan.states.host
    lines = [
        f"{request.path} on {settings.world_size} x {plan.device.name}",
        f"model: {model.architecture}, {settings.numel:,} parameters, vocabulary {settings.vocab_size}, "
        f"{model.max_seq_length} tokens a sample",
        f"run: {settings.precision}, ZeRO stage {settings.stage}, micro batch {settings.micro_batch_size}, "
        f"accumulation {settings.accumulation}, {_recomputation(plan)}",
        "",
        f"memory of one rank at its peak, {plan.peak_at}:",
        *(f"  {_NAMES[part]:<24}{_size(plan.parts[part]):>12}" for part in PARTS if plan.parts[part]),
        f"  {'in use':<24}{_size(plan.peak):>12}",
        f"  {'margin':<24}{_size(plan.margin):>12}   {_margin(plan)}",
    ]
    if not plan.device.on_cuda and plan.needed > plan.peak + plan.margin:
        lines.append(
            f"  {'offloaded':<24}{_size(plan.needed - plan.peak - plan.margin):>12}   the same memory on a CPU"
        )
    lines.append(f"  {'needed':<24}{_size(plan.needed):>12}   of {_size(plan.capacity)}: {_verdict(plan)}")
    if plan.device.on_cuda:
        parts = (
            ", ".join(f"{_NAMES[part]} {_size(size)}" for part, size in offloaded.items())
            if offloaded
            else "nothing offloaded"
        )
        lines.append(f"host memory of one rank: {_size(plan.host)} ({parts})")
    lines.append(f"checkpoint: {_size(plan.checkpoint)} on disk")
    lines.append(f"speed: {_speed(plan)}")
    lines += [f"note: {note}" for note in (*request.notes, *settings.notes)]
    if not plan.fits:
        lines.append("")
        lines.append(
            "cheapest changes that make it fit:"
            if remedies
            else "no micro batch, recomputation, stage or offload makes it fit"
        )
        for remedy in remedies:
            cost = "" if remedy.speed_ratio is None else f", {100 * (remedy.speed_ratio - 1):+.0f} % tokens/s"
            lines.append(f"  {' '.join(remedy.words())}")
            lines.append(f"      needs {_size(remedy.plan.needed)}{cost}")
    return "\n".join(lines)


def table(rows: list[tuple[str, Estimate | str]]) -> str:
    """One line per JSON; a text in place of an estimate says why it cannot run."""
    head = ("JSON", "fits", "needs", "states", "activations", "logits", "buffers", "host", "checkpoint", "tokens/s")
    body: list[tuple[str, ...]] = []
    for name, plan in rows:
        if isinstance(plan, str):
            body.append((name, "refused", plan, *[""] * 7))
            continue
        states = sum(plan.parts[part] for part in STATES)
        buffers = sum(plan.parts[part] for part in ("buffers", "gathered", "temporaries", "libraries"))
        rate = f"{plan.speed.tokens_per_sec:,.0f}" if plan.speed else "?"
        sizes = (
            plan.needed,
            states,
            plan.parts["activations"],
            plan.parts["logits"],
            buffers,
            plan.host,
            plan.checkpoint,
        )
        body.append((name, "yes" if plan.fits else "NO", *map(_size, sizes), rate))
    measured = [row for row in (head, *body) if row[1] != "refused"]
    widths = [max(len(row[column]) for row in measured) for column in range(len(head))]
    widths[0] = max(len(row[0]) for row in (head, *body))
    lines = []
    for row in (head, *body):
        if row[1] == "refused":
            lines.append(f"{row[0]:<{widths[0]}}  refused: {row[2]}")
        else:
            lines.append(
                f"{row[0]:<{widths[0]}}  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:]))
            )
    return "\n".join(lines)


def tree(request: Request, plan: Estimate, remedies: list[Remedy]) -> dict[str, Any]:
    """For programs. Sizes in bytes."""
    settings, speed = plan.settings, plan.speed
    return {
        "deepspeed_config": str(request.path),
        "device": plan.device.name,
        "world_size": settings.world_size,
        "parameters": settings.numel,
        "vocab_size": settings.vocab_size,
        "precision": settings.precision,
        "zero_stage": settings.stage,
        "micro_batch_size": settings.micro_batch_size,
        "accumulation": settings.accumulation,
        "fits": plan.fits,
        "needed": plan.needed,
        "capacity": plan.capacity,
        "peak": plan.peak,
        "peak_at": plan.peak_at,
        "margin": plan.margin,
        "parts": plan.parts,
        "host": plan.host,
        "offloaded": plan.states.host,
        "checkpoint": plan.checkpoint,
        "speed": None
        if speed is None
        else {
            "tokens_per_sec": round(speed.tokens_per_sec, 1),
            "step_ms": round(speed.step_ms, 3),
            "efficiency": round(speed.efficiency, 4),
            "moving_share": round(speed.moving_share, 4),
        },
        "notes": [*request.notes, *settings.notes],
        "remedies": [
            {
                "overrides": remedy.words(),
                "needed": remedy.plan.needed,
                "speed_ratio": remedy.speed_ratio and round(remedy.speed_ratio, 4),
            }
            for remedy in remedies
        ],
    }


def _size(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def _recomputation(plan: Estimate) -> str:
    every = plan.settings.recompute_every
    if every is None:
        return "no recomputation"
    return "every block recomputed" if every == 1 else f"one block in {every} recomputed"


def _margin(plan: Estimate) -> str:
    share = f"{100 * FRAGMENTATION:.0f} % for the allocator"
    return (
        f"{share}, {_size(CUDA_CONTEXT)} for CUDA and NCCL"
        if plan.device.on_cuda
        else f"{share}, {_size(PROCESS)} for Python and torch"
    )


def _verdict(plan: Estimate) -> str:
    if plan.fits:
        return f"fits, {_size(plan.capacity - plan.needed)} to spare"
    return f"DOES NOT FIT, {_size(plan.needed - plan.capacity)} too much"


def _speed(plan: Estimate) -> str:
    if plan.speed is None:
        return f"not estimated: {plan.settings.precision} on {plan.device.name} has no known peak"
    moving = (
        f", {100 * plan.speed.moving_share:.0f} % of it communication and offload"
        if plan.speed.moving_share >= 0.005
        else ""
    )
    return (
        f"about {plan.speed.tokens_per_sec:,.0f} tokens/s, {plan.speed.step_ms:,.0f} ms a step{moving}; "
        f"assumes {100 * plan.speed.efficiency:.0f} % of the peak while computing"
    )
