"""The schema of the DeepSpeed JSON: every key of DeepSpeed 0.19.8 by its dotted name, which names are gone, and when a
key is read at all: the ZeRO stages, switches and other keys without which it does nothing.

deepspeed_keys.py holds the keys as data; what ChatGoT accepts of them stands in rules.py. Source of when a key is read:
where deepspeed/runtime/engine.py hands each value on (_configure_zero_optimizer and its neighbours), and who uses it
there.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from chatgot.deepspeed_json.deepspeed_keys import OPTIMIZER_PARAMS, SCHEDULER_PARAMS, Root
from chatgot.deepspeed_json.key_types import Key, Section
from chatgot.deepspeed_json.settings import ChatGoTSection, dotted_keys

__all__ = ["NODES", "OPTIMIZER_PARAMS", "REMOVED", "ROOT", "SCHEDULER_PARAMS", "Key", "Root", "Section"]

TOTAL = "train_batch_size"
MICRO = "train_micro_batch_size_per_gpu"
ACCUMULATION = "gradient_accumulation_steps"

# Every spelling of each type: deepspeed/runtime/config.py, DtypeEnum.
FP16_NAMES = ("fp16", "float16", "half", "torch.float16")
BF16_NAMES = ("bf16", "bfloat16", "torch.bfloat16")
FP32_NAMES = ("fp32", "float32", "float", "torch.float32")

ROOT = Section(Root.KEYS, "The JSON file.", group=Root)

_GONE = "removed from DeepSpeed; delete it"
REMOVED = {
    "nebula": f"{_GONE} (checkpoints are written with torch.save)",
    "compression_training": f"{_GONE} (there is no replacement)",
    "amp": "removed from DeepSpeed; use fp16, bf16 or torch_autocast instead",
    "quantize_training": f"{_GONE} (there is no replacement)",
    "sparse_gradients": f"{_GONE} (embeddings made with sparse=True need no key)",
    "eigenvalue": f"{_GONE} (there is no replacement)",
    "sparse_attention": f"{_GONE} (there is no replacement)",
    "elasticity": "removed from DeepSpeed; set train_batch_size, train_micro_batch_size_per_gpu or "
    "gradient_accumulation_steps instead, and resume on another number of ranks",
    "graph_harvesting": f"{_GONE} (there is no replacement)",
    "curriculum_learning": "removed from DeepSpeed; its successor is data_efficiency.data_sampling.curriculum_learning",
    "progressive_layer_drop": f"{_GONE} (there is no replacement)",
    "zero_optimization.mics_shard_size": "MiCS was removed from DeepSpeed; use "
    "zero_optimization.zero_hpz_partition_size instead",
    "zero_optimization.mics_hierarchical_params_gather": "MiCS was removed from DeepSpeed; delete it",
    "zero_optimization.zeropp_loco_param": f"{_GONE} (quantized gradients work without it)",
}
"""Keys that DeepSpeed refuses even when they are off: deepspeed/runtime/config.py, _REMOVED_TOP_LEVEL_CONFIG_KEYS and
_REMOVED_ZERO_CONFIG_KEYS.
"""


def _walk(section: Section, prefix: str = "") -> Iterator[tuple[str, Key | Section]]:
    for name, node in section.keys.items():
        yield prefix + name, node
        if isinstance(node, Section):
            yield from _walk(node, f"{prefix}{name}.")


NODES: dict[str, Key | Section] = dict(_walk(ROOT))
"""Every section and key by its dotted name, aliases left out."""

RUN_KEYS = tuple(
    f"{section}.{key}".rstrip(".")
    for section, keys in {
        "model": " architecture d_model n_layers n_head n_kv_head head_dim d_hid max_seq_length dropout "
        "tie_embeddings rope_theta norm_eps init_std zero_init_projections",
        "data": " tokenizer bpe_vocab_size unknown_characters val_fraction test_fraction split_by encoding",
        "train": " max_steps seed log_every eval_every eval_tokens sample_every sample_prompts sample_max_new_tokens "
        "sample_temperature sample_top_k sample_seed sample_stop",
    }.items()
    for key in keys.split(" ")
)
"""Sections and keys of the run YAML, which a higher room reads; a test compares them."""


ARGUMENTS = {"optimizer.params": OPTIMIZER_PARAMS, "scheduler.params": SCHEDULER_PARAMS}
"""Section -> its arguments, by the optimizer or scheduler that takes them."""


@cache
def dotted_names() -> tuple[str, ...]:
    """Every section, key and argument by its dotted name, those of the "chatgot" section included."""
    arguments = (f"{where}.{key}" for where, table in ARGUMENTS.items() for keys in table.values() for key in keys)
    return tuple(dict.fromkeys((*NODES, *arguments, *dotted_keys(ChatGoTSection, "chatgot."))))


@cache
def homes() -> dict[str, list[str]]:
    """The last part of every dotted name that has a home, in lower case -> those names."""
    found: dict[str, list[str]] = {}
    for dotted in (*dotted_names(), *RUN_KEYS):
        found.setdefault(dotted.rpartition(".")[2].lower(), []).append(dotted)
    return found


def spellings(section: Section) -> dict[str, str]:
    """Every spelling that a section accepts -> the documented one."""
    aliases = {node.alias: name for name, node in section.keys.items() if node.alias}
    return {**{name: name for name in section.keys}, **aliases}


def documented(dotted: str) -> str:
    """A dotted name in the documented spelling; what no section knows stays as it is."""
    names: list[str] = []
    for name in dotted.split("."):
        section = NODES.get(".".join(names), ROOT if not names else None)
        names.append(spellings(section).get(name, name) if isinstance(section, Section) else name)
    return ".".join(names)


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
    **dict.fromkeys((name for name in NODES if name.startswith(_ZERO + "stage3_")), (3,)),
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

ON_WHEN_GIVEN = ("activation_checkpointing", "checkpoint.writer", "weight_quantization", "zero_optimization.zenflow")
"""Sections that do nothing while they stand nowhere, whatever the defaults of their keys."""

# fmt: off
NEEDS: dict[str, tuple[str, tuple[Any, ...]]] = {
    **{f"{_ZERO}offload_param.{key}": (f"{_ZERO}offload_param.device", ("nvme",))
       for key in ("nvme_path", "buffer_count", "buffer_size", "max_in_cpu")},
    **{f"{_ZERO}offload_optimizer.{key}": (f"{_ZERO}offload_optimizer.device", ("nvme",))
       for key in ("nvme_path", "buffer_count", "pipeline_read", "pipeline_write", "fast_init")},
    **{name: (f"{_ZERO}offload_optimizer.device or {_ZERO}offload_param.device", ("nvme",))
       for name in NODES if name.startswith("aio.")},
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
    return switch if isinstance(NODES.get(switch), Key) else None


def stages_in_words(stages: tuple[int, ...]) -> str:
    """'stage 3' or 'stages 1, 2'."""
    return f"stage {stages[0]}" if len(stages) == 1 else "stages " + ", ".join(map(str, stages))
