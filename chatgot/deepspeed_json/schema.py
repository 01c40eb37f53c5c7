"""The schema of the DeepSpeed JSON: every key of DeepSpeed 0.19.8 by its dotted name, and which names are gone.

deepspeed_keys.py holds the keys as data; what ChatGoT accepts of them stands in rules.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from chatgot.deepspeed_json.chatgot_section import ChatGoTSection
from chatgot.deepspeed_json.deepspeed_keys import OPTIMIZER_PARAMS, SCHEDULER_PARAMS, Root
from chatgot.deepspeed_json.fields import dotted_keys
from chatgot.deepspeed_json.key_types import Key, Section

__all__ = ["NODES", "OPTIMIZER_PARAMS", "REMOVED", "ROOT", "SCHEDULER_PARAMS", "Key", "Root", "Section"]

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
