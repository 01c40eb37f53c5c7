"""What is in memory, in bytes: the model states of one rank as DeepSpeed 0.19.8 lays them out, the files of a
checkpoint, and what a forward pass keeps for the backward pass, block by block, as the modules of model/gpt.py save it.

Every formula is held against live tensors (tests/plan/test_memory.py). The moment of model states is the one before the
optimizer step of any step but the first: the gradients of all micro batches are reduced, and the moments exist.
Activations are held against what autograd saves on a CPU. On CUDA three things differ, by the sources of torch 2.9 and
later: rms_norm is fused and keeps its input, dropout keeps a mask of one byte, and attention keeps no (T, T) matrix
with dropout either.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from chatgot.plan.settings import FP32, HALF, Group, Settings

STATES = ("parameters", "gradients", "master_weights", "optimizer_states")
ALIGNMENT = 2
"""Flat buffers are padded to a multiple of this times the ranks (nccl_start_alignment_factor)."""
MUON_GATHER_BYTES = 256 * 2**20
_PER_FILE, _PER_TENSOR, _PER_RNG = 8_000, 300, 15_000
"""Bytes in a checkpoint, measured: a file's pickled structure (6 to 8 thousand), a tensor's zip record beside its data,
one rank's random state in the client state."""
INT64 = 8
LOSS_BYTES = 3 * FP32
"""Per logit, when the backward pass starts: log-probabilities, their gradient, the gradient of the logits, all fp32."""


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


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro batch on one rank."""

    blocks: tuple[int, ...]
    """Kept by each block until its backward: everything, or only its input where the block is recomputed."""
    block: int
    """What one block keeps when nothing is recomputed; a recomputed block has it again during its own backward."""
    ends: int
    """Kept outside the blocks: embeddings, final norm, the head's input; casts of weights under autocast."""
    logits: int
    """Log-probabilities kept by the loss."""
    loss_peak: int
    """Most that logits and loss take at once."""
    workspace: int
    """Gradients of activations that live while a block is differentiated, beyond the activations freed meanwhile."""
    host: int
    """Inputs of recomputed blocks that wait in host memory."""

    @property
    def saved(self) -> int:
        """All that autograd keeps at the end of the forward pass."""
        return sum(self.blocks) + self.ends + self.logits


def activations(settings: Settings) -> Activations:
    """Bytes kept by one micro batch under the run's recomputation policy."""
    model, tokens = settings.model, settings.tokens
    block = _block(settings)
    block_input = tokens * model.d_model * settings.parameter_bytes
    recomputed = [
        settings.recompute_every is not None and i % settings.recompute_every == 0 for i in range(model.n_layers)
    ]
    kept = 0 if settings.activations_on_cpu else block_input
    logits = tokens * settings.vocab_size * FP32
    return Activations(
        blocks=tuple(kept if again else block for again in recomputed),
        block=block,
        ends=_ends(settings, recomputed),
        logits=logits,
        loss_peak=tokens * settings.vocab_size * LOSS_BYTES,
        workspace=_workspace(settings),
        host=block_input * sum(recomputed) if settings.activations_on_cpu else 0,
    )


def _element(settings: Settings) -> int:
    """Bytes of an element of what matrix products take and give."""
    return FP32 if settings.precision == "fp32" else HALF


def _mask(settings: Settings) -> int:
    """Bytes of an element of what dropout keeps."""
    return 0 if not settings.model.dropout else 1 if settings.on_cuda else settings.parameter_bytes


def _norm(settings: Settings) -> int:
    """Bytes per token of one norm over d_model: its input, or what it is normalised to, and the statistics."""
    if settings.model.architecture == "gpt2":
        return settings.model.d_model * settings.parameter_bytes + 2 * (
            FP32 if settings.on_cuda else settings.parameter_bytes
        )
    return settings.model.d_model * (settings.parameter_bytes if settings.on_cuda else FP32) + FP32


def _block(settings: Settings) -> int:
    model, e = settings.model, _element(settings)
    d, f, a = model.d_model, model.d_hid, model.attention_width
    kv = model.kv_heads * model.head_width
    per_token = 2 * (_norm(settings) + d * e + d * _mask(settings))  # two norms, inputs of qkv and up, two dropouts
    if model.architecture == "modern":
        per_token += 4 * f * e  # gate and up in one, silu(gate), its product with up
        per_token += FP32 * (model.n_head + model.kv_heads) + (0 if settings.on_cuda else FP32 * (a + kv))  # QK-norm
    else:
        per_token += 2 * f * e  # before and after GELU
    grouped = model.kv_heads != model.n_head
    if settings.on_cuda and settings.precision == "fp32" and grouped:
        # There is no kernel for grouped heads in fp32: softmax, and what dropout makes of it, are kept.
        matrices = 1 + 2 * bool(model.dropout)
    elif not settings.on_cuda and model.dropout:
        matrices = 3
    else:
        matrices = 0
    if matrices:
        # scaled q and k, v, the result
        per_token += 3 * a * FP32 + a * e + matrices * FP32 * model.n_head * model.max_seq_length
    else:
        rotated = a + kv if model.architecture == "modern" else 0
        per_token += (a + 2 * kv + rotated) * e + a * e + FP32 * model.n_head  # q, k, v; the result; logsumexp
    return settings.tokens * per_token


def _ends(settings: Settings, recomputed: list[bool]) -> int:
    model, tokens, e = settings.model, settings.tokens, _element(settings)
    size = tokens * (model.d_model * (e + _mask(settings)) + _norm(settings))
    size += 2 * INT64 * tokens  # input_ids and targets
    if settings.precision.startswith("autocast"):
        d, f, a = model.d_model, model.d_hid, model.attention_width
        kv = model.kv_heads * model.head_width
        matrices = d * (a + 2 * kv) + a * d + (3 if model.architecture == "modern" else 2) * d * f
        size += HALF * (settings.vocab_size * d + (len(recomputed) - sum(recomputed)) * matrices)  # weights as cast
    return size


def _workspace(settings: Settings) -> int:
    model, e = settings.model, _element(settings)
    # Gradients as wide as the feed-forward layer, less what has been freed by then.
    wide = 2 if model.architecture == "modern" else 1
    return settings.tokens * (2 * model.d_model * settings.parameter_bytes + wide * model.d_hid * e)
