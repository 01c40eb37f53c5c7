"""A run's memory: what the plan said beside what the second step held, and the end of a rank that has too little."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from chatgot.checkpoint.manifest import ClientState
from chatgot.deepspeed_json.resolve import EngineConfig
from chatgot.deepspeed_json.schema import MICRO
from chatgot.devices import GIB, is_out_of_memory
from chatgot.distributed import ControlGroup
from chatgot.engine.step import TrainingEngine
from chatgot.engine.zero_view import live_model_states
from chatgot.errors import ChatGoTError
from chatgot.observe.meters import peak_memory_gib
from chatgot.plan.estimate import Estimate
from chatgot.plan.memory import STATES
from chatgot.training.records import Records
from chatgot.tuning import micro_batch

logger = logging.getLogger(__name__)

_OVERRULED = f"another {MICRO} in the JSON overrules this"

AT_STEP = 2
"""Of this process: at the first step the optimizer has no moments yet."""


@dataclass
class MemoryCheck:
    """Compares what a DeepSpeed engine holds at its second step with the plan of its run."""

    plan: Estimate
    engine: Any
    live: dict[str, int] | None = None
    """Bytes by part, once seen and until compared."""
    _steps: int = 0

    def look(self) -> None:
        """Count the live model states, if this is the second call. To be called before every optimizer step."""
        self._steps += 1
        if self._steps == AT_STEP:
            self.live = live_model_states(self.engine)

    def compare(self, ranks: ControlGroup) -> dict[str, Any] | None:
        """After the second step: log a line, and return the fields of the event `memory`, in bytes. Collective.

        None at every other step. Model states are counted by their live tensors, before the optimizer step, the most
        over ranks. The peak is what PyTorch's CUDA allocator had in use; on a CPU it is the process's resident set, and
        the plan's figure beside it includes the interpreter.
        """
        if self.live is None:
            return None
        on_cuda = self.plan.device.on_cuda
        peak = round(peak_memory_gib("cuda" if on_cuda else "cpu") * GIB)
        everyone = ranks.gather({**{part: self.live[part] for part in STATES}, "peak": peak})
        self.live = None
        measured = {part: max(rank[part] for rank in everyone) for part in everyone[0]}
        states = {part: self.plan.states.total(part) for part in STATES}
        predicted = {**states, "peak": self.plan.peak if on_cuda else self.plan.host}
        ours, theirs = (sum(sizes[part] for part in STATES) / 2**20 for sizes in (predicted, measured))
        what = "peak in use" if on_cuda else "resident set"
        logger.info(
            f"memory, predicted / measured: model states {ours:.1f} / {theirs:.1f} MiB; "
            f"{what} {predicted['peak'] / GIB:.2f} / {measured['peak'] / GIB:.2f} GiB"
        )
        return {
            "predicted": {**predicted, "parts_at_peak": {part: size for part, size in self.plan.parts.items() if size}},
            "measured": measured,
            "peak_is": "torch.cuda.max_memory_allocated" if on_cuda else "resident set of the process",
        }


def with_stored_micro_batch(config: EngineConfig, out_dir: Path, ranks: ControlGroup) -> tuple[EngineConfig, list[str]]:
    """Take the smaller micro-batch that an earlier start stored, when memory ran out; notes say so. Collective."""
    per_rank = config.train_batch_size // ranks.world_size
    stored = ranks.on_rank_0(lambda: micro_batch.stored(out_dir, config.micro_batch_size, per_rank))
    if stored is None or stored[0] >= config.micro_batch_size:
        return config, []
    smaller, reason = stored
    note = f"micro-batch {smaller}, accumulation {per_rank // smaller}: {reason}; {_OVERRULED}"
    return config.with_micro_batch(smaller, ranks.world_size), [note]


def use_micro_batch_of(state: ClientState, engine: TrainingEngine, json_micro_batch: int, world_size: int) -> list[str]:
    """Use the micro-batch that memory was enough for, unless the JSON's own is another one now. A note, or none."""
    config, carried = engine.config, state.get("micro_batch")  # older checkpoints have none
    if carried is None or carried["json"] == carried["used"]:
        return []
    if carried["json"] != json_micro_batch:
        theirs = f"{carried['json']}, of which memory allowed {carried['used']}"
        what = f"the JSON's is another one than the checkpoint's run had ({theirs})"
        return [f"micro-batch {config.micro_batch_size}: {what}"]
    micro = micro_batch.largest_divisor(config.train_batch_size // world_size, carried["used"])
    if micro >= config.micro_batch_size:
        return []
    engine.set_micro_batch(micro)
    why = f"memory ran out with the JSON's {json_micro_batch} before the checkpoint"
    return [f"micro-batch {micro}, accumulation {engine.config.accumulation}: {why}; {_OVERRULED}"]


def ran_out(
    error: BaseException,
    doing: str,
    out_dir: Path,
    config: EngineConfig,
    world_size: int,
    asked: int | Literal["auto"],
    records: Records | None,
    micro_batch_helps: bool = True,
) -> ChatGoTError:
    """Store a smaller micro-batch for the next start, and say what was running.

    Alone, a rank gets the refusal to raise, and ends as after any other. Among others it exits here and at once: they
    wait for it in a collective, out of which nothing can call them, so that their launcher has to end them.

    Args:
        error: the failed allocation.
        doing: what was running: 'step 7'.
        asked: the micro-batch that the JSON comes to by itself, or "auto".
        micro_batch_helps: whether a smaller one needs less memory there.

    Returns:
        RunAgainError, exit 75: the next start uses the smaller micro-batch. MachineError, exit 6: it is 1 already, or
        does not help.
    """
    refusal = micro_batch.shrink(out_dir, config, world_size, asked, doing, error, micro_batch_helps)
    code = refusal.exit_code
    if records is not None:
        records.event("out_of_memory", doing=doing, micro_batch=config.micro_batch_size, exit_code=code)
    if world_size == 1:
        return refusal
    print(f"chatgot: {refusal}", file=sys.stderr)
    if records is not None:
        records.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def needed_for(
    doing: str,
    out_dir: Path,
    config: EngineConfig,
    world_size: int,
    asked: int | Literal["auto"],
    micro_batch_helps: bool = True,
) -> Iterator[None]:
    """Before there is a loop: turn memory that runs out within into what `ran_out` makes of it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        refusal = ran_out(error, doing, out_dir, config, world_size, asked, None, micro_batch_helps)
        raise refusal from error
