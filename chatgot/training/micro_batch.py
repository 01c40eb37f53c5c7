"""Smaller micro-batches for the same global batch, when memory has run out; and going on with them after a resume."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from chatgot.data.loader import EvalBatches, TrainBatches
from chatgot.deepspeed_json.batch import ACCUMULATION, MICRO
from chatgot.deepspeed_json.engine_config import EngineConfig
from chatgot.engine import partial_step
from chatgot.engine.build import TrainingEngine
from chatgot.errors import MachineError

if TYPE_CHECKING:
    from chatgot.training.loop import Loop


def largest(per_rank: int, limit: int) -> int:
    """The largest micro-batch, not above `limit`, that divides the samples of a rank."""
    return next(size for size in range(min(limit, per_rank), 0, -1) if per_rank % size == 0)


def with_micro_batch(config: EngineConfig, micro: int, world_size: int) -> EngineConfig:
    """The same settings with another micro-batch and the accumulation that goes with it."""
    accumulation = config.train_batch_size // (micro * world_size)
    deepspeed = {**config.deepspeed, MICRO: micro, ACCUMULATION: accumulation}
    return dataclasses.replace(config, micro_batch_size=micro, accumulation=accumulation, deepspeed=deepspeed)


def shrink(loop: Loop, step: int, where: dict[int, str]) -> None:
    """Halve the micro-batch between two steps, because memory ran out in `step` on the ranks of `where`. On all ranks.

    Raises:
        MachineError: it is 1 already.
    """
    before = loop.engine.config
    places = ", ".join(f"{place} on rank {rank}" for rank, place in where.items())
    if before.micro_batch_size == 1:
        raise MachineError(
            f"step {step}: out of memory in {places}, at micro-batch 1, the smallest; nothing of it was saved, and "
            f"earlier checkpoints are "
            f"untouched. What needs less: {'; '.join(_remedies(before))}. `chatgot plan` shows what each of them costs"
        )
    world_size = loop.ranks.world_size
    now = with_micro_batch(
        before, largest(before.train_batch_size // world_size, before.micro_batch_size // 2), world_size
    )
    partial_step.resize(loop.engine.engine, now.micro_batch_size, now.accumulation)
    loop.engine.config = now
    tokens, order = loop.data.train, loop.train_batches.order
    hashed = loop.train_batches.batch_hash
    loop.train_batches = TrainBatches(
        tokens, order, now.train_batch_size, now.micro_batch_size, loop.ranks.rank, world_size
    )
    loop.train_batches.batch_hash = hashed
    loop.eval_batches = EvalBatches(loop.data.val, order.block_size, now.micro_batch_size, loop.ranks.rank, world_size)
    setup = loop.proof.settings_changed(now)
    loop.records.event(
        "out_of_memory",
        step=step,
        where={str(rank): place for rank, place in where.items()},
        micro_batch=f"{before.micro_batch_size} -> {now.micro_batch_size}",
        accumulation=f"{before.accumulation} -> {now.accumulation}",
        **({"setup": setup.to_json()} if setup is not None else {}),
    )
    loop.records.progress.say(
        f"WARNING: step {step}: out of memory in {places}; micro-batch {before.micro_batch_size} -> "
        f"{now.micro_batch_size}, accumulation "
        f"{before.accumulation} -> {now.accumulation}, global batch {now.train_batch_size} as before"
    )


def after_update(loop: Loop, lost: bool) -> None:
    """Some rank's optimizer ran out of memory in the step that has just been made. Collective.

    Args:
        lost: some rank could not make its update, even at the second try.

    Raises:
        MachineError: on all ranks; `lost`, or the micro-batch is 1 already.
    """
    memory = loop.engine.memory
    found = loop.ranks.gather(memory.retried)
    memory.retried = False
    where = {rank: "the optimizer step" for rank, retried in enumerate(found) if retried}
    if lost:
        raise MachineError(
            f"step {loop.step}: out of memory in the optimizer step on rank {', '.join(map(str, where))}, and other "
            f"ranks have made "
            "theirs: the weights in memory are lost, and were not saved. Resume from the last checkpoint with what "
            "needs less memory: " + "; ".join(_remedies(loop.engine.config))
        )
    shrink(loop, loop.step, where)


def carry_on(engine: TrainingEngine, client_state: dict[str, Any] | None, world_size: int) -> list[str]:
    """After a resume: the micro-batch that memory had been enough for, unless the JSON's own is another one now.
    Returns a note.
    """
    carried = (client_state or {}).get("micro_batch")
    config = engine.config
    if carried is None or carried["json"] == carried["used"]:
        return []
    if carried["json"] != config.micro_batch_size:
        return [
            f"micro-batch {config.micro_batch_size}: the JSON's is another one than the checkpoint's run had "
            f"({carried['json']}, of which "
            f"memory allowed {carried['used']})"
        ]
    micro = largest(config.train_batch_size // world_size, carried["used"])
    engine.config = with_micro_batch(config, micro, world_size)
    partial_step.resize(engine.engine, micro, engine.config.accumulation)
    return [
        f"micro-batch {micro}, accumulation {engine.config.accumulation}: memory ran out with the JSON's "
        f"{config.micro_batch_size} before "
        f"the checkpoint; another {MICRO} in the JSON overrules this"
    ]


def _remedies(config: EngineConfig) -> list[str]:
    """What needs less memory and is not in use yet."""
    found = []
    every = config.chatgot.activation_checkpointing.every_n_layers
    if config.activation_backend is None:
        found.append('an "activation_checkpointing": {} section')
    elif every > 1:
        found.append("chatgot.activation_checkpointing.every_n_layers = 1")
    if config.zero_stage < 3:
        found.append(f"zero_optimization.stage above {config.zero_stage}, on several ranks")
    if config.zero_stage > 0 and config.offload_optimizer == "none":
        found.append('zero_optimization.offload_optimizer = {"device": "cpu"}')
    if config.zero_stage == 3 and config.offload_param == "none":
        found.append('zero_optimization.offload_param = {"device": "cpu"}')
    return [*found, "a smaller model.max_seq_length or model"]
