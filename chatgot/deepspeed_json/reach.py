"""When a key of the DeepSpeed JSON is read at all: the ZeRO stages, switches and other keys without which it does
nothing.

Source: where deepspeed/runtime/engine.py hands each value on (_configure_zero_optimizer and its neighbours) and who
    uses it there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from chatgot.deepspeed_json import schema
from chatgot.deepspeed_json.values import Values

_ZERO = "zero_optimization."

STAGES: dict[str, tuple[int, ...]] = {
    **{
        _ZERO + key: (1, 2, 3)
        for key in (
            *("contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "overlap_comm", "load_from_fp32_weights"),
            "offload_optimizer",
        )
    },
    **{
        _ZERO + key: (1, 2)
        for key in (
            *("use_multi_rank_bucket_allreduce", "allgather_bucket_size", "compute_grad_norm", "elastic_checkpoint"),
            *("ignore_unused_parameters", "round_robin_gradients", "parameter_alignment"),
        )
    },
    **{_ZERO + key: (3,) for key in schema.ZERO_OPTIMIZATION.keys if key.startswith("stage3_")},
    **{
        _ZERO + key: (3,)
        for key in (
            *("offload_param", "sub_group_size", "zero_hpz_partition_size", "zero_quantized_weights"),
            *("zero_quantized_nontrainable_weights", "zero_quantized_gradients", "memory_efficient_linear"),
            *(
                "pipeline_loading_checkpoint",
                "override_module_apply",
                "log_trace_cache_warnings",
                "enable_sanity_checks",
            ),
            *("save_muon_momentum_buffer_in_memory", "leaf_module"),
        )
    },
}
"""The ZeRO stages that read a key; keys that are not listed are read at every stage."""

_SPECIAL_SWITCHES = {
    "compile": "compile.deepcompile",
    "zero_optimization.offload_param": "zero_optimization.offload_param.device",
    "zero_optimization.offload_optimizer": "zero_optimization.offload_optimizer.device",
    "tensor_parallel": "tensor_parallel.autotp_size",
}

_ON_WHEN_GIVEN = ("activation_checkpointing", "checkpoint.writer", "weight_quantization", "zero_optimization.zenflow")
"""Sections that do nothing while they stand nowhere, whatever the defaults of their keys."""

_NVME = ("nvme_path", "buffer_count")
NEEDS: dict[str, tuple[str, tuple[Any, ...]]] = {
    **{
        f"{_ZERO}offload_param.{key}": (f"{_ZERO}offload_param.device", ("nvme",))
        for key in (*_NVME, "buffer_size", "max_in_cpu")
    },
    **{
        f"{_ZERO}offload_optimizer.{key}": (f"{_ZERO}offload_optimizer.device", ("nvme",))
        for key in (*_NVME, "pipeline_read", "pipeline_write", "fast_init")
    },
    f"{_ZERO}offload_optimizer.cpuadam_cores_perc": (f"{_ZERO}offload_optimizer.super_offload", (True,)),
    **{
        f"fp16.{key}": ("fp16.loss_scale", (0.0,))
        for key in (
            "initial_scale_power",
            "loss_scale_window",
            "hysteresis",
            "consecutive_hysteresis",
            "min_loss_scale",
        )
    },
    "bf16.immediate_grad_update": ("zero_optimization.stage", (1,)),
    "bf16.bf16_optimizer_states": ("bf16.bf16_master_weights_and_grads", (True,)),
    "activation_checkpointing.number_checkpoints": ("activation_checkpointing.contiguous_memory_optimization", (True,)),
    "zero_force_ds_cpu_optimizer": (f"{_ZERO}offload_optimizer.device", ("cpu", "nvme")),
    "comms_logger.prof_ops": ("comms_logger.prof_all", (False,)),
    "compile.free_activation_threshold": ("compile.free_activation", (True,)),
    "compile.offload_activation_pin_memory": ("compile.offload_activation", (True,)),
    **{
        f"aio.{key}": (f"{_ZERO}offload_optimizer.device or {_ZERO}offload_param.device", ("nvme",))
        for key in schema.AIO.keys
    },
}
"""Key -> another key and the values of it without which the first one does nothing."""

NEVER = {
    "allgather_size": "only the old form zero_optimization: true reads it",
    "dataloader_drop_last": "it is for DeepSpeed's own data loader, and ChatGoT's only ever gives whole batches",
    "disable_allgather": "DeepSpeed reads it and uses it nowhere",
    "optimizer.legacy_fusion": "it is for fp16 at ZeRO stage 0, which ChatGoT refuses",
    "seq_parallel_communication_data_type": "it is for sequence parallelism, which ChatGoT does not have",
    "vocabulary_size": "DeepSpeed only warns when it is no multiple of 8",
    "zero_optimization.allgather_partitions": "DeepSpeed reads it and uses it nowhere",
}
"""Keys that never change a run of ChatGoT, and why."""

NEVER_SECTIONS = {
    "pipeline": "it is for pipeline modules, and ChatGoT's model is none",
}


def section_switch(section: str) -> str | None:
    """The key that turns a section on; None for a section without a switch."""
    node = schema.NODES.get(section)
    if section in _SPECIAL_SWITCHES:
        return _SPECIAL_SWITCHES[section]
    return (
        f"{section}.enabled"
        if isinstance(node, schema.Section) and isinstance(node.keys.get("enabled"), schema.Key)
        else None
    )


def is_off(values: Values, section: str) -> bool:
    """Whether a section does nothing because its switch is off, or because it stands nowhere and has no switch."""
    if section in NEVER_SECTIONS or (section in _ON_WHEN_GIVEN and section not in values):
        return True
    switch = section_switch(section)
    return switch is not None and values[switch] in (None, False, 0, "none")


def idle(values: Values, dotted: str) -> str:
    """Why a key that is given does nothing here, or an empty text. Switches are the business of its section."""
    if dotted in NEVER:
        return NEVER[dotted]
    stage = values["zero_optimization.stage"]
    if dotted in STAGES and stage not in STAGES[dotted]:
        return f"read at ZeRO {stages_in_words(STAGES[dotted])} only, and the stage is {stage}"
    if dotted in NEEDS:
        other, wanted = NEEDS[dotted]
        seen = [values[name] for name in other.split(" or ")]
        if not any(value in wanted for value in seen):
            return f"read only when {other} is {_words(wanted)}"
    return ""


def stages_in_words(stages: Iterable[int]) -> str:
    """'stage 3' or 'stages 1, 2'."""
    numbers = list(stages)
    return f"stage {numbers[0]}" if len(numbers) == 1 else "stages " + ", ".join(map(str, numbers))


def _words(values: Iterable[Any]) -> str:
    return " or ".join(
        {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value) for value in values
    )
