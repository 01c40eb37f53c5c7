"""Resolve a DeepSpeed JSON: hold it against the schema and all rules, fill in every "auto" and missing number, and
split it into its two readers' parts.

DeepSpeed gets what the file states, value for value, plus what was derived; ChatGoT gets the "chatgot" and "wandb"
sections. train.py reads and resolves once, and completes the result when it knows the model's size and the micro-batch.
"""

from __future__ import annotations

import dataclasses
from copy import deepcopy
from dataclasses import dataclass, field
from functools import reduce
from operator import getitem
from typing import Any, Literal

from chatgot.deepspeed_json import schema
from chatgot.deepspeed_json.adapt import RUN_LENGTH, adapt, resolve_batch
from chatgot.deepspeed_json.findings import Finding, Findings, shown
from chatgot.deepspeed_json.optimizers import check_types, cpu_adam_key
from chatgot.deepspeed_json.read import Document, check_document
from chatgot.deepspeed_json.rule_types import Subject, apply
from chatgot.deepspeed_json.rules import RULES
from chatgot.deepspeed_json.schema import ACCUMULATION, MICRO
from chatgot.deepspeed_json.settings import ChatGoTSection, read_fields
from chatgot.deepspeed_json.values import Values, apply_overrides, note_idle, read_values, without_comments
from chatgot.devices import DeviceFacts

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
    cpu_adam_key: str
    """The key for which DeepSpeed must build its CPUAdam, or an empty text."""
    scheduler: dict[str, Any] | None
    gradient_clipping: float
    activation_checkpointing: dict[str, Any] | None
    """The section as given; None when absent, which means: no recomputation."""
    activation_backend: Literal["torch", "deepspeed"] | None
    """Which implementation recomputes; None: no recomputation."""
    notes: tuple[str, ...] = field(compare=False)
    """Every derived or resolved value with its reason, then what is adapted, warnings and notes, one line each."""
    findings: tuple[Finding, ...] = field(compare=False, repr=False)
    """What is adapted, the warnings and the notes."""
    source: dict[str, Any] = field(compare=False, repr=False)
    """The JSON as read, overrides not applied."""

    def with_micro_batch(self, micro_batch: int, world_size: int) -> EngineConfig:
        """The same settings with another micro-batch and the accumulation that goes with it; the global batch stays."""
        accumulation = self.train_batch_size // (micro_batch * world_size)
        deepspeed = {**self.deepspeed, MICRO: micro_batch, ACCUMULATION: accumulation}
        return dataclasses.replace(self, micro_batch_size=micro_batch, accumulation=accumulation, deepspeed=deepspeed)

    def to_dict(self) -> dict[str, Any]:
        """The resolved, complete JSON for the run folder. Reading it again with the same ranks gives an equal
        EngineConfig.
        """
        chatgot = self.chatgot.model_dump(by_alias=True, mode="json")
        if self.activation_checkpointing is None:
            del chatgot["activation_checkpointing"]  # would do nothing without the DeepSpeed section, and is refused
        return {**deepcopy(self.deepspeed), "wandb": dataclasses.asdict(self.wandb), "chatgot": chatgot}


class Resolved(Subject):
    """A JSON with everything that is to be said about it, whether or not it can be used."""

    def complete(
        self, n_params: int | None = None, micro_batch: tuple[int, str] | None = None, max_steps: int | None = None
    ) -> Resolved:
        """With what was not known yet, and what is to be said of it; this one stays as it is.

        Args:
            n_params: the model's parameters, from which communication buckets are sized; None: as they stand.
            micro_batch: where the JSON leaves it open, the micro-batch that memory allows, and why.
            max_steps: where the run ends; None: not known.
        """
        findings = dataclasses.replace(self.findings, all=[*self.findings.all])
        whole = dataclasses.replace(self, n_params=n_params, findings=findings, derived=dict(self.derived))
        if micro_batch is not None and whole.batch is not None and whole.batch.is_open:
            whole.batch = resolve_batch(whole, micro_batch)
        _fill_buckets(whole)
        apply(RULES, whole, late=True)
        if RUN_LENGTH in whole.derived and max_steps is not None:
            whole.derive(RUN_LENGTH, max_steps, '"auto", train.max_steps')
        schedule = whole.chatgot.schedule
        if schedule is not None and max_steps is not None and schedule.warmup_steps > max_steps:
            why = f"the run ends at train.max_steps = {max_steps}, before the learning rate reaches its peak"
            advice = f"{why}; {max(1, max_steps // 10)} would be a tenth of the run"
            findings.add("warning", "chatgot.schedule.warmup_steps", schedule.warmup_steps, advice)
        return whole

    def engine_config(self) -> EngineConfig:
        """Split into what DeepSpeed gets and what ChatGoT gets.

        Raises:
            ConfigError: all that is wrong, one problem per line.
        """
        self.findings.refuse()
        values, batch, zero = self.v, self.batch, self.v.zero_optimization
        assert batch is not None  # else there was an error
        deepspeed = {key: deepcopy(value) for key, value in self.tree.items() if key not in ("chatgot", "wandb")}
        for *sections, key in values.ignored:
            del reduce(getitem, sections, deepspeed)[key]
        for dotted, derived in self.derived.items():
            if not dotted.startswith("chatgot."):
                _put(deepspeed, values.name(dotted), derived.value)
        optimizer, wandb = deepspeed.get("optimizer"), values.wandb
        remarks = tuple(self.findings.at_level("adapted", "warning", "note"))
        return EngineConfig(
            path=self.document.name,
            deepspeed=deepspeed,
            chatgot=self.chatgot,
            wandb=WandbConfig(wandb.enabled, wandb.project, wandb.group, wandb.team),
            train_batch_size=batch.total,
            micro_batch_size=batch.micro,
            accumulation=batch.accumulation,
            precision=_precision(values),
            zero_stage=zero.stage,
            offload_optimizer="cpu" if zero.cpu_offload else values["zero_optimization.offload_optimizer.device"],
            offload_param="cpu" if zero.cpu_offload_param else values["zero_optimization.offload_param.device"],
            optimizer=optimizer and OptimizerConfig(optimizer["type"], deepcopy(optimizer.get("params") or {})),
            cpu_adam_key=cpu_adam_key(self),
            scheduler=deepcopy(deepspeed.get("scheduler")),
            gradient_clipping=float(values.gradient_clipping),
            activation_checkpointing=deepcopy(deepspeed.get("activation_checkpointing")),
            activation_backend=self.backend,
            notes=(*self._derivations(), *(f"{finding.level}: {finding.text}" for finding in remarks)),
            findings=remarks,
            source=deepcopy(self.document.tree),
        )

    def _derivations(self) -> list[str]:
        """'key = value: reason' of what was derived, but for what a finding says that it is adapted."""
        said = tuple(f"{finding.key}." for finding in self.findings.at_level("adapted"))
        named = [(self.v.name(dotted), derived) for dotted, derived in self.derived.items()]
        return [f"{name} = {shown(one.value)}: {one.reason}" for name, one in named if not f"{name}.".startswith(said)]


def resolve(
    document: Document,
    overrides: dict[str, Any] | None = None,
    *,
    world_size: int,
    facts: DeviceFacts,
    strict: bool = False,
) -> Resolved:
    """Hold a JSON against all rules and fill in what can be filled in. Nothing is raised about its content.

    Args:
        document: the file as read.
        overrides: {'optimizer.params.lr': 3e-4}, dotted names without the leading 'ds.'.
        world_size: number of ranks.
        facts: what the device can do.
        strict: whether every warning is an error.
    """
    tree = apply_overrides(deepcopy(document.tree), overrides or {})
    findings = Findings(document.name, frozenset(overrides or {}), document.marks, strict=strict)
    check_document(document, findings)
    values = read_values(tree, findings)
    section = without_comments(tree.get("chatgot", {}), "chatgot", findings)
    section = section if isinstance(section, dict) else {}  # anything but a mapping was noted by read_values
    chatgot = read_fields(ChatGoTSection, section, "chatgot", findings)
    resolved = Resolved(document, tree, values, chatgot, facts, world_size, findings)
    adapt(resolved)
    resolved.batch = resolve_batch(resolved)
    check_types(resolved)
    apply(RULES, resolved, late=False)
    note_idle(values, findings)
    _fill_defaults(resolved)
    return resolved


def build_engine_config(
    tree: dict[str, Any],
    name: str,
    overrides: dict[str, Any] | None = None,
    *,
    world_size: int,
    facts: DeviceFacts,
    n_params: int | None = None,
) -> EngineConfig:
    """Resolve and complete a parsed JSON in one call; see `resolve` and `Resolved.complete`.

    Args:
        name: the file's name in messages.

    Raises:
        ConfigError: all that is wrong with it, one problem per line.
    """
    resolved = resolve(Document(tree, name), overrides, world_size=world_size, facts=facts)
    return resolved.complete(n_params).engine_config()


def _fill_defaults(s: Subject) -> None:
    """State the defaults that DeepSpeed changed in 2026, so that the stored file means the same under any version, and
    what recomputes.
    """
    stated = ["gradient_clipping"]
    stated += ["bf16.check_grad_overflow"] if s.v.bf16.enabled else []
    for section in ("zero_optimization.offload_optimizer", "zero_optimization.offload_param"):
        stated += [f"{section}.pin_memory"] if s.v[f"{section}.device"] != "none" else []
    for dotted in stated:
        if dotted not in s.v and dotted not in s.derived:
            s.derive(dotted, s.v[dotted], "not given, DeepSpeed's default since 2026")
    if s.backend is not None and s.chatgot.activation_checkpointing.backend == "auto":
        keys = s.needs_deepspeed()
        reason = f"activation_checkpointing.{keys[0]} asks for it" if keys else "nothing needs DeepSpeed's"
        s.derive("chatgot.activation_checkpointing.backend", s.backend, f'"auto", {reason}')


def _fill_buckets(s: Subject) -> None:
    """Communication buckets no larger than the model.

    DeepSpeed allocates reduce_bucket_size elements whatever the model's size (zero/stage_1_and_2.py, zero/stage3.py),
    so that its default of 5e8 makes ZeRO cost more memory than it saves on small models.
    """
    if s.n_params is None:
        return
    used_at = {"reduce_bucket_size": (1, 2, 3), "allgather_bucket_size": (1, 2), "stage3_prefetch_bucket_size": (3,)}
    legacy = "zero_optimization" in s.v and "zero_optimization.stage" not in s.v.spelled and s.stage
    for name, stages in used_at.items():
        dotted = f"zero_optimization.{name}"
        auto = s.v[dotted] == "auto"
        if not auto and (dotted in s.v or legacy or s.stage not in stages):
            continue
        default = schema.NODES[dotted].default
        size = f"the model's {s.n_params:,} parameters"
        reason = size if s.n_params < default else "DeepSpeed's default, the model is larger"
        given = '"auto"' if auto else "not given"
        s.derive(dotted, min(default, s.n_params + s.n_params % 2), f"{given}, {reason}")


def _precision(values: Values) -> Precision:
    if values.bf16.enabled:
        return "bf16"
    if values.fp16.enabled:
        return "fp16"
    if values.torch_autocast.enabled:
        return "autocast_bf16" if values.torch_autocast.dtype in schema.BF16_NAMES else "autocast_fp16"
    return "fp32"


def _put(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Write a resolved value where the file states none, "auto", or what is adapted."""
    *sections, key = dotted.split(".")
    for section in sections:
        if not isinstance(tree.get(section), dict):
            tree[section] = {}
        tree = tree[section]
    tree[key] = value
