"""Before a run: how large its checkpoints will be, and how many of them fit."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path

from chatgot.checkpoint import retention, size
from chatgot.deepspeed_json.chatgot_section import CheckpointConfig
from chatgot.errors import CheckpointError, ConfigError


def preflight(
    folder: Path,
    config: CheckpointConfig,
    expected_bytes: int,
    max_steps: int,
    json: str,
    damaged: Collection[str] = (),
) -> list[str]:
    """One line for the user, and a WARNING where what the rules keep does not fit. Rank 0 only; writes nothing.

    Args:
        folder: the run folder's `checkpoints`; need not exist yet.
        expected_bytes: of one checkpoint.
        json: name of the file that `config` comes from.
        damaged: tags that are known not to be good.

    Raises:
        ConfigError: the budget has no room for two: the newest one, and the next while it is written.
        CheckpointError: not even one fits, or the folder cannot be looked at.
    """
    needed, limit = retention.needed(expected_bytes), retention.budget(config)
    two = 2 * needed  # the margin of the second one holds DeepSpeed's recovery scripts, 40 kB beside the checkpoints
    if limit is not None and limit < two:
        raise ConfigError(
            f"{json}: chatgot.checkpoint.disk_budget_gb = {config.disk_budget_gb:g} ({size.shown(limit)}): must have "
            f"room for two "
            f"checkpoints, the newest one and the next while it is written, which take about {size.shown(two)}; "
            f"give at least {_rounded_up(two / 1e9)}"
        )
    try:
        room = retention.find_room(folder, config, expected_bytes, damaged)
    except OSError as error:
        raise CheckpointError(f"{folder}: no checkpoint could be saved there: {error}") from error

    def fitting(space: int) -> int:
        return 0 if space < needed else 1 + (space - needed) // expected_bytes

    every = max_steps // config.keep_every_steps if config.keep_every_steps else 0
    kept = config.keep_last + config.keep_best + every
    rules = f"{config.keep_last} last" + (f" + {config.keep_best} best" if config.keep_best else "")
    if config.keep_every_steps:
        rules += f" + every {config.keep_every_steps} steps, which is up to {every} over this run"
    line = (
        f"checkpoints: about {size.shown(expected_bytes)} each; {size.shown(room.free)} free in {folder}, "
        f"{fitting(room.free)} fit; "
        f"kept: {rules}: about {size.shown(kept * expected_bytes)}"
    )
    held = sum(checkpoint.bytes for checkpoint in room.holdings.good)
    at_most = kept
    if limit is not None:
        within = fitting(limit - room.holdings.other_bytes)
        at_most = min(kept, within)
        line += f"; disk_budget_gb = {config.disk_budget_gb:g}: {within} fit into it"
        line += ", and it comes first" if at_most < kept else ""
    lines = [line]
    space = room.free + held
    if at_most > fitting(space):  # the one being written is among them: room is made for it before
        lines.append(
            f"WARNING: the checkpoints that are kept need {size.shown(at_most * expected_bytes)}, and there are "
            f"{size.shown(space)} for "
            "them: saves will fail; make room, or lower chatgot.checkpoint.keep_last, keep_best or keep_every_steps, "
            "or set disk_budget_gb"
        )
    return lines


def _rounded_up(value: float) -> str:
    """Two digits, never below the value."""
    digits = 1 - math.floor(math.log10(value))
    return f"{math.ceil(value * 10**digits) / 10**digits:.{max(0, digits)}f}"
