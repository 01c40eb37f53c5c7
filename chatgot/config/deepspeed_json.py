"""The DeepSpeed JSON: read strictly, every "auto" and missing batch number resolved with its reason, split into its two readers' parts.

DeepSpeed gets what the file states, value for value, plus what was derived; ChatGoT gets the "chatgot" and "wandb" sections.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from chatgot.config import deepspeed_schema as schema
from chatgot.config.batch import resolve_batch
from chatgot.config.chatgot_section import ChatGoTSection
from chatgot.config.deepspeed_checks import DEEPSPEED_ONLY_RECOMPUTATION, check_all
from chatgot.config.deepspeed_file import plain_copy, read_tree
from chatgot.config.deepspeed_values import Problems, Values, read_values, shown
from chatgot.config.device import DeviceFacts
from chatgot.config.errors import ConfigError
from chatgot.config.fields import read_section, to_plain
from chatgot.config.overrides import apply_overrides

Precision = Literal["fp32", "bf16", "fp16", "autocast_bf16", "autocast_fp16"]
OffloadDevice = Literal["none", "cpu", "nvme"]


@dataclass(frozen=True)
class WandbConfig:
    """The JSON's wandb section. ChatGoT writes the run itself, so DeepSpeed never sees it."""

    enabled: bool = False
    project: str = "deepspeed"
    group: str | None = None
    team: str | None = None


@dataclass(frozen=True)
class OptimizerConfig:
    """The JSON's optimizer section."""

    type: str
    """As given: 'AdamW', 'muon', 'SGD'."""
    params: dict[str, Any]
    legacy_fusion: bool = False


@dataclass(frozen=True)
class EngineConfig:
    """A checked and resolved DeepSpeed JSON. Two are equal when they run the same, whatever file they came from."""

    path: str = field(compare=False)
    deepspeed: dict[str, Any]
    """What DeepSpeed gets: no chatgot, no wandb, no "auto", all three batch numbers."""
    chatgot: ChatGoTSection
    wandb: WandbConfig
    train_batch_size: int
    micro_batch_size: int
    accumulation: int
    precision: Precision
    zero_stage: int
    offload_optimizer: OffloadDevice
    offload_param: OffloadDevice
    optimizer: OptimizerConfig | None
    scheduler: dict[str, Any] | None
    gradient_clipping: float
    activation_checkpointing: dict[str, Any] | None
    """The section as given; None when absent, which means: no recomputation."""
    activation_backend: Literal["torch", "deepspeed"] | None
    """Which implementation recomputes; None: no recomputation."""
    notes: tuple[str, ...] = field(compare=False)
    """Every derived or resolved value with its reason, one line each."""
    source: dict[str, Any] = field(compare=False, repr=False)
    """The JSON as read, overrides not applied."""

    def to_dict(self) -> dict[str, Any]:
        """The resolved, complete JSON for the run folder. Reading it again with the same ranks gives an equal EngineConfig."""
        chatgot = to_plain(self.chatgot)
        if self.activation_checkpointing is None:
            del chatgot["activation_checkpointing"]  # would do nothing without the DeepSpeed section, and is refused
        return {**plain_copy(self.deepspeed), "wandb": to_plain(self.wandb), "chatgot": chatgot}


def read_engine_config(
    path: str | Path,
    overrides: dict[str, Any] | None = None,
    *,
    world_size: int,
    facts: DeviceFacts,
    n_params: int | None = None,
    found_micro_batch: tuple[int, str] | None = None,
) -> EngineConfig:
    """Read, check and resolve a DeepSpeed JSON.

    Args:
        path: the file.
        overrides: {'optimizer.params.lr': 3e-4}, dotted names without the leading 'ds.'.
        world_size: number of ranks.
        facts: what the device can do.
        n_params: the model's parameter count, from which communication buckets are sized; None leaves them as they stand
            (first reading, before the model is known).
        found_micro_batch: what train_micro_batch_size_per_gpu "auto" means where the other batch numbers leave it open, and why;
            None: such a JSON is refused.

    Raises:
        ConfigError: the file cannot be read, or all that is wrong with it, one problem per line.
    """
    tree = read_tree(Path(path))
    return build_engine_config(
        tree, str(path), overrides, world_size=world_size, facts=facts, n_params=n_params, found_micro_batch=found_micro_batch
    )


def build_engine_config(
    tree: dict[str, Any],
    name: str,
    overrides: dict[str, Any] | None = None,
    *,
    world_size: int,
    facts: DeviceFacts,
    n_params: int | None = None,
    found_micro_batch: tuple[int, str] | None = None,
) -> EngineConfig:
    """An EngineConfig from a parsed JSON; `name` is the file's name in messages. See `read_engine_config`."""
    source = plain_copy(tree)
    tree = apply_overrides(plain_copy(tree), overrides or {})
    problems = Problems(name, frozenset(overrides or {}))
    values = read_values(tree, problems)
    chatgot = _read_chatgot(tree.get("chatgot", {}), problems)
    notes: list[str] = []
    resolved: dict[str, Any] = {}

    _resolve_precision(values, facts, resolved, notes)
    batch = resolve_batch(values, world_size, problems, notes, found_micro_batch)
    check_all(values, tree, chatgot, facts, world_size, problems)
    problems.refuse()
    assert batch is not None  # else there was a problem

    resolved.update(
        {
            "train_batch_size": batch.total,
            "train_micro_batch_size_per_gpu": batch.micro,
            "gradient_accumulation_steps": batch.accumulation,
        }
    )
    _fill_defaults(values, resolved, notes)
    _fill_buckets(values, n_params, resolved, notes)
    backend = _recomputation_backend(values, chatgot, notes)
    _note_deprecated(values, notes)

    deepspeed = {key: plain_copy(value) for key, value in tree.items() if key not in ("chatgot", "wandb")}
    for dotted, value in resolved.items():
        _put(deepspeed, values.name(dotted), value)
    optimizer, scheduler = deepspeed.get("optimizer"), deepspeed.get("scheduler")
    return EngineConfig(
        path=name,
        deepspeed=deepspeed,
        chatgot=chatgot,
        wandb=WandbConfig(**{key: values[f"wandb.{key}"] for key in ("enabled", "project", "group", "team")}),
        train_batch_size=batch.total,
        micro_batch_size=batch.micro,
        accumulation=batch.accumulation,
        precision=_precision(values),
        zero_stage=values["zero_optimization.stage"],
        offload_optimizer="cpu" if values["zero_optimization.cpu_offload"] else values["zero_optimization.offload_optimizer.device"],
        offload_param="cpu" if values["zero_optimization.cpu_offload_param"] else values["zero_optimization.offload_param.device"],
        optimizer=None
        if optimizer is None
        else OptimizerConfig(optimizer["type"], plain_copy(optimizer.get("params") or {}), bool(optimizer.get("legacy_fusion", False))),
        scheduler=plain_copy(scheduler),
        gradient_clipping=float(values["gradient_clipping"]),
        activation_checkpointing=plain_copy(deepspeed.get("activation_checkpointing")),
        activation_backend=backend,
        notes=tuple(notes),
        source=source,
    )


def _read_chatgot(section: Any, problems: Problems) -> ChatGoTSection:
    """The chatgot section, each of its parts on its own so that one problem does not hide the others."""
    if not isinstance(section, dict):
        return ChatGoTSection()  # the schema has already said that a section belongs here
    good: dict[str, Any] = {}
    for key, value in section.items():
        try:
            good[key] = getattr(read_section(ChatGoTSection, {key: value}, problems.place("chatgot")), key)
        except ConfigError as error:
            problems.lines.append(_as_override(str(error), problems))
    return ChatGoTSection(**good)


def _as_override(message: str, problems: Problems) -> str:
    """The message with the command line as its place, where the value came from there."""
    for dotted in problems.overridden:
        place = f"{problems.file}: {dotted}"
        if message.startswith((place + " ", place + ":", place + ".")):
            return f"override ds.{dotted}{message[len(place) :]}"
    return message


def _resolve_precision(values: Values, facts: DeviceFacts, resolved: dict[str, Any], notes: list[str]) -> None:
    """bf16.enabled and fp16.enabled "auto": bf16 where it is supported, else fp16, else neither."""
    auto = [name for name in ("bf16", "fp16") if values[f"{name}.enabled"] == "auto"]
    if not auto:
        return
    device = facts.name or facts.kind
    taken = next((key for key in ("torch_autocast", "bf16", "fp16") if values[f"{key}.enabled"] is True), None)
    supported = {"bf16": facts.bf16, "fp16": facts.fp16}
    chosen = None if taken else next((name for name in auto if supported[name]), None)
    for name in auto:
        on = name == chosen
        if taken:
            reason = f"{taken}.enabled is true"
        elif on:
            reason = f"{device} supports {name}"
        elif chosen:
            reason = f"{device} supports {chosen}"
        else:
            reason = f"{device} does not support {name}; training in fp32"
        values.given[f"{name}.enabled"] = on
        resolved[f"{name}.enabled"] = on
        notes.append(f'{name}.enabled = {shown(on)}: "auto", {reason}')


def _precision(values: Values) -> Precision:
    if values["bf16.enabled"]:
        return "bf16"
    if values["fp16.enabled"]:
        return "fp16"
    if values["torch_autocast.enabled"]:
        return "autocast_bf16" if values["torch_autocast.dtype"] in schema.BF16_NAMES else "autocast_fp16"
    return "fp32"


def _fill_defaults(values: Values, resolved: dict[str, Any], notes: list[str]) -> None:
    """State the defaults that DeepSpeed changed in 2026, so that the stored file means the same under another version."""

    def state(dotted: str) -> None:
        if dotted not in values:
            resolved[dotted] = schema.NODES[dotted].default  # type: ignore[union-attr]
            notes.append(f"{values.name(dotted)} = {shown(resolved[dotted])}: not given, DeepSpeed's default since 2026")

    state("gradient_clipping")
    if values["bf16.enabled"]:
        state("bf16.check_grad_overflow")
    for section in ("zero_optimization.offload_optimizer", "zero_optimization.offload_param"):
        if values[f"{section}.device"] != "none":
            state(f"{section}.pin_memory")
    persistence = "zero_optimization.stage3_param_persistence_threshold"
    if values[persistence] == "auto":
        resolved[persistence] = schema.NODES[persistence].default  # type: ignore[union-attr]
        notes.append(f'{values.name(persistence)} = {resolved[persistence]}: "auto", DeepSpeed\'s default')


def _fill_buckets(values: Values, n_params: int | None, resolved: dict[str, Any], notes: list[str]) -> None:
    """Communication buckets no larger than the model.

    DeepSpeed allocates reduce_bucket_size elements whatever the model's size (zero/stage_1_and_2.py, zero/stage3.py), so that its default
    of 5e8 makes ZeRO cost more memory than it saves on small models.
    """
    if n_params is None:
        return
    used_at = {"reduce_bucket_size": (1, 2, 3), "allgather_bucket_size": (1, 2), "stage3_prefetch_bucket_size": (3,)}
    legacy = "zero_optimization" in values and "zero_optimization.stage" not in values.spelled and values["zero_optimization.stage"]
    for name, stages in used_at.items():
        dotted = f"zero_optimization.{name}"
        auto = values[dotted] == "auto"
        if not auto and (dotted in values or legacy or values["zero_optimization.stage"] not in stages):
            continue
        default: int = schema.NODES[dotted].default  # type: ignore[union-attr]
        resolved[dotted] = min(default, n_params + n_params % 2)
        given = '"auto"' if auto else "not given"
        size = f"the model's {n_params:,} parameters" if n_params < default else "DeepSpeed's default, the model is larger"
        notes.append(f"{values.name(dotted)} = {resolved[dotted]}: {given}, {size}")


def _recomputation_backend(values: Values, chatgot: ChatGoTSection, notes: list[str]) -> Literal["torch", "deepspeed"] | None:
    section = "activation_checkpointing"
    if section not in values:
        return None
    wanted = [key for key in DEEPSPEED_ONLY_RECOMPUTATION if values[f"{section}.{key}"]]
    if values[f"{section}.number_checkpoints"] and not values[f"{section}.contiguous_memory_optimization"]:
        notes.append(f"{section}.number_checkpoints has no effect: DeepSpeed uses it with contiguous_memory_optimization only")
    if values[f"{section}.partition_activations"]:
        notes.append(f"{section}.partition_activations saves nothing here: DeepSpeed shares activations over model-parallel ranks only")
    if chatgot.activation_checkpointing.backend != "auto":
        return chatgot.activation_checkpointing.backend
    if wanted:
        notes.append(f'chatgot.{section}.backend = "deepspeed": "auto", {section}.{wanted[0]} asks for it')
        return "deepspeed"
    notes.append(f'chatgot.{section}.backend = "torch": "auto", {section} asks for nothing that only DeepSpeed does')
    return "torch"


def _note_deprecated(values: Values, notes: list[str]) -> None:
    for dotted in values.given:
        node = schema.NODES[dotted]
        if isinstance(node, schema.Key) and node.instead:
            notes.append(f"{values.name(dotted)} is deprecated: write {node.instead}")
    if (
        "zero_optimization" in values.given
        and "zero_optimization.stage" in values.given
        and "zero_optimization.stage" not in values.spelled
    ):
        notes.append('zero_optimization = true or false is deprecated: write {"stage": 1} or {"stage": 0}')
    if values["zero_optimization.overlap_comm"] and values["zero_optimization.stage"] in (1, 2):
        notes.append("zero_optimization.overlap_comm = true: races were reported at ZeRO stages 1 and 2; false is safer")
    if values["dataloader_drop_last"]:
        notes.append("dataloader_drop_last has no effect: ChatGoT's own loader only ever gives whole batches")


def _put(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Write a resolved value where the file states none, or "auto"."""
    *sections, key = dotted.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    if tree.get(key) in (None, "auto"):
        tree[key] = value
