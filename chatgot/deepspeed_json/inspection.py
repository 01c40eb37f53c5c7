"""One engine of rules over a DeepSpeed JSON: read strictly, everything to say about it collected, every "auto" and
missing number resolved.

train.py (through deepspeed_json) and `chatgot check` (through check) both look at what `inspect` returns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from chatgot.deepspeed_json import schema
from chatgot.deepspeed_json.batch import Batch, resolve_batch
from chatgot.deepspeed_json.chatgot_section import ChatGoTSection
from chatgot.deepspeed_json.checks import DEEPSPEED_ONLY_RECOMPUTATION, check_all
from chatgot.deepspeed_json.derived import Derivations
from chatgot.deepspeed_json.fields import read_fields
from chatgot.deepspeed_json.file import apply_overrides, check_document, plain_copy
from chatgot.deepspeed_json.findings import Findings
from chatgot.deepspeed_json.relaxed_json import Document
from chatgot.deepspeed_json.remarks import Subject, remark
from chatgot.deepspeed_json.values import Values, read_values
from chatgot.devices import DeviceFacts


@dataclass
class Inspection:
    """A JSON with everything that is to be said about it, whether or not it can be used."""

    name: str
    source: dict[str, Any]
    """The JSON as read, overrides not applied."""
    tree: dict[str, Any]
    """With overrides."""
    values: Values
    chatgot: ChatGoTSection
    batch: Batch | None
    """None: there is an error."""
    derived: Derivations
    backend: Literal["torch", "deepspeed"] | None
    findings: Findings


def inspect(
    document: Document,
    name: str,
    overrides: dict[str, Any] | None = None,
    *,
    world_size: int,
    facts: DeviceFacts,
    n_params: int | None = None,
    found_micro_batch: tuple[int, str] | None = None,
) -> Inspection:
    """Hold a JSON against all rules. train.py refuses on the errors that are found, `chatgot check` lists
    everything.
    """
    source = plain_copy(document.tree)
    tree = apply_overrides(plain_copy(document.tree), overrides or {})
    findings = Findings(name, frozenset(overrides or {}), document.marks)
    check_document(document, findings)
    values = read_values(tree, findings)
    chatgot = _read_chatgot(tree.get("chatgot", {}), findings)
    derived = Derivations(values)

    _resolve_precision(values, facts, derived)
    batch = resolve_batch(values, world_size, findings, derived, found_micro_batch)
    check_all(values, tree, chatgot, facts, world_size, findings)
    _fill_defaults(values, derived)
    _fill_buckets(values, n_params, derived)
    backend = _recomputation_backend(values, chatgot, derived)
    remark(Subject(values, tree, chatgot, facts, batch, n_params, world_size), findings)
    return Inspection(name, source, tree, values, chatgot, batch, derived, backend, findings)


def _read_chatgot(section: Any, findings: Findings) -> ChatGoTSection:
    """The chatgot section; what is wrong in it is left at its default."""
    if not isinstance(section, dict):
        return ChatGoTSection()  # the schema has already said that a section belongs here
    return read_fields(ChatGoTSection, section, "chatgot", findings)


def _resolve_precision(values: Values, facts: DeviceFacts, derived: Derivations) -> None:
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
        derived.add(f"{name}.enabled", on, f'"auto", {reason}')


def _fill_defaults(values: Values, derived: Derivations) -> None:
    """State the defaults that DeepSpeed changed in 2026, so that the stored file means the same under another
    version.
    """

    def state(dotted: str) -> None:
        if dotted not in values:
            derived.add(dotted, schema.NODES[dotted].default, "not given, DeepSpeed's default since 2026")  # type: ignore[union-attr]

    state("gradient_clipping")
    if values["bf16.enabled"]:
        state("bf16.check_grad_overflow")
    for section in ("zero_optimization.offload_optimizer", "zero_optimization.offload_param"):
        if values[f"{section}.device"] != "none":
            state(f"{section}.pin_memory")
    persistence = "zero_optimization.stage3_param_persistence_threshold"
    if values[persistence] == "auto":
        derived.add(persistence, schema.NODES[persistence].default, '"auto", DeepSpeed\'s default')  # type: ignore[union-attr]


def _fill_buckets(values: Values, n_params: int | None, derived: Derivations) -> None:
    """Communication buckets no larger than the model.

    DeepSpeed allocates reduce_bucket_size elements whatever the model's size (zero/stage_1_and_2.py, zero/stage3.py),
    so that its default of 5e8 makes ZeRO cost more memory than it saves on small models.
    """
    if n_params is None:
        return
    used_at = {"reduce_bucket_size": (1, 2, 3), "allgather_bucket_size": (1, 2), "stage3_prefetch_bucket_size": (3,)}
    legacy = (
        "zero_optimization" in values
        and "zero_optimization.stage" not in values.spelled
        and values["zero_optimization.stage"]
    )
    for name, stages in used_at.items():
        dotted = f"zero_optimization.{name}"
        auto = values[dotted] == "auto"
        if not auto and (dotted in values or legacy or values["zero_optimization.stage"] not in stages):
            continue
        default: int = schema.NODES[dotted].default  # type: ignore[union-attr]
        given = '"auto"' if auto else "not given"
        size = (
            f"the model's {n_params:,} parameters" if n_params < default else "DeepSpeed's default, the model is larger"
        )
        derived.add(dotted, min(default, n_params + n_params % 2), f"{given}, {size}")


def _recomputation_backend(
    values: Values, chatgot: ChatGoTSection, derived: Derivations
) -> Literal["torch", "deepspeed"] | None:
    section = "activation_checkpointing"
    if section not in values:
        return None
    if chatgot.activation_checkpointing.backend != "auto":
        return chatgot.activation_checkpointing.backend
    wanted = [key for key in DEEPSPEED_ONLY_RECOMPUTATION if values[f"{section}.{key}"]]
    backend, reason = (
        ("deepspeed", f"{section}.{wanted[0]} asks for it") if wanted else ("torch", "nothing needs DeepSpeed's")
    )
    derived.add(f"chatgot.{section}.backend", backend, f'"auto", {reason}', inform_deepspeed=False)
    return backend
