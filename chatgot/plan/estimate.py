"""The plan of one run: memory of the fullest rank at its peak, host memory, checkpoint size, speed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from chatgot.config.run import ModelConfig
from chatgot.deepspeed_json.engine_config import EngineConfig
from chatgot.devices import GIB, Device
from chatgot.plan.activations import Activations, activations
from chatgot.plan.settings import FP32, Settings, read_settings
from chatgot.plan.speed import Speed, speed
from chatgot.plan.states import Memory, checkpoint_bytes, fullest_rank, model_states, padded_numel

PARTS = (
    "parameters",
    "gradients",
    "master_weights",
    "optimizer_states",
    "buffers",
    "gathered",
    "activations",
    "logits",
    "temporaries",
    "libraries",
)
"""buffers: communication and offload; gathered: ZeRO-3's whole parameters; libraries: cuBLAS."""

FRAGMENTATION = 0.05
"""Margin: share of the peak that PyTorch's allocator may hold beyond what is in use."""
CUDA_CONTEXT = round(0.8 * GIB)
"""Margin: CUDA context, kernels and NCCL, which PyTorch does not count."""
PROCESS = round(0.6 * GIB)
"""Resident size of Python with torch and DeepSpeed, before a model exists."""
ALLREDUCE_ELEMENTS = 500_000_000
"""engine.py, MEMORY_OPT_ALLREDUCE_SIZE: stage 0 and the BF16_Optimizer flatten gradients up to so many elements into a
copy.
"""


@dataclass(frozen=True)
class Estimate:
    """Bytes of one rank, the fullest."""

    settings: Settings
    device: Device
    states: Memory
    """Parameters, gradients, master weights, moments and buffers before the optimizer step."""
    activations: Activations
    parts: dict[str, int]
    """On the device at the peak; names in PARTS."""
    peak_at: str
    host: int
    """Of one rank in host memory, the process itself included; on a CPU the device's memory is that."""
    checkpoint: int
    """Bytes of all files of one checkpoint, all ranks."""
    speed: Speed | None

    @property
    def peak(self) -> int:
        """Bytes in use on the device at the peak (what torch.cuda.max_memory_allocated reports)."""
        return sum(self.parts.values())

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
        return (
            self.peak
            + self.margin
            + (0 if self.device.on_cuda else sum(self.states.host.values()) + self.activations.host)
        )

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
        host=PROCESS + offloaded + (0 if device.on_cuda else sum(parts.values())),
        checkpoint=checkpoint_bytes(settings),
        speed=speed(settings, device),
    )


def _phases(settings: Settings, states: Memory, kept: Activations) -> Iterator[tuple[str, dict[str, int]]]:
    """Moments of a step at which memory may be at its highest, with what is on the device then."""
    always = {part: size for part, size in states.device.items() if part != "gradients"}
    before, growth = _gradients(settings, states)
    element = settings.parameter_bytes
    bucket, sharing = (
        _bucket(settings),
        element * min(settings.reduce_bucket, settings.numel) * _sharing_copies(settings),
    )
    # A bucket that holds all gradients is reduced once, after the last block.
    late = settings.stage > 0 and not settings.bf16_optimizer and settings.reduce_bucket >= settings.numel
    running = {**always, "gathered": _gathered(settings)}
    own = always.get("buffers", 0)

    # The bucket comes with the first gradient of a pass; ZeRO-1 keeps it until the last pass of the step.
    waiting = own + (bucket if settings.stage == 1 and settings.accumulation > 1 else 0)
    yield (
        "the loss",
        running
        | {"buffers": waiting, "gradients": before, "activations": kept.saved - kept.logits, "logits": kept.loss_peak},
    )
    n_layers = len(kept.blocks)
    for index in reversed(range(n_layers)):
        done = 0.0 if late else (n_layers - index) / n_layers
        # Where the input alone is kept, the block has its activations once more while it is differentiated.
        again = kept.blocks[index] if kept.blocks[index] != kept.block else 0
        yield (
            f"the backward pass of block {index}",
            running
            | {
                "buffers": own + bucket,
                "gradients": before + round(growth * done),
                "activations": kept.ends + sum(kept.blocks[:index]) + kept.block + again,
                "temporaries": kept.workspace + (0 if late else sharing),
            },
        )
    resting = always | {"gradients": states.device.get("gradients", 0)}
    reduced = {
        "buffers": own + bucket,
        "gradients": before + growth,
        "temporaries": _reduction_copy(settings) + sharing,
    }
    yield "the reduction of gradients", always | reduced
    yield "the optimizer step", resting | {"temporaries": _stepping(settings)}


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
    """Copies that are made of a bucket while it is reduced: two for ZeRO-3's reduce-scatter, one for sending it at
    stages 1 and 2.
    """
    if settings.stage == 3:
        return 2
    return int(settings.stage > 0 and settings.world_size > 1 and not settings.bf16_optimizer)


def _gathered(settings: Settings) -> int:
    """Whole parameters that ZeRO-3 keeps between their uses, the small ones that always stay whole left out."""
    if not settings.gathers:
        return 0
    large = [numel for group in settings.groups for numel in group.numels if numel > settings.persistence_threshold]
    live = max(settings.max_live_parameters, max(large, default=0)) + settings.prefetch_bucket
    return settings.parameter_bytes * min(sum(large), live)


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
