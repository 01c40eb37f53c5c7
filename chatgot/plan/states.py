"""Model states of one rank in bytes: parameters, gradients, fp32 master weights and moments, as DeepSpeed 0.19.8 lays
them out.

Every formula is held against live tensors (tests/plan/test_states.py). The moment is the one before the optimizer step
of any step but the first: the gradients of all micro batches are reduced, and the moments exist.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from chatgot.plan.settings import FP32, Group, Settings

STATES = ("parameters", "gradients", "master_weights", "optimizer_states")
ALIGNMENT = 2
"""Flat buffers are padded to a multiple of this times the ranks (nccl_start_alignment_factor)."""
MUON_GATHER_BYTES = 256 * 2**20
_PER_FILE, _PER_TENSOR, _PER_RNG = 8_000, 300, 15_000
"""Bytes in a checkpoint, measured: a file's pickled structure (6 to 8 thousand), a tensor's zip record beside its data,
one rank's random state in the client state."""


@dataclass
class Memory:
    """Bytes by part, on the device and in host memory."""

    device: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)

    def add(self, part: str, size: int, host: bool = False) -> None:
        """Add bytes to a part."""
        place = self.host if host else self.device
        place[part] = place.get(part, 0) + size

    def total(self, part: str) -> int:
        """A part's bytes in both places."""
        return self.device.get(part, 0) + self.host.get(part, 0)


def model_states(settings: Settings, rank: int = 0) -> Memory:
    """Bytes of STATES, and of buffers: whatever else the engine keeps meanwhile."""
    memory = Memory()
    if settings.stage == 0:
        _plain(settings, memory)
    elif settings.bf16_optimizer:
        _bf16_optimizer(settings, memory)
    elif settings.stage < 3:
        _zero_1_2(settings, memory, rank)
    else:
        _zero_3(settings, memory)
    return memory


def fullest_rank(settings: Settings) -> int:
    """The rank with the most bytes on its device: a parameter across two ranks' partitions counts whole on both."""
    if settings.stage not in (1, 2) or settings.bf16_optimizer:
        return 0
    return max(range(settings.world_size), key=lambda rank: sum(model_states(settings, rank).device.values()))


def _plain(settings: Settings, memory: Memory) -> None:
    memory.add("parameters", settings.parameter_bytes * settings.numel)
    memory.add("gradients", settings.parameter_bytes * settings.numel)
    for group in settings.groups:
        kept = sum(map(group.states.elements, group.shapes)) + group.states.scalars * len(group.shapes)
        memory.add("optimizer_states", FP32 * kept)


def _bf16_optimizer(settings: Settings, memory: Memory) -> None:
    memory.add("gradients", settings.parameter_bytes * settings.numel)
    for group in settings.groups:
        padded = padded_numel(group, settings.world_size)
        memory.add("parameters", settings.parameter_bytes * padded)
        memory.add("gradients", FP32 * padded)
        _master_and_moments(settings, memory, group, padded // settings.world_size, host=False)


def _zero_1_2(settings: Settings, memory: Memory, rank: int) -> None:
    host, world = settings.offload_optimizer, settings.world_size
    element, accumulator = settings.parameter_bytes, settings.accumulator_bytes
    raw_kept, raw = False, 0
    for group in settings.groups:
        padded = padded_numel(group, world)
        share = padded // world
        touched, covered = _touching(group, share, rank)
        raw += element * sum(touched)
        memory.add("parameters", element * padded)
        if group.muon:
            # Sized by whole matrices, in the gradients' dtype; a second buffer stages the momentum of a step that may
            # be skipped.
            memory.add("master_weights", settings.master_bytes * share, host)
            memory.add("optimizer_states", 2 * element * sum(touched))
            memory.add("gradients", element * sum(touched) + accumulator * (share - covered))
            continue
        _master_and_moments(settings, memory, group, share, host)
        if host:
            memory.add("parameters", element * share, host=True)
            memory.add("gradients", settings.master_bytes * share, host=True)
        if accumulator == FP32 and element != FP32:
            memory.add("gradients", FP32 * share)
        elif not host:
            memory.add("gradients", accumulator * (share - covered))
            raw_kept = raw_kept or bool(touched)
    if raw_kept:
        memory.add("gradients", raw)
    if host:
        largest = element * max(max(group.numels) for group in settings.groups)
        memory.add("buffers", largest)
        memory.add("buffers", largest, host=True)
        if settings.stage == 1 and accumulator != element and world > 1:
            # grad_accum of the last parameters still points into the bucket.
            memory.add("gradients", accumulator * settings.reduce_bucket)
        if settings.stage == 2 and settings.accumulation > 1 and accumulator == element:
            memory.add("gradients", raw, host=True)


def _zero_3(settings: Settings, memory: Memory) -> None:
    host, world = settings.offload_optimizer, settings.world_size
    memory.add("buffers", settings.parameter_bytes * settings.reduce_bucket)
    if world > 1 and any(group.muon for group in settings.groups):
        # Kept from step to step for gathering gradients, up to a limit (stage3.py, _muon_allgather_buffers).
        gathering = sum(
            FP32 * (1 + world) * -(-numel // world) for group in settings.groups if group.muon for numel in group.numels
        )
        memory.add("buffers", min(gathering, MUON_GATHER_BYTES))
    parts: list[tuple[Group, int]] = []
    for group in settings.groups:
        shares = [-(-numel // world) for numel in group.numels]
        memory.add("parameters", settings.parameter_bytes * sum(shares), settings.offload_param)
        memory.add("gradients", settings.accumulator_bytes * sum(shares), host)
        parts += [(group, sum(sub_group)) for sub_group in _sub_groups(shares, settings.sub_group_size)]
    kept = int((1 - settings.offload_ratio) * len(parts)) if host else 0  # stage3.py, subgroup_to_device
    for number, (group, share) in enumerate(parts):
        if host:
            memory.add("gradients", settings.master_bytes * share, host=number >= kept)
        _master_and_moments(settings, memory, group, share, host and number >= kept)
    if settings.gathers:
        memory.add("parameters", settings.parameter_bytes * world * sum(-(-numel // world) for numel in settings.whole))


def _master_and_moments(settings: Settings, memory: Memory, group: Group, share: int, host: bool) -> None:
    memory.add("master_weights", settings.master_bytes * share, host)
    size = settings.moment_bytes
    if group.muon and settings.stage == 3:
        size = settings.parameter_bytes  # the communication dtype
    memory.add("optimizer_states", size * group.states.elements((share,)) + FP32 * group.states.scalars, host)


def checkpoint_bytes(settings: Settings) -> int:
    """Bytes of a checkpoint's files, of all ranks together: the module (at stage 3 placeholders in every rank's file),
    with ZeRO the master weights, and the moments; padding is not written.

    By stage and precision that is, in bytes per parameter with Adam: stage 0 4 + 8; stages 1 and 2 4 + 12 in fp32 and
    2 + 12 in bf16 and fp16; stage 3 12.
    """
    world, zero, stage_3 = settings.world_size, settings.stage > 0, settings.stage == 3
    parameters = sum(len(group.shapes) for group in settings.groups)
    module = _PER_FILE + _PER_TENSOR * parameters + _PER_RNG * world
    total = module * world if stage_3 else module + settings.parameter_bytes * settings.numel
    total += _PER_FILE * world if zero else 0
    for group in settings.groups:
        states, share = group.states, padded_numel(group, world) // world
        if not zero:
            moments = sum(map(states.elements, group.shapes))
        elif group.muon and not (stage_3 or settings.offload_optimizer or settings.bf16_optimizer):
            # Each rank keeps the moment of a matrix on its border whole.
            moments = sum(sum(_touching(group, share, rank)[0]) for rank in range(world))
        else:
            moments = states.elements((group.numel,))
        size = FP32 if group.muon else settings.moment_bytes
        total += settings.master_bytes * group.numel * zero + size * moments
        tensors = zero + states.tensors + states.scalars
        total += _PER_TENSOR * tensors * (world if zero else len(group.shapes))
    return total


def padded_numel(group: Group, world_size: int) -> int:
    """Elements of a group's flat buffer."""
    alignment = ALIGNMENT * world_size
    return -(-group.numel // alignment) * alignment


def _touching(group: Group, share: int, rank: int) -> tuple[list[int], int]:
    """Sizes of the parameters in a rank's partition, whole or in part, and how many of its elements they fill."""
    start, touched, covered = 0, [], 0
    for numel in group.numels:
        overlap = min(start + numel, (rank + 1) * share) - max(start, rank * share)
        if overlap > 0:
            touched.append(numel)
            covered += overlap
        start += numel
    return touched, covered


def _sub_groups(shares: list[int], size: int) -> Iterator[list[int]]:
    """ZeRO-3 cuts a group where it exceeds sub_group_size (stage3.py, _create_fp16_sub_groups)."""
    if size >= sum(shares):
        yield shares
        return
    sub_group: list[int] = []
    for index, share in enumerate(shares):
        sub_group.append(share)
        if sum(sub_group) >= size or index == len(shares) - 1:
            yield sub_group
            sub_group = []
