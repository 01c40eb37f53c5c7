"""What a plan needs of a run, taken out of the two configurations: sizes in elements and bytes, switches; and what
needs less memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from chatgot.config.run import ModelConfig
from chatgot.deepspeed_json.findings import Findings
from chatgot.deepspeed_json.optimizers import OptimizerStates, has_one_group, optimizer_states
from chatgot.deepspeed_json.resolve import EngineConfig
from chatgot.deepspeed_json.schema import FP32_NAMES
from chatgot.deepspeed_json.values import read_values
from chatgot.model.shapes import Shape, parameter_shapes

Overrides = dict[str, Any]
"""Of the DeepSpeed JSON, without the leading 'ds.'."""
FP32, HALF = 4, 2
"""Bytes of an element."""


@dataclass(frozen=True)
class Group:
    """One parameter group of the optimizer, in the engine's order."""

    shapes: tuple[Shape, ...]
    """Of every parameter."""
    states: OptimizerStates
    muon: bool = False
    """Orthogonalised by Muon."""

    @cached_property
    def numels(self) -> tuple[int, ...]:
        """Elements of every parameter."""
        return tuple(map(prod, self.shapes))

    @cached_property
    def numel(self) -> int:
        """Elements in all."""
        return sum(self.numels)


@dataclass(frozen=True)
class Settings:
    """One run on one kind of device, as far as memory and speed depend on it."""

    model: ModelConfig
    vocab_size: int
    on_cuda: bool
    world_size: int
    micro_batch_size: int
    accumulation: int
    stage: int
    precision: str
    """As EngineConfig.precision has it."""
    parameter_bytes: int
    """Of an element of the parameters that the forward pass uses."""
    accumulator_bytes: int
    """Of an element of the accumulated gradients (data_types.grad_accum_dtype)."""
    master_bytes: int
    moment_bytes: int
    offload_optimizer: bool
    offload_ratio: float
    """ZeRO-3: share of the sub-groups whose optimizer states are offloaded; the first ones are not."""
    offload_param: bool
    groups: tuple[Group, ...]
    fused: bool
    """The optimizer steps without temporaries of the parameters' size."""
    overlap_comm: bool
    reduce_bucket: int
    """Elements."""
    whole: tuple[int, ...]
    """ZeRO-3: elements of the parameters that stay whole on every rank, because they are small."""
    prefetch_bucket: int
    max_live_parameters: int
    sub_group_size: int
    recompute_every: int | None
    """Every n-th block is recomputed in the backward pass; None: none is."""
    activations_on_cpu: bool
    """Inputs of recomputed blocks wait in host memory (activation_checkpointing.cpu_checkpointing)."""
    compiled: bool
    notes: tuple[str, ...]
    """What of the configuration this arithmetic does not know."""

    @property
    def numel(self) -> int:
        """Parameters, a tied matrix once."""
        return sum(group.numel for group in self.groups)

    @property
    def tokens(self) -> int:
        """Of one micro batch on one rank."""
        return self.micro_batch_size * self.model.max_seq_length

    @property
    def gathers(self) -> bool:
        """Whether ZeRO-3 copies a parameter to use it; a single rank does so only where it is offloaded."""
        return self.stage == 3 and (self.world_size > 1 or (self.offload_param and self.on_cuda))

    @property
    def bf16_optimizer(self) -> bool:
        """DeepSpeed takes its BF16_Optimizer and not ZeRO's (engine.py, _do_optimizer_sanity_check)."""
        accumulated_in_fp32 = self.precision == "bf16" and self.accumulator_bytes == FP32
        return self.stage == 1 and accumulated_in_fp32 and not self.offload_optimizer


def read_settings(
    model: ModelConfig, vocab_size: int, engine: EngineConfig, world_size: int, on_cuda: bool
) -> Settings:
    """Put together what the plan computes with."""
    values = read_values(engine.deepspeed, Findings(engine.path))
    zero = values.zero_optimization
    kind = engine.optimizer.type if engine.optimizer else "AdamW"
    params = engine.optimizer.params if engine.optimizer else {}
    bf16, fp16 = engine.precision == "bf16", engine.precision == "fp16"
    parameter_bytes = HALF if bf16 or fp16 else FP32
    wanted = (engine.deepspeed.get("data_types") or {}).get("grad_accum_dtype")
    accumulator_bytes = parameter_bytes if wanted is None else FP32 if wanted in FP32_NAMES else HALF
    low_precision = bf16 and values.bf16.bf16_master_weights_and_grads
    low_precision = low_precision or (fp16 and values.fp16.fp16_master_weights_and_grads)
    # CPUAdam's are in fp32 unless the JSON says otherwise; those of all others are like the masters.
    half_moments = values.bf16.bf16_optimizer_states or params.get("fp32_optimizer_states") is False
    fp32_moments = bool(engine.cpu_adam_key) and not half_moments
    kind = "DeepSpeedCPUAdam" if engine.cpu_adam_key else kind
    unknown = ("zero_quantized_weights", "zero_quantized_gradients", "parameter_alignment", "zenflow")
    names = [f"zero_optimization.{key}" for key in unknown]
    notes = [f"{name} is not part of this arithmetic" for name in names if values[name]]
    if zero.zero_hpz_partition_size > 1:
        hpz = "zero_optimization.zero_hpz_partition_size"
        notes.append(f"{hpz}: the secondary partition is not part of this arithmetic")
    if "nvme" in (engine.offload_optimizer, engine.offload_param):
        notes.append("offload to nvme is counted as host memory")
    if engine.chatgot.compile.enabled:
        upper_bound = "that of eager PyTorch, an upper bound, because compiling fuses activations away"
        notes.append(f"torch.compile: memory is {upper_bound}")
    on_cpu = engine.activation_backend == "deepspeed" and bool(values.activation_checkpointing.cpu_checkpointing)
    muon = kind.lower() == "muon"
    offload = engine.zero_stage > 0 and engine.offload_optimizer != "none"
    in_one = has_one_group(engine.zero_stage, kind, offload)
    return Settings(
        model=model,
        vocab_size=vocab_size,
        on_cuda=on_cuda,
        world_size=world_size,
        micro_batch_size=engine.micro_batch_size,
        accumulation=engine.accumulation,
        stage=engine.zero_stage,
        precision=engine.precision,
        parameter_bytes=parameter_bytes,
        accumulator_bytes=accumulator_bytes,
        master_bytes=HALF if low_precision else FP32,
        moment_bytes=HALF if low_precision and not fp32_moments else FP32,
        offload_optimizer=offload,
        offload_ratio=float(zero.offload_optimizer.ratio),
        offload_param=engine.zero_stage == 3 and engine.offload_param != "none",
        groups=_groups(model, vocab_size, optimizer_states(kind, params, offload), muon, in_one),
        fused=muon or ("foreach" not in params and params.get("fused", True) is not False),
        overlap_comm=engine.zero_stage == 3 if zero.overlap_comm is None else zero.overlap_comm,
        reduce_bucket=int(zero.reduce_bucket_size),
        whole=_whole(
            parameter_shapes(model, vocab_size).values(),
            int(zero.stage3_param_persistence_threshold),
            int(zero.stage3_model_persistence_threshold),
        ),
        prefetch_bucket=int(zero.stage3_prefetch_bucket_size),
        max_live_parameters=zero.stage3_max_live_parameters,
        sub_group_size=zero.sub_group_size,
        recompute_every=engine.chatgot.activation_checkpointing.every_n_layers if engine.activation_backend else None,
        activations_on_cpu=on_cpu,
        compiled=engine.chatgot.compile.enabled,
        notes=tuple(notes),
    )


def _whole(shapes: Iterable[Shape], each: int, together: int) -> tuple[int, ...]:
    """As DeepSpeed chooses, in the model's order (parameter_offload.py, mark_persistent_parameters)."""
    chosen: list[int] = []
    for numel in map(prod, shapes):
        if numel <= each and numel + sum(chosen) <= together:
            chosen.append(numel)
    return tuple(chosen)


def _groups(
    model: ModelConfig, vocab_size: int, states: OptimizerStates, muon: bool, in_one: bool
) -> tuple[Group, ...]:
    """As engine/optimizer.py makes them, and DeepSpeed's Muon splits them by name (engine.py, _muon_param_groups)."""
    shapes = parameter_shapes(model, vocab_size)
    matrices = {name: shape for name, shape in shapes.items() if len(shape) >= 2}
    if in_one:
        return (Group(tuple(shapes.values()), states),)
    vectors = Group(tuple(shape for shape in shapes.values() if len(shape) < 2), states)
    if not muon:
        return (Group(tuple(matrices.values()), states), vectors)
    looked_up = {name: shape for name, shape in matrices.items() if "embed" in name or "lm_head" in name}
    hidden = (shape for name, shape in matrices.items() if name not in looked_up)
    largest_first = tuple(sorted(hidden, reverse=True))  # muon_optimizer.py sorts them by size()
    momentum = optimizer_states("Muon", {"use_muon": True})
    return (Group(largest_first, momentum, muon=True), Group(tuple(looked_up.values()), states), vectors)


def words(overrides: Overrides) -> list[str]:
    """Overrides as a command line takes them."""
    return [f"ds.{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in overrides.items()]


def less_memory(engine: EngineConfig, n_layers: int | None = None, offload: bool = True) -> list[list[Overrides]]:
    """What needs less memory and is not in use yet, by kind: recomputation, ZeRO stage, offload; the mildest first.

    Args:
        n_layers: of the model; None: not known, so that recomputing every second block is left out.
        offload: whether the host's memory is another one than the device's.
    """
    recomputed: list[Overrides] = []
    every, key = engine.chatgot.activation_checkpointing.every_n_layers, "chatgot.activation_checkpointing"
    if engine.activation_backend is None:
        section: Overrides = {} if engine.activation_checkpointing is not None else {"activation_checkpointing": {}}
        if n_layers is not None and n_layers > 1:
            recomputed.append({**section, f"{key}.every_n_layers": 2})
        recomputed.append(section)
    elif every > 1:
        recomputed.append({f"{key}.every_n_layers": 1})
    stages: list[Overrides] = [{"zero_optimization.stage": stage} for stage in range(engine.zero_stage + 1, 4)]
    offloads: list[Overrides] = []
    optimizer: Overrides = {"zero_optimization.offload_optimizer.device": "cpu"}
    if engine.zero_stage == 0 or engine.offload_optimizer == "none":
        offloads.append(optimizer)
    else:
        optimizer = {}
    if engine.zero_stage < 3 or engine.offload_param == "none":
        offloads.append({**optimizer, "zero_optimization.offload_param.device": "cpu"})
    return [recomputed, stages, offloads if offload else []]
