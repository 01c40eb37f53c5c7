"""How large the next checkpoint will be, and whether there is room for it: before a run, and before each save."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatgot.checkpoint import manifest, retention
from chatgot.checkpoint.retention import Holdings, Pruned, Published, budget, examine
from chatgot.deepspeed_json.chatgot_section import CheckpointConfig
from chatgot.deepspeed_json.optimizers import optimizer_states
from chatgot.distributed import ControlGroup
from chatgot.engine.zero_view import owned_pieces
from chatgot.errors import CheckpointError, ConfigError

MARGIN_SHARE, MARGIN_BYTES = 0.03, 64 * 1024
"""What a checkpoint is expected to take at most beyond its expected size: how far the estimate may be off, and what is
no file of its own (folder entries, unfilled blocks)."""
FILES_OF_ANY = 64
"""Free inodes that are asked for where no checkpoint shows how many files one has."""


_FP32 = 4
_PER_FILE = 8_000
"""Bytes of pickled structure in a file, measured: 6 to 8 thousand."""
_PER_TENSOR = 300
"""Bytes of a tensor's zip record beside its data, measured."""
_PER_RNG = 15_000
"""Bytes of one rank's random number generators in the client state, measured."""


def estimate(engine: Any, ranks: ControlGroup) -> int:
    """Bytes that a checkpoint of this engine will take, manifest left out. Collective.

    Measured, in bytes per parameter with Adam: stage 0 4 + 8; stages 1 and 2 4 + 12 in fp32 and 2 + 12 in bf16 and
    fp16; stage 3 12. That is: the module as it is (stages 0 to 2, once, tied weights once; at stage 3 its parameters
    are placeholders), the optimizer's fp32 weights (with ZeRO, also where the module is fp32 itself) and its moments
    in fp32; together over all ranks, however many. At stages 1 and 2 each rank keeps Muon's moment whole for a matrix
    on its border.
    """
    zero, stage_3 = engine.zero_optimization(), engine.zero_optimization_stage() == 3
    own = 0
    for piece in owned_pieces(engine):
        numel = sum(fragment.numel for fragment in piece.fragments)  # without padding
        states = optimizer_states(type(engine.basic_optimizer).__name__, piece.group)
        if piece.group.get("use_muon"):
            moments = sum(fragment.numel for fragment in piece.momentum)
        else:
            moments = states.elements((numel,) if zero else tuple(piece.tensor.shape))
        own += _FP32 * (numel * zero + moments) + _PER_TENSOR * (zero + states.tensors + states.scalars)
    optimizer = sum(_PER_FILE + part for part in ranks.gather(own)) if zero else own
    saved = engine.module.state_dict().keys()
    parameters = list(engine.module.parameters())
    tensors = [buffer for name, buffer in engine.module.named_buffers() if name in saved]
    module = _PER_FILE + _PER_TENSOR * (len(tensors) + len(parameters)) + _PER_RNG * ranks.world_size
    if not stage_3:
        tensors += parameters
    module += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return optimizer + module * (ranks.world_size if stage_3 else 1)


def needed(expected_bytes: int) -> int:
    """Bytes that must be free for a checkpoint, margin included."""
    return math.ceil(expected_bytes * (1 + MARGIN_SHARE)) + MARGIN_BYTES


@dataclass(frozen=True)
class Room:
    """What must be deleted so that another checkpoint fits."""

    holdings: Holdings
    deletions: tuple[tuple[Published, str], ...]
    free: int
    """Bytes free now on the file system, leftovers of a save that was cut short included."""


def find_room(folder: Path, config: CheckpointConfig, expected_bytes: int, damaged: Collection[str] = ()) -> Room:
    """Whether a checkpoint of the expected size fits now, or after deleting what the rules would no longer keep beside
    it. Writes nothing.

    Raises:
        CheckpointError: it does not fit, with the numbers.
        OSError: the folder cannot be looked at.
    """
    coming, limit = needed(expected_bytes), budget(config)
    holdings = examine(folder, damaged)
    free, inodes = _free(folder)
    free += holdings.leftover_bytes
    # Three more than the last one's: the folder, `latest`, the manifest's temporary file.
    files = holdings.good[-1].files + 3 if holdings.good else FILES_OF_ANY
    total = sum(checkpoint.bytes for checkpoint in holdings.good) + holdings.other_bytes + coming
    gone = retention.plan(holdings.good, config, holdings.other_bytes, coming).gone
    lack = ""
    for count in range(len(gone) + 1):
        freed = sum(checkpoint.bytes for checkpoint, _ in gone[:count])
        if free + freed < coming:
            lack = (
                f"{shown(free + freed)} are free on this file system{', what may be deleted included' if gone else ''}; "
                "make room there, keep fewer checkpoints (chatgot.checkpoint.keep_last, keep_best, keep_every_steps), "
                "or give an --out_dir elsewhere"
            )
        elif limit is not None and total - freed > limit:
            lack = (
                f"beside the {shown(total - freed - coming)} that may not be deleted (the newest good checkpoint, "
                f"damaged ones, other files) that is more than chatgot.checkpoint.disk_budget_gb = "
                f"{config.disk_budget_gb:g} allows; give a larger budget, or delete what is damaged"
            )
        elif inodes is not None and inodes + sum(checkpoint.files for checkpoint, _ in gone[:count]) < files:
            lack = f"{files} new files, and this file system has inodes for {inodes} only; delete files there"
        else:
            return Room(holdings, gone[:count], free)
    one = f"it needs about {shown(coming)} ({shown(expected_bytes)} and a margin of 3 % and 64 KiB)"
    raise CheckpointError(
        f"{folder}: the checkpoint could not be saved: {one}, and {lack}; earlier checkpoints are untouched"
    )


def expected_bytes(folder: Path, fields: Mapping[str, Any], estimated: int, damaged: Collection[str] = ()) -> int:
    """Bytes of the next checkpoint: as many as the newest good one of the same layout has, or else the estimate.

    Args:
        fields: the manifest's for this run.

    Raises:
        CheckpointError: the folder cannot be looked at.
    """
    try:
        good = examine(folder, damaged).good
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be looked at: {error}") from error
    for checkpoint in reversed(good):
        saved = manifest.read(folder / checkpoint.tag)
        if all(saved.get(name) == fields.get(name) for name in manifest.SAME_SIZE):
            return checkpoint.bytes
    return estimated


def make_room(folder: Path, config: CheckpointConfig, expected_bytes: int, damaged: Collection[str] = ()) -> Pruned:
    """Make sure, before anything of a save is written, that it fits into file system and budget. Rank 0 only.

    Deletes what the rules would no longer keep beside it, but only where it would not fit otherwise, and no more than
    that takes. While nobody else saves here.

    Raises:
        CheckpointError: it does not fit even then, with the numbers, and nothing was deleted; or what was to go could
            not be deleted, or gave less room than its size; or the folder cannot be looked at.
    """
    deleted: list[str] = []
    refusal = f"{folder}: the checkpoint could not be saved: "
    try:
        first = room = find_room(folder, config, expected_bytes, damaged)
        while room.deletions:
            tags, failures = retention.delete(folder, room.deletions)
            deleted += tags
            if failures:
                raise CheckpointError(f"{refusal}there is no room for it, and {'; '.join(failures)}")
            room = find_room(folder, config, expected_bytes, damaged)  # deleting may give less than the files' sizes
    except OSError as error:
        raise CheckpointError(
            f"{refusal}{error}, when looking for room for it; earlier checkpoints are untouched"
        ) from error
    return Pruned(
        tuple(deleted),
        tuple(retention.warnings_of(folder, first.holdings)),
        tuple(tag for tag, _ in first.holdings.damaged),
    )


def preflight(
    folder: Path,
    config: CheckpointConfig,
    expected_bytes: int,
    max_steps: int,
    json: str,
    damaged: Collection[str] = (),
) -> list[str]:
    """Compare what the rules keep with the room that there is; one line for the user, and a WARNING where it does not
    fit. Rank 0 only; writes nothing.

    Args:
        folder: the run folder's `checkpoints`; need not exist yet.
        expected_bytes: of one checkpoint.
        json: name of the file that `config` comes from.
        damaged: tags that are known not to be good.

    Raises:
        ConfigError: the budget has no room for two: the newest one, and the next while it is written.
        CheckpointError: not even one fits, or the folder cannot be looked at.
    """
    one, limit = needed(expected_bytes), budget(config)
    two = 2 * one  # the margin of the second one holds DeepSpeed's recovery scripts, 40 kB beside the checkpoints
    if limit is not None and limit < two:
        raise ConfigError(
            f"{json}: chatgot.checkpoint.disk_budget_gb = {config.disk_budget_gb:g} ({shown(limit)}): must have room "
            f"for two checkpoints, the newest one and the next while it is written, which take about {shown(two)}; "
            f"give at least {_rounded_up(two / 1e9)}"
        )
    try:
        room = find_room(folder, config, expected_bytes, damaged)
    except OSError as error:
        raise CheckpointError(f"{folder}: no checkpoint could be saved there: {error}") from error

    def fitting(space: int) -> int:
        return 0 if space < one else 1 + (space - one) // expected_bytes

    every = max_steps // config.keep_every_steps if config.keep_every_steps else 0
    kept = config.keep_last + config.keep_best + every
    rules = f"{config.keep_last} last" + (f" + {config.keep_best} best" if config.keep_best else "")
    if config.keep_every_steps:
        rules += f" + every {config.keep_every_steps} steps, which is up to {every} over this run"
    line = (
        f"checkpoints: about {shown(expected_bytes)} each; {shown(room.free)} free in {folder}, {fitting(room.free)} "
        f"fit; kept: {rules}: about {shown(kept * expected_bytes)}"
    )
    at_most = kept
    if limit is not None:
        within = fitting(limit - room.holdings.other_bytes)
        at_most = min(kept, within)
        line += f"; disk_budget_gb = {config.disk_budget_gb:g}: {within} fit into it"
        line += ", and it comes first" if at_most < kept else ""
    lines = [line]
    space = room.free + sum(checkpoint.bytes for checkpoint in room.holdings.good)
    if at_most > fitting(space):  # the one being written is among them: room is made for it before
        lines.append(
            f"WARNING: the checkpoints that are kept need {shown(at_most * expected_bytes)}, and there are "
            f"{shown(space)} for them: saves will fail; make room, or lower chatgot.checkpoint.keep_last, keep_best or "
            f"keep_every_steps, or set disk_budget_gb"
        )
    return lines


def _rounded_up(value: float) -> str:
    """Two digits, never below the value."""
    digits = 1 - math.floor(math.log10(value))
    return f"{math.ceil(value * 10**digits) / 10**digits:.{max(0, digits)}f}"


def _free(folder: Path) -> tuple[int, int | None]:
    """Bytes and inodes that this user may still take on the file system of a folder, which need not exist yet; None:
    inodes are not counted there.
    """
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    system = os.statvfs(place)
    return system.f_bavail * system.f_frsize, system.f_favail if system.f_files else None


def shown(size: float) -> str:
    """Write a size as '168 MB' or '76.1 GB': three digits, units of 1000 as disks are sold and as disk_budget_gb counts."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= 0.9995 * factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} bytes"
