"""The plan of one run: memory of the fullest rank at its peak, host memory, checkpoint size, speed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from chatgot.config.run import ModelConfig
from chatgot.deepspeed_json.resolve import EngineConfig
from chatgot.devices import GIB, Device, matmul_precision, peak_flops
from chatgot.model.shapes import count_matmul_parameters, flops_per_token
from chatgot.plan.memory import (
    STATES,
    Activations,
    Memory,
    activations,
    checkpoint_bytes,
    fullest_rank,
    model_states,
    padded_numel,
)
from chatgot.plan.settings import FP32, Settings, read_settings

PARTS = (*STATES, "buffers", "gathered", "activations", "logits", "temporaries", "libraries")
"""buffers: communication and offload; gathered: ZeRO-3's whole parameters; libraries: cuBLAS."""

FRAGMENTATION = 0.05
"""Margin: share of the peak that PyTorch's allocator may hold beyond what is in use."""
CUDA_CONTEXT = round(0.8 * GIB)
"""Margin: CUDA context, kernels and NCCL, which PyTorch does not count."""
PROCESS = round(0.6 * GIB)
"""Resident size of Python with torch and DeepSpeed, before a model exists."""
ALLREDUCE_ELEMENTS = 500_000_000
"""Stage 0 and the BF16_Optimizer flatten gradients up to so many into a copy (engine.py, MEMORY_OPT_ALLREDUCE_SIZE)."""
BEST_EFFICIENCY, HALF_AT = 0.45, 15e6
"""Share of the peak that a compiled model of N parameters reaches: BEST / (1 + HALF_AT / N). Anchors on A100 and H100:
about 18 % at 10.7 M, 40 % at 124 M, 45 % at 1.3 B (nanoGPT, llm.c, llm-foundry)."""
EAGER = 0.6
"""Speed without torch.compile over the speed with it (nanoGPT: 250 ms against 135 ms a step)."""
CPU_CORE_FLOPS, CPU_EFFICIENCY, CPU_HALF_AT = 165e9, 0.75, 0.6e6
"""fp32 peak of one AVX-512 core, and the share of it that training reached (45 % at 0.8 M parameters, 72 % at 14 M);
other cores differ by a factor of four."""
SLOW_STEP_MS = 2000.0
HOST_ADAM_GB = 20.0
"""GB/s of host memory that an AdamW step on the CPU reads and writes."""


@dataclass(frozen=True)
class Speed:
    """Predicted speed of all ranks together: for choosing between settings, no promise."""

    tokens_per_sec: float
    step_ms: float
    efficiency: float
    """Share of the peak while computing."""
    moving_share: float
    """Share of a step spent on communication and offload, taken not to overlap with computing."""


@dataclass(frozen=True)
class Estimate:
    """The plan of a run. Bytes are those of the fullest rank."""

    settings: Settings
    device: Device
    states: Memory
    """Parameters, gradients, master weights, moments and buffers before the optimizer step."""
    activations: Activations
    parts: dict[str, int]
    """On the device at the peak; names in PARTS."""
    peak_at: str
    host: int
    """Of one rank in host memory, the process itself included, where the whole model in fp32 is before it is shared out
    or taken to the device; on a CPU the device's memory is that."""
    checkpoint: int
    """Bytes of all files of one checkpoint, all ranks."""
    speed: Speed | None

    @property
    def peak(self) -> int:
        """Bytes in use on the device at the peak (what torch.cuda.max_memory_allocated reports)."""
        return sum(self.parts.values())

    @property
    def starts_high(self) -> bool:
        """Whether the whole model in fp32, from which the device is filled, takes more host memory than the run."""
        return self.host == PROCESS + FP32 * self.settings.numel

    @property
    def margin(self) -> int:
        """Bytes beyond the peak that must be free."""
        return round(FRAGMENTATION * self.peak) + (CUDA_CONTEXT if self.device.on_cuda else PROCESS)

    @property
    def capacity(self) -> int:
        """Bytes that this rank may use."""
        return self.device.memory if self.device.on_cuda else self.device.memory // self.settings.world_size

    @property
    def needed(self) -> int:
        """Peak and margin, and on a CPU what is offloaded too."""
        offloaded = 0 if self.device.on_cuda else sum(self.states.host.values()) + self.activations.host
        return self.peak + self.margin + offloaded

    @property
    def fits(self) -> bool:
        """Whether it runs."""
        return self.needed <= self.capacity


def estimate(model: ModelConfig, vocab_size: int, engine: EngineConfig, world_size: int, device: Device) -> Estimate:
    """Plan a run. `engine` must have been read with the model's size, so that its buckets are resolved."""
    settings = read_settings(model, vocab_size, engine, world_size, device.on_cuda)
    states = model_states(settings, fullest_rank(settings))
    kept = activations(settings)
    libraries = device.library_bytes if device.on_cuda else 0
    peak_at, parts = max(_phases(settings, states, kept), key=lambda phase: sum(phase[1].values()))
    parts = {part: parts.get(part, 0) for part in PARTS} | {"libraries": libraries}
    offloaded = sum(states.host.values()) + kept.host
    return Estimate(
        settings=settings,
        device=device,
        states=states,
        activations=kept,
        parts=parts,
        peak_at=peak_at,
        host=PROCESS + max(FP32 * settings.numel, offloaded + (0 if device.on_cuda else sum(parts.values()))),
        checkpoint=checkpoint_bytes(settings),
        speed=_speed(settings, device),
    )


def slowness(plan: Estimate) -> list[str]:
    """Say where a step takes more than some seconds on this CPU, and what is faster; else nothing."""
    settings, half = plan.settings, plan.settings.precision != "fp32"
    speed = None if plan.device.on_cuda else _speed(replace(settings, precision="fp32"), plan.device)
    if speed is None or speed.step_ms < SLOW_STEP_MS:
        return []
    tokens = settings.tokens * settings.accumulation * settings.world_size
    emulated = f", and longer in {settings.precision}, which most CPUs emulate" if half else ""
    faster = "a GPU; --config tiny; fp32_zero0_muon as --deepspeed_config; a smaller ds.train_batch_size"
    return [
        f"a step of {tokens:,} tokens takes about {speed.step_ms / 1000:.0f} s on this CPU{emulated}; faster: {faster}"
    ]


def _phases(settings: Settings, states: Memory, kept: Activations) -> Iterator[tuple[str, dict[str, int]]]:
    """Moments of a step at which memory may be at its highest, with what is on the device then."""
    always = {part: size for part, size in states.device.items() if part != "gradients"}
    before, growth = _gradients(settings, states)
    bucket = _bucket(settings)
    sharing = settings.parameter_bytes * min(settings.reduce_bucket, settings.numel) * _sharing_copies(settings)
    # A bucket that holds all gradients is reduced once, after the last block.
    late = settings.stage > 0 and not settings.bf16_optimizer and settings.reduce_bucket >= settings.numel
    running = {**always, "gathered": _gathered(settings)}
    own = always.get("buffers", 0)

    # The bucket comes with the first gradient of a pass; ZeRO-1 keeps it until the last pass of the step.
    waiting = own + (bucket if settings.stage == 1 and settings.accumulation > 1 else 0)
    loss = {"activations": kept.saved - kept.logits, "logits": kept.loss_peak}
    yield "the loss", running | loss | {"buffers": waiting, "gradients": before}
    n_layers = len(kept.blocks)
    for index in reversed(range(n_layers)):
        done = 0.0 if late else (n_layers - index) / n_layers
        # Where the input alone is kept, the block has its activations once more while it is differentiated.
        again = kept.blocks[index] if kept.blocks[index] != kept.block else 0
        there = {
            "buffers": own + bucket,
            "gradients": before + round(growth * done),
            "activations": kept.ends + sum(kept.blocks[:index]) + kept.block + again,
            "temporaries": kept.workspace + (0 if late else sharing),
        }
        yield f"the backward pass of block {index}", running | there
    copies = {"buffers": own + bucket, "temporaries": _reduction_copy(settings) + sharing}
    yield "the reduction of gradients", always | copies | {"gradients": before + growth}
    yield "the optimizer step", states.device | {"temporaries": _stepping(settings)}


def _gradients(settings: Settings, states: Memory) -> tuple[int, int]:
    """Bytes of gradients when the last backward pass of a step begins, and how many more there are at its end."""
    element, numel, several = settings.parameter_bytes, settings.numel, settings.accumulation > 1
    whole = element * numel
    at_step = states.device.get("gradients", 0)
    if settings.stage == 0:
        return (whole, 0) if several else (0, whole)
    if settings.bf16_optimizer:
        flat = at_step - whole
        return (flat + whole, 0) if several else (flat, whole)
    if settings.stage == 1:
        accumulated = settings.accumulator_bytes * numel
        if several:
            return accumulated, whole if accumulated != whole else 0
        return 0, at_step + (whole + accumulated if accumulated != whole else 0)
    if settings.stage == 2:
        compact = settings.accumulator_bytes != element
        return (at_step, 0 if compact else at_step) if several else (0, at_step)
    return at_step, 0


def _bucket(settings: Settings) -> int:
    """ZeRO-1 and 2 allocate the whole reduce bucket for every backward pass; ZeRO-3's is there all the time."""
    if settings.stage not in (1, 2) or settings.bf16_optimizer:
        return 0
    element = settings.accumulator_bytes if settings.stage == 1 else settings.parameter_bytes
    return element * settings.reduce_bucket * (2 if settings.overlap_comm else 1)


def _sharing_copies(settings: Settings) -> int:
    """Copies of a bucket while it is reduced: two for ZeRO-3's reduce-scatter, one for sending it at stages 1 and 2."""
    if settings.stage == 3:
        return 2
    return int(settings.stage > 0 and settings.world_size > 1 and not settings.bf16_optimizer)


def _gathered(settings: Settings) -> int:
    """Whole parameters that ZeRO-3 keeps between their uses, the small ones that always stay whole left out."""
    if not settings.gathers:
        return 0
    large = Counter(numel for group in settings.groups for numel in group.numels) - Counter(settings.whole)
    live = max(settings.max_live_parameters, max(large, default=0)) + settings.prefetch_bucket
    return settings.parameter_bytes * min(sum(large.elements()), live)


def _reduction_copy(settings: Settings) -> int:
    """Stage 0 and the BF16_Optimizer reduce a flat copy, in the communication dtype once more where that differs."""
    elements = min(settings.numel, ALLREDUCE_ELEMENTS)
    if settings.bf16_optimizer:
        return (FP32 + settings.parameter_bytes) * elements
    return settings.parameter_bytes * elements if settings.stage == 0 and settings.world_size > 1 else 0


def _stepping(settings: Settings) -> int:
    """Temporaries of the step: norms in fp64, the fp32 gradient of a partition, and what an unfused optimizer needs."""
    largest = max(max(group.numels) for group in settings.groups)
    if settings.stage == 0:
        return 0 if settings.fused else FP32 * settings.numel
    norm = 2 * FP32 * (largest if settings.stage < 3 else -(-largest // settings.world_size))
    if settings.offload_optimizer:
        return norm
    share = max(padded_numel(group, settings.world_size) for group in settings.groups) // settings.world_size
    if settings.stage == 3:
        share = min(share, settings.sub_group_size)
    flat = 0 if settings.bf16_optimizer else settings.master_bytes * share
    return max(norm, flat + (0 if settings.fused else FP32 * share))


def _speed(settings: Settings, device: Device) -> Speed | None:
    """Tokens per second from FLOPs, a stated efficiency, and what moving data adds.

    None where the device's peak is not known, or where 16 bit on a CPU is emulated at an unknown price.
    """
    model = settings.model
    matmul = count_matmul_parameters(model, settings.vocab_size)
    flops = flops_per_token(matmul, model.n_layers, model.attention_width, model.max_seq_length)
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
    """Seconds for gradients, reduced once a step (ZeRO-2 and 3: once a micro batch), parameters, and offload."""
    world, weights = settings.world_size, settings.parameter_bytes * settings.numel
    gathered = 0.0
    if world > 1:
        reductions = settings.accumulation if settings.stage >= 2 else 1
        gathers = 2 * settings.accumulation if settings.stage == 3 else 1
        gathered = (world - 1) / world * weights * (reductions + gathers)
    hosted = seconds = 0.0
    if settings.offload_optimizer:
        hosted += 2 * weights / world
        # Gradient, weights and moments are read, all but the first are written.
        seconds += 7 * FP32 * settings.numel / world / (HOST_ADAM_GB * 1e9)
    if settings.offload_param:
        hosted += 2 * settings.accumulation * weights / world
    return seconds + gathered / (device.link_gb * 1e9) + hosted / (device.host_gb * 1e9)
