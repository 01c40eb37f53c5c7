"""The DeepSpeed JSON, ready to run: refused if anything is wrong with it, resolved, and split into its two readers'
parts.

DeepSpeed gets what the file states, value for value, plus what was derived; ChatGoT gets the "chatgot" and "wandb"
sections.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from chatgot.deepspeed_json import schema
from chatgot.deepspeed_json.chatgot_section import ChatGoTSection
from chatgot.deepspeed_json.file import plain_copy, read_document
from chatgot.deepspeed_json.findings import Finding
from chatgot.deepspeed_json.inspection import Inspection, inspect
from chatgot.deepspeed_json.relaxed_json import Document
from chatgot.deepspeed_json.values import Values
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
    """Every derived or resolved value with its reason, then warnings and notes, one line each."""
    findings: tuple[Finding, ...] = field(compare=False, repr=False)
    """The warnings and notes."""
    source: dict[str, Any] = field(compare=False, repr=False)
    """The JSON as read, overrides not applied."""

    def to_dict(self) -> dict[str, Any]:
        """The resolved, complete JSON for the run folder. Reading it again with the same ranks gives an equal
        EngineConfig.
        """
        chatgot = self.chatgot.model_dump(by_alias=True)
        if self.activation_checkpointing is None:
            del chatgot["activation_checkpointing"]  # would do nothing without the DeepSpeed section, and is refused
        return {**plain_copy(self.deepspeed), "wandb": asdict(self.wandb), "chatgot": chatgot}


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
        n_params: the model's parameter count, from which communication buckets are sized; None leaves them as they
            stand (first reading, before the model is known).
        found_micro_batch: what train_micro_batch_size_per_gpu "auto" means where the other batch numbers leave it open,
            and why; None: such a JSON is refused.

    Raises:
        ConfigError: the file cannot be read, or all that is wrong with it, one problem per line.
    """
    document = read_document(Path(path))
    return _engine_config(
        inspect(
            document,
            str(path),
            overrides,
            world_size=world_size,
            facts=facts,
            n_params=n_params,
            found_micro_batch=found_micro_batch,
        )
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
    return _engine_config(
        inspect(
            Document(tree),
            name,
            overrides,
            world_size=world_size,
            facts=facts,
            n_params=n_params,
            found_micro_batch=found_micro_batch,
        )
    )


def _engine_config(seen: Inspection) -> EngineConfig:
    seen.findings.refuse()
    tree, values, batch = seen.tree, seen.values, seen.batch
    assert batch is not None  # else there was an error
    deepspeed = {key: plain_copy(value) for key, value in tree.items() if key not in ("chatgot", "wandb")}
    for dotted, value in seen.derived.resolved().items():
        _put(deepspeed, values.name(dotted), value)
    optimizer, scheduler = deepspeed.get("optimizer"), deepspeed.get("scheduler")
    remarks = tuple(seen.findings.at_level("warning", "note"))
    return EngineConfig(
        path=seen.name,
        deepspeed=deepspeed,
        chatgot=seen.chatgot,
        wandb=WandbConfig(**{key: values[f"wandb.{key}"] for key in ("enabled", "project", "group", "team")}),
        train_batch_size=batch.total,
        micro_batch_size=batch.micro,
        accumulation=batch.accumulation,
        precision=_precision(values),
        zero_stage=values["zero_optimization.stage"],
        offload_optimizer="cpu"
        if values["zero_optimization.cpu_offload"]
        else values["zero_optimization.offload_optimizer.device"],
        offload_param="cpu"
        if values["zero_optimization.cpu_offload_param"]
        else values["zero_optimization.offload_param.device"],
        optimizer=None
        if optimizer is None
        else OptimizerConfig(
            optimizer["type"], plain_copy(optimizer.get("params") or {}), bool(optimizer.get("legacy_fusion", False))
        ),
        scheduler=plain_copy(scheduler),
        gradient_clipping=float(values["gradient_clipping"]),
        activation_checkpointing=plain_copy(deepspeed.get("activation_checkpointing")),
        activation_backend=seen.backend,
        notes=(*seen.derived.lines(), *(f"{finding.level}: {finding.text}" for finding in remarks)),
        findings=remarks,
        source=seen.source,
    )


def _precision(values: Values) -> Precision:
    if values["bf16.enabled"]:
        return "bf16"
    if values["fp16.enabled"]:
        return "fp16"
    if values["torch_autocast.enabled"]:
        return "autocast_bf16" if values["torch_autocast.dtype"] in schema.BF16_NAMES else "autocast_fp16"
    return "fp32"


def _put(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Write a resolved value where the file states none, or "auto"."""
    *sections, key = dotted.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    if tree.get(key) in (None, "auto"):
        tree[key] = value
