"""When DeepSpeed reads a key at all: the ZeRO stages, switches and other keys without which it does nothing.

Source: where deepspeed/runtime/engine.py hands each value on (_configure_zero_optimizer and its neighbours), and who
uses it there.
"""

from __future__ import annotations

from typing import Any

from chatgot.deepspeed_json import schema
from chatgot.deepspeed_json.findings import Findings, Level
from chatgot.deepspeed_json.values import Values

_ZERO = "zero_optimization."

# fmt: off
STAGES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys((_ZERO + key for key in (
        "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "overlap_comm", "offload_optimizer",
    )), (1, 2, 3)),
    **dict.fromkeys((_ZERO + key for key in (
        "use_multi_rank_bucket_allreduce", "allgather_bucket_size", "compute_grad_norm", "elastic_checkpoint",
        "load_from_fp32_weights",
        "ignore_unused_parameters", "round_robin_gradients", "parameter_alignment",
    )), (1, 2)),
    **dict.fromkeys((name for name in schema.NODES if name.startswith(_ZERO + "stage3_")), (3,)),
    **dict.fromkeys((_ZERO + key for key in (
        "offload_param", "sub_group_size", "zero_hpz_partition_size", "zero_quantized_weights",
        "zero_quantized_nontrainable_weights", "zero_quantized_gradients", "memory_efficient_linear",
        "pipeline_loading_checkpoint", "override_module_apply", "log_trace_cache_warnings", "enable_sanity_checks",
        "save_muon_momentum_buffer_in_memory", "leaf_module",
    )), (3,)),
}
# fmt: on
"""The ZeRO stages that read a key; keys that are not listed are read at every stage."""

_SPECIAL_SWITCHES = {
    "compile": "compile.deepcompile",
    "zero_optimization.offload_param": "zero_optimization.offload_param.device",
    "zero_optimization.offload_optimizer": "zero_optimization.offload_optimizer.device",
    "tensor_parallel": "tensor_parallel.autotp_size",
}

_ON_WHEN_GIVEN = ("activation_checkpointing", "checkpoint.writer", "weight_quantization", "zero_optimization.zenflow")
"""Sections that do nothing while they stand nowhere, whatever the defaults of their keys."""

# fmt: off
NEEDS: dict[str, tuple[str, tuple[Any, ...]]] = {
    **{f"{_ZERO}offload_param.{key}": (f"{_ZERO}offload_param.device", ("nvme",))
       for key in ("nvme_path", "buffer_count", "buffer_size", "max_in_cpu")},
    **{f"{_ZERO}offload_optimizer.{key}": (f"{_ZERO}offload_optimizer.device", ("nvme",))
       for key in ("nvme_path", "buffer_count", "pipeline_read", "pipeline_write", "fast_init")},
    **{name: (f"{_ZERO}offload_optimizer.device or {_ZERO}offload_param.device", ("nvme",))
       for name in schema.NODES if name.startswith("aio.")},
    **{f"fp16.{key}": ("fp16.loss_scale", (0.0,)) for key in (
        "initial_scale_power", "loss_scale_window", "hysteresis", "consecutive_hysteresis", "min_loss_scale")},
    f"{_ZERO}offload_optimizer.cpuadam_cores_perc": (f"{_ZERO}offload_optimizer.super_offload", (True,)),
    "bf16.immediate_grad_update": ("zero_optimization.stage", (1,)),
    "bf16.bf16_optimizer_states": ("bf16.bf16_master_weights_and_grads", (True,)),
    "activation_checkpointing.number_checkpoints": ("activation_checkpointing.contiguous_memory_optimization", (True,)),
    "zero_force_ds_cpu_optimizer": (f"{_ZERO}offload_optimizer.device", ("cpu", "nvme")),
    "comms_logger.prof_ops": ("comms_logger.prof_all", (False,)),
    "compile.free_activation_threshold": ("compile.free_activation", (True,)),
    "compile.offload_activation_pin_memory": ("compile.offload_activation", (True,)),
}
# fmt: on
"""Key -> another key and the values of it without which the first one does nothing."""

NEVER = {
    "allgather_size": "only the old form zero_optimization: true reads it",
    "dataloader_drop_last": "it is for DeepSpeed's own data loader, and ChatGoT's only ever gives whole batches",
    "disable_allgather": "DeepSpeed reads it and uses it nowhere",
    "optimizer.legacy_fusion": "it is for fp16 at ZeRO stage 0, which ChatGoT runs at stage 1",
    "seq_parallel_communication_data_type": "it is for sequence parallelism, which ChatGoT does not have",
    "vocabulary_size": "DeepSpeed only warns when it is no multiple of 8",
    "zero_optimization.cpu_offload_use_pin_memory": "DeepSpeed ignores it; write pin_memory inside offload_param or "
    "offload_optimizer",
    "zero_optimization.allgather_partitions": "DeepSpeed reads it and uses it nowhere",
}
"""Keys that never change a run of ChatGoT, and why."""

NEVER_SECTIONS = {"pipeline": "it is for pipeline modules, and ChatGoT's model is none"}


def section_switch(section: str) -> str | None:
    """The key that turns a section on; None for a section without a switch."""
    if section in _SPECIAL_SWITCHES:
        return _SPECIAL_SWITCHES[section]
    switch = f"{section}.enabled"
    return switch if isinstance(schema.NODES.get(switch), schema.Key) else None


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
    stage = values.zero_optimization.stage
    if dotted in STAGES and stage not in STAGES[dotted]:
        return f"read at ZeRO {stages_in_words(STAGES[dotted])} only, and the stage is {stage}"
    if dotted in NEEDS:
        other, wanted = NEEDS[dotted]
        if not any(values[name] in wanted for name in other.split(" or ")):
            return f"read only when {other} is {' or '.join(map(shown_value, wanted))}"
    return ""


def stages_in_words(stages: tuple[int, ...]) -> str:
    """'stage 3' or 'stages 1, 2'."""
    return f"stage {stages[0]}" if len(stages) == 1 else "stages " + ", ".join(map(str, stages))


def shown_value(value: Any) -> str:
    """A value as prose has it: true, nvme, 0.0."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def note_idle(values: Values, findings: Findings) -> None:
    """Note sections that are off, keys that nothing reads, and deprecated ones. A stated default harms nobody."""
    off: dict[str, list[str]] = {}
    for dotted in values.given:
        node, value = schema.NODES[dotted], values[dotted]
        section, name = dotted.rpartition(".")[0], values.name(dotted)
        if isinstance(node, schema.Section):
            switch = section_switch(dotted)
            if dotted in NEVER_SECTIONS:
                findings.add("note", name, "{...}", f"does nothing: {NEVER_SECTIONS[dotted]}")
            elif switch and switch not in values and switch not in values.spelled and values[switch] in (None, False):
                why = f"stands here but is off: {switch.rpartition('.')[2]} is not given"
                findings.add("note", name, value, why)
            continue
        if node.instead and value and dotted not in NEVER:
            findings.add("note", name, value, f"is deprecated: write {node.instead}")
        if value in (node.default, "auto"):
            continue
        if section and is_off(values, section) and dotted != section_switch(section):
            off.setdefault(section, []).append(dotted)
        elif reason := idle(values, dotted):
            level: Level = "warning" if dotted in STAGES or dotted in NEVER else "note"
            findings.add(level, name, value, f"does nothing: {reason}")
    for section, keys in off.items():
        switch = section_switch(section) or section
        names = ", ".join(key.rpartition(".")[2] for key in keys)
        why = f"does nothing ({names}): the section is off, {values.name(switch)} = {str(values[switch]).lower()}"
        findings.add("note", values.name(keys[0]), values[keys[0]], why)
    zero = "zero_optimization"
    if zero in values and f"{zero}.stage" in values and f"{zero}.stage" not in values.spelled:
        findings.add("note", zero, bool(values[f"{zero}.stage"]), 'is deprecated: write {"stage": 1} or {"stage": 0}')
