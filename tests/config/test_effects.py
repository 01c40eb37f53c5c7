"""What each setting does to a run's numbers, section by section."""

from __future__ import annotations

import pytest

from chatgot.config.overrides import effect
from chatgot.config.run import RunConfig
from chatgot.deepspeed_json import schema
from chatgot.deepspeed_json.deepspeed_keys import Bf16
from chatgot.deepspeed_json.settings import ChatGoTSection, dotted_keys
from chatgot.proof.compare import changes_numbers
from chatgot.run_folder import flattened

EFFECTS = {
    "batches": "data model.max_seq_length train.seed ds.train_batch_size",
    "numbers": """
        model train.max_steps
        ds.allgather_size ds.chatgot ds.compile ds.data_efficiency ds.data_parallel_size ds.datastates_ckpt
        ds.expert_parallel ds.gradient_allreduce_op ds.gradient_clipping ds.hybrid_engine
        ds.managed_gradient_accumulation ds.optimizer ds.pipeline ds.scheduler ds.seq_parallel_communication_data_type
        ds.sequence_parallel_size ds.tensor_parallel ds.use_data_before_expert_parallelism ds.weight_quantization
        """,
    "rounding": """
        ds.activation_checkpointing ds.bf16 ds.bfloat16 ds.chatgot.activation_checkpointing ds.chatgot.compile
        ds.communication_data_type ds.data_types ds.fp16 ds.gradient_accumulation_steps ds.gradient_predivide_factor
        ds.optimizer.params.fused ds.optimizer.params.torch_adam ds.prescale_gradients ds.torch_autocast
        ds.train_micro_batch_size_per_gpu ds.zero_allow_untested_optimizer ds.zero_force_ds_cpu_optimizer
        ds.zero_optimization
        """,
    "nothing": """
        train.eval_every train.eval_tokens train.log_every train.sample_every train.sample_max_new_tokens
        train.sample_prompts train.sample_seed train.sample_stop train.sample_temperature train.sample_top_k
        ds.aio ds.autotuning ds.chatgot.checkpoint ds.chatgot.guard ds.chatgot.wandb ds.checkpoint ds.comet
        ds.comms_logger ds.csv_monitor ds.dataloader_drop_last ds.disable_allgather ds.disable_python_gc ds.dump_state
        ds.flops_profiler ds.log_level ds.memory_breakdown ds.steps_per_print ds.tensorboard ds.timers
        ds.vocabulary_size ds.wandb ds.wall_clock_breakdown
        """,
}
"""Keys and sections; what stands for a section holds for what is in it, unless the key has its own entry."""

EXPECTED = {name: kind for kind, names in EFFECTS.items() for name in names.split()}

OPEN = [
    "ds.optimizer.params.fused",
    "ds.optimizer.params.lr",
    "ds.optimizer.params.torch_adam",
    "ds.scheduler.params.x",
]
"""Keys that no schema lists."""

ALIASES = [
    f"{dotted.rpartition('.')[0]}.{node.alias}".lstrip(".") for dotted, node in schema.NODES.items() if node.alias
]
ALIASES += [f"bfloat16.{key}" for key in Bf16.KEYS]
DS_KEYS = (*schema.NODES, *ALIASES, *dotted_keys(ChatGoTSection, "chatgot."))
KNOWN = [*flattened(RunConfig().to_dict()), *(f"ds.{key}" for key in DS_KEYS), *OPEN]


def entry(key: str) -> str:
    """The longest beginning of a dotted key, in whole parts, that the table has."""
    while key not in EXPECTED:
        assert "." in key, "not in the table"
        key = key.rpartition(".")[0]
    return key


@pytest.mark.parametrize("key", KNOWN)
def test_every_key_has_the_effect_that_the_table_says(key: str) -> None:
    assert effect(key) == EXPECTED[entry(key)]


@pytest.mark.parametrize("key", KNOWN)
def test_a_change_is_judged_by_the_key_at_its_beginning(key: str) -> None:
    assert changes_numbers(f"{key}: 1 -> 2") == (EXPECTED[entry(key)] in ("batches", "numbers"))


def test_the_table_has_no_key_that_does_not_exist() -> None:
    assert {entry(key) for key in KNOWN} == set(EXPECTED)


def test_other_data_are_other_batches() -> None:
    assert effect("data: 0123abcd -> 4567cdef") == "batches"
