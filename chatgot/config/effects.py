"""What changing a setting does to a run's numbers. A resume compares itself with the journal accordingly."""

from __future__ import annotations

from typing import Literal

Effect = Literal["batches", "numbers", "rounding", "nothing"]
"""batches: other samples, and so other numbers. numbers: the same samples, other numbers. rounding: the same
mathematics, other roundings. nothing: every bit stays.
"""

_BEGINNINGS: dict[Effect, tuple[str, ...]] = {
    "batches": ("data", "train.seed", "model.max_seq_length", "ds.train_batch_size"),
    "rounding": (
        "ds.train_micro_batch_size_per_gpu",
        "ds.gradient_accumulation_steps",
        "ds.zero_",
        "ds.bf16",
        "ds.fp16",
        "ds.torch_autocast",
        "ds.data_types",
        "ds.communication_data_type",
        "ds.prescale_gradients",
        "ds.gradient_predivide_factor",
        "ds.activation_checkpointing",
        "ds.chatgot.activation_checkpointing",
        "ds.chatgot.compile",
        "ds.optimizer.params.torch_adam",
        "ds.optimizer.params.fused",
    ),
    "nothing": (
        "train.log_every",
        "train.eval_every",
        "train.sample_",
        "ds.chatgot.checkpoint",
        "ds.chatgot.guard",
        "ds.wandb",
        "ds.tensorboard",
        "ds.csv_monitor",
        "ds.comet",
        "ds.steps_per_print",
        "ds.wall_clock_breakdown",
        "ds.memory_breakdown",
        "ds.dump_state",
        "ds.timers",
        "ds.flops_profiler",
        "ds.comms_logger",
        "ds.checkpoint",
        "ds.aio",
    ),
}


def effect(name: str) -> Effect:
    """Tell what changing a setting, named as overrides name it, does to a run's numbers: "numbers", if nothing else is
    known of it.

    A line of run_folder.changed_settings will do, too: it begins with the name.
    """
    for kind, beginnings in _BEGINNINGS.items():
        if name.startswith(beginnings):
            return kind
    return "numbers"
