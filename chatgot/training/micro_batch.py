"""Going on with a smaller micro-batch for the same global batch after a resume, where memory had run out before."""

from __future__ import annotations

from typing import Any

from chatgot.deepspeed_json.batch import MICRO
from chatgot.engine.step import TrainingEngine


def largest(per_rank: int, limit: int) -> int:
    """The largest micro-batch, not above `limit`, that divides the samples of a rank."""
    return next(size for size in range(min(limit, per_rank), 0, -1) if per_rank % size == 0)


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
    engine.set_micro_batch(micro)
    return [
        f"micro-batch {micro}, accumulation {engine.config.accumulation}: memory ran out with the JSON's "
        f"{config.micro_batch_size} before "
        f"the checkpoint; another {MICRO} in the JSON overrules this"
    ]
