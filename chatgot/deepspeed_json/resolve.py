"""Resolve a DeepSpeed JSON: hold it against the schema and all rules, fill in every "auto" and missing number, and
split it into its two readers' parts.

DeepSpeed gets what the file states, value for value, plus what was derived; ChatGoT gets the "chatgot" and "wandb"
sections. train.py reads and resolves once, and completes the result when it knows the model's size and the micro-batch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, Literal

from chatgot.deepspeed_json import machine, schema
from chatgot.deepspeed_json.adapt import RUN_LENGTH, Adaptation
from chatgot.deepspeed_json.batch import ACCUMULATION, MICRO, Batch, resolve_batch
from chatgot.deepspeed_json.chatgot_section import ChatGoTSection
from chatgot.deepspeed_json.fields import read_fields
from chatgot.deepspeed_json.findings import Finding, Findings
from chatgot.deepspeed_json.optimizers import check_optimizer, check_scheduler, cpu_adam_key
from chatgot.deepspeed_json.reach import note_idle
from chatgot.deepspeed_json.read import Document, check_document, plain_copy, read_document
from chatgot.deepspeed_json.rule_types import Subject, apply
from chatgot.deepspeed_json.rules import RULES
from chatgot.deepspeed_json.values import Derivations, Values, apply_overrides, read_values, without_comments
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
        return {**plain_copy(self.deepspeed), "wandb": dataclasses.asdict(self.wandb), "chatgot": chatgot}


@dataclass(frozen=True)
class Resolved:
    """A JSON with everything that is to be said about it, whether or not it can be used."""

    document: Document
    subject: Subject
    """The configuration as the rules see it: values, tree with overrides, device, ranks."""
    derived: Derivations
    backend: Literal["torch", "deepspeed"] | None
    findings: Findings

    @property
    def batch(self) -> Batch | None:
        """The batch numbers; None: there is an error."""
        return self.subject.batch

    def complete(
        self, n_params: int | None = None, micro_batch: tuple[int, str] | None = None, max_steps: int | None = None
    ) -> Resolved:
        """With what was not known yet, and what is to be said of it; this one stays as it is.

        Args:
            n_params: the model's parameters, from which communication buckets are sized; None: as they stand.
            micro_batch: where the JSON leaves it open, the micro-batch that memory allows, and why.
            max_steps: where the run ends; None: not known.
        """
        values, findings = self.subject.v, dataclasses.replace(self.findings, all=[*self.findings.all])
        derived, batch = Derivations(values, self.derived), self.batch
        if micro_batch is not None and batch is not None and batch.is_open:
            batch = resolve_batch(values, self.subject.ranks, findings, derived, micro_batch)
        subject = dataclasses.replace(self.subject, batch=batch, n_params=n_params)
        _fill_buckets(values, n_params, derived)
        apply(RULES, subject, findings, late=True)
        if RUN_LENGTH in derived and max_steps is not None:
            derived.add(RUN_LENGTH, max_steps, '"auto", train.max_steps')
        schedule = subject.chatgot.schedule
        if schedule is not None and max_steps is not None and schedule.warmup_steps > max_steps:
            why = f"the run ends at train.max_steps = {max_steps}, before the learning rate reaches its peak"
            advice = f"{why}; {max(1, max_steps // 10)} would be a tenth of the run"
            findings.add("warning", "chatgot.schedule.warmup_steps", schedule.warmup_steps, advice)
        return dataclasses.replace(self, subject=subject, derived=derived, findings=findings)

    def engine_config(self) -> EngineConfig:
        """Split into what DeepSpeed gets and what ChatGoT gets.

        Raises:
            ConfigError: all that is wrong, one problem per line.
        """
        self.findings.refuse()
        tree, values, batch, zero = self.subject.tree, self.subject.v, self.batch, self.subject.v.zero_optimization
        assert batch is not None  # else there was an error
        deepspeed = {key: plain_copy(value) for key, value in tree.items() if key not in ("chatgot", "wandb")}
        for *sections, key in values.ignored:
            del reduce(getitem, sections, deepspeed)[key]
        for dotted, derived in self.derived.items():
            if derived.inform_deepspeed:
                _put(deepspeed, values.name(dotted), derived.value)
        optimizer = deepspeed.get("optimizer")
        remarks = tuple(self.findings.at_level("adapted", "warning", "note"))
        wandb = values.wandb
        return EngineConfig(
            path=self.document.name,
            deepspeed=deepspeed,
            chatgot=self.subject.chatgot,
            wandb=WandbConfig(wandb.enabled, wandb.project, wandb.group, wandb.team),
            train_batch_size=batch.total,
            micro_batch_size=batch.micro,
            accumulation=batch.accumulation,
            precision=_precision(values),
            zero_stage=zero.stage,
            offload_optimizer="cpu" if zero.cpu_offload else values["zero_optimization.offload_optimizer.device"],
            offload_param="cpu" if zero.cpu_offload_param else values["zero_optimization.offload_param.device"],
            optimizer=optimizer and OptimizerConfig(optimizer["type"], plain_copy(optimizer.get("params") or {})),
            cpu_adam_key=cpu_adam_key(values, tree),
            scheduler=plain_copy(deepspeed.get("scheduler")),
            gradient_clipping=float(values.gradient_clipping),
            activation_checkpointing=plain_copy(deepspeed.get("activation_checkpointing")),
            activation_backend=self.backend,
            notes=(*self.derived.lines(besides=remarks), *(f"{finding.level}: {finding.text}" for finding in remarks)),
            findings=remarks,
            source=plain_copy(self.document.tree),
        )


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
    tree = apply_overrides(plain_copy(document.tree), overrides or {})
    findings = Findings(document.name, frozenset(overrides or {}), document.marks, strict=strict)
    check_document(document, findings)
    values = read_values(tree, findings)
    section = without_comments(tree.get("chatgot", {}), "chatgot", findings)
    section = section if isinstance(section, dict) else {}  # anything but a mapping was noted by read_values
    chatgot = read_fields(ChatGoTSection, section, "chatgot", findings)
    derived = Derivations(values)
    Adaptation(values, tree, facts, world_size, findings, derived).run()
    chatgot = _with_compile(chatgot, values, derived)
    batch = resolve_batch(values, world_size, findings, derived)
    check_optimizer(values, tree, findings)
    check_scheduler(values, tree, findings)
    misspelled = frozenset(finding.suggestion for finding in findings.at_level("error"))
    subject = Subject(values, tree, chatgot, facts, world_size, batch, misspelled=misspelled)
    apply(RULES, subject, findings, late=False)
    note_idle(values, findings)
    machine.note_lacks(subject, findings)
    _fill_defaults(values, derived)
    backend = _recomputation_backend(subject, derived)
    return Resolved(document, subject, derived, backend, findings)


def _with_compile(chatgot: ChatGoTSection, values: Values, derived: Derivations) -> ChatGoTSection:
    """Compile the model for DeepCompile, unless the file says whether to."""
    if not values.compile.deepcompile or "enabled" in chatgot.compile.model_fields_set:
        return chatgot
    derived.add("chatgot.compile.enabled", True, "compile.deepcompile needs it", inform_deepspeed=False)
    return chatgot.model_copy(update={"compile": chatgot.compile.model_copy(update={"enabled": True})})


def read_engine_config(
    path: str | Path,
    overrides: dict[str, Any] | None = None,
    *,
    world_size: int,
    facts: DeviceFacts,
    n_params: int | None = None,
) -> EngineConfig:
    """Read, resolve and complete a file in one call; see `read_document`, `resolve` and `Resolved.complete`.

    Raises:
        ConfigError: the file cannot be read, or all that is wrong with it, one problem per line.
    """
    resolved = resolve(read_document(Path(path)), overrides, world_size=world_size, facts=facts)
    return resolved.complete(n_params).engine_config()


def build_engine_config(
    tree: dict[str, Any],
    name: str,
    overrides: dict[str, Any] | None = None,
    *,
    world_size: int,
    facts: DeviceFacts,
    n_params: int | None = None,
) -> EngineConfig:
    """The same from a parsed JSON; `name` is the file's name in messages."""
    resolved = resolve(Document(tree, name), overrides, world_size=world_size, facts=facts)
    return resolved.complete(n_params).engine_config()


def _fill_defaults(values: Values, derived: Derivations) -> None:
    """State the defaults that DeepSpeed changed in 2026, so that the stored file means the same under any version."""
    stated = ["gradient_clipping"]
    stated += ["bf16.check_grad_overflow"] if values.bf16.enabled else []
    for section in ("zero_optimization.offload_optimizer", "zero_optimization.offload_param"):
        stated += [f"{section}.pin_memory"] if values[f"{section}.device"] != "none" else []
    for dotted in stated:
        if dotted not in values and dotted not in derived:
            derived.add(dotted, values[dotted], "not given, DeepSpeed's default since 2026")


def _fill_buckets(values: Values, n_params: int | None, derived: Derivations) -> None:
    """Communication buckets no larger than the model.

    DeepSpeed allocates reduce_bucket_size elements whatever the model's size (zero/stage_1_and_2.py, zero/stage3.py),
    so that its default of 5e8 makes ZeRO cost more memory than it saves on small models.
    """
    if n_params is None:
        return
    used_at = {"reduce_bucket_size": (1, 2, 3), "allgather_bucket_size": (1, 2), "stage3_prefetch_bucket_size": (3,)}
    stage = values.zero_optimization.stage
    legacy = "zero_optimization" in values and "zero_optimization.stage" not in values.spelled and stage
    for name, stages in used_at.items():
        dotted = f"zero_optimization.{name}"
        auto = values[dotted] == "auto"
        if not auto and (dotted in values or legacy or stage not in stages):
            continue
        default = schema.NODES[dotted].default
        size = f"the model's {n_params:,} parameters"
        reason = size if n_params < default else "DeepSpeed's default, the model is larger"
        given = '"auto"' if auto else "not given"
        derived.add(dotted, min(default, n_params + n_params % 2), f"{given}, {reason}")


def _recomputation_backend(subject: Subject, derived: Derivations) -> Literal["torch", "deepspeed"] | None:
    section = "activation_checkpointing"
    if section not in subject.v:
        return None
    asked = subject.chatgot.activation_checkpointing.backend
    if asked != "auto":
        return asked
    wanted = subject.needs_deepspeed()
    backend: Literal["torch", "deepspeed"] = "deepspeed" if wanted else "torch"
    reason = f"{section}.{wanted[0]} asks for it" if wanted else "nothing needs DeepSpeed's"
    derived.add(f"chatgot.{section}.backend", backend, f'"auto", {reason}', inform_deepspeed=False)
    return backend


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
