"""The end of a rank that runs out of memory: it stores a smaller micro-batch for the next start and leaves at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Literal, NoReturn

from chatgot.deepspeed_json.resolve import EngineConfig
from chatgot.training.records import Records
from chatgot.tuning import micro_batch


def end_rank(
    error: BaseException,
    doing: str,
    out_dir: Path,
    config: EngineConfig,
    world_size: int,
    asked: int | Literal["auto"],
    records: Records,
) -> NoReturn:
    """Store the smaller micro-batch, say what was running, and end.

    Alone, a rank raises the refusal and ends as after any other. Among others it exits at once: they wait for it in a
    collective, out of which nothing can call them, so that their launcher has to end them.

    Args:
        error: the failed allocation.
        doing: what was running: 'step 7'.
        asked: the micro-batch that the JSON comes to by itself, or "auto".

    Raises:
        RunAgainError: exit 75, the next start uses the smaller micro-batch.
        MachineError: exit 6, the micro-batch is 1 already.
    """
    refusal = micro_batch.shrink(out_dir, config, world_size, asked, doing, error)
    code = refusal.exit_code
    records.event("out_of_memory", doing=doing, micro_batch=config.micro_batch_size, exit_code=code)
    if world_size == 1:
        raise refusal from error
    print(f"chatgot: {refusal}", file=sys.stderr)
    records.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
