"""What changing a setting does to a run's numbers. A resume compares itself with the journal accordingly."""

from __future__ import annotations

import re

from chatgot.deepspeed_json import schema
from chatgot.deepspeed_json.key_types import Effect

_OURS: dict[Effect, str] = {
    "batches": "data train.seed model.max_seq_length",
    "rounding": "ds.chatgot.activation_checkpointing ds.chatgot.compile ds.optimizer.params.torch_adam "
    "ds.optimizer.params.fused",
    "nothing": "ds.chatgot.checkpoint ds.chatgot.guard ds.chatgot.wandb train.log_every train.eval_every "
    "train.eval_tokens train.sample_every train.sample_prompts train.sample_max_new_tokens train.sample_temperature "
    "train.sample_top_k train.sample_seed train.sample_stop",
}
"""Settings outside DeepSpeed's own keys, which have theirs in the schema; what stands for a section holds inside it."""
_EFFECTS: dict[str, Effect] = {name: effect for effect, names in _OURS.items() for name in names.split()}


def effect(name: str) -> Effect:
    """Tell what changing a setting, named as overrides name it, does to a run's numbers: "numbers", if nothing else is
    known of it.

    A line of run_folder.changed_settings will do, too: it begins with the name.
    """
    begins = re.match(r"[\w.]+", name)
    dotted = around = begins.group() if begins else name
    while around:
        if around in _EFFECTS:
            return _EFFECTS[around]
        around = around.rpartition(".")[0]
    return schema.effect(dotted.removeprefix("ds.")) if dotted.startswith("ds.") else "numbers"
