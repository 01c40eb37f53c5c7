"""Tokens per second from FLOPs, a stated efficiency, and what moving data adds. For choosing between settings, no
promise.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from chatgot.devices import Device, matmul_precision, peak_flops
from chatgot.model.shapes import count_matmul_parameters, flops_per_token
from chatgot.plan.settings import FP32, Settings

BEST_EFFICIENCY, HALF_AT = 0.45, 15e6
"""Share of the peak that a compiled model of N parameters reaches: BEST / (1 + HALF_AT / N). Anchors on A100 and H100:
about 18 % at 10.7 M, 40 % at 124 M, 45 % at 1.3 B (nanoGPT, llm.c, llm-foundry)."""
EAGER = 0.6
"""Speed without torch.compile over the speed with it (nanoGPT: 250 ms against 135 ms a step)."""
CPU_CORE_FLOPS, CPU_EFFICIENCY, CPU_HALF_AT = 165e9, 0.75, 0.6e6
"""fp32 peak of one AVX-512 core, and the share of it that training reached (45 % at 0.8 M parameters, 72 % at 14 M);
other cores differ by a factor of four."""
HOST_ADAM_GB = 20.0
"""GB/s of host memory that an AdamW step on the CPU reads and writes."""


@dataclass(frozen=True)
class Speed:
    """Of all ranks together."""

    tokens_per_sec: float
    step_ms: float
    efficiency: float
    """Share of the peak while computing."""
    moving_share: float
    """Share of a step spent on communication and offload, taken not to overlap with computing."""


def speed(settings: Settings, device: Device) -> Speed | None:
    """None where the device's peak is not known, or where 16 bit on a CPU is emulated at an unknown price."""
    model = settings.model
    matmul = count_matmul_parameters(model, settings.vocab_size)
    flops = flops_per_token(matmul, model.n_layers, model.d_model, model.max_seq_length)
    recomputed = 0.0
    if settings.recompute_every is not None:
        blocks = flops - 6.0 * settings.vocab_size * model.d_model
        recomputed = blocks / 3 * len(range(0, model.n_layers, settings.recompute_every)) / model.n_layers
    if device.on_cuda:
        peak = peak_flops(device.facts.name, matmul_precision(settings.precision))
        if peak is None:
            return None
        efficiency = BEST_EFFICIENCY / (1 + HALF_AT / matmul) * (1.0 if settings.compiled else EAGER)
        per_rank = peak * efficiency
    elif settings.precision == "fp32":
        efficiency = CPU_EFFICIENCY / (1 + CPU_HALF_AT / matmul)
        per_rank = CPU_CORE_FLOPS * efficiency * (os.cpu_count() or 1) / settings.world_size
    else:
        return None
    tokens = settings.tokens * settings.accumulation
    computing = tokens * (flops + recomputed) / per_rank
    moving = _moving_seconds(settings, device) if device.on_cuda else 0.0
    seconds = computing + moving
    return Speed(tokens * settings.world_size / seconds, 1000 * seconds, efficiency, moving / seconds)


def _moving_seconds(settings: Settings, device: Device) -> float:
    """Gradients reduced once a step (ZeRO-2 and 3: once a micro batch), parameters gathered, states and weights to the
    host and back.
    """
    world, weights = settings.world_size, settings.parameter_bytes * settings.numel
    gathered = 0.0
    if world > 1:
        reductions = settings.accumulation if settings.stage >= 2 else 1
        gathers = 2 * settings.accumulation if settings.stage == 3 else 1
        gathered = (world - 1) / world * weights * (reductions + gathers)
    hosted = 0.0
    seconds = 0.0
    if settings.offload_optimizer:
        hosted += 2 * weights / world
        seconds += (
            7 * FP32 * settings.numel / world / (HOST_ADAM_GB * 1e9)
        )  # gradient, weights and moments read, all but one written
    if settings.offload_param:
        hosted += 2 * settings.accumulation * weights / world
    return seconds + gathered / (device.link_gb * 1e9) + hosted / (device.host_gb * 1e9)
