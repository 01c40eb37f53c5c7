"""The effective configuration: every value in use, from the file, an override, a default, or derived from others, with
the reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from chatgot.deepspeed_json import schema
from chatgot.deepspeed_json.arguments import given_arguments, known_arguments
from chatgot.deepspeed_json.inspection import Inspection
from chatgot.deepspeed_json.reach import idle, is_off, section_switch

VERSION = "0.19.8"
Source = Literal["file", "override", "derived", "default"]


@dataclass(frozen=True)
class Effective:
    """A value that DeepSpeed or ChatGoT will use."""

    key: str
    value: Any
    source: Source
    where: str
    """'file:line', 'override', the reason of a derived value, or whose default it is."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for --format json."""
        return dataclasses.asdict(self)


def effective(seen: Inspection) -> Iterator[Effective]:
    """Every value in use, in the schema's order; of a section that is switched off, the switch alone."""
    values = seen.values
    precision = next((name for name in ("bf16", "fp16") if values[f"{name}.enabled"] is True), "fp32")
    implied = {
        "zero_optimization.overlap_comm": (values["zero_optimization.stage"] == 3, "null: on at stage 3 only"),
        "communication_data_type": (precision, "null: the training precision"),
        "data_types.grad_accum_dtype": (precision, "null: the training precision"),
        "data_types.param_dtype": (precision, "null: the training precision"),
    }
    for dotted, node in schema.NODES.items():
        if isinstance(node, schema.Section):
            if dotted in ("optimizer.params", "scheduler.params") and dotted in values:
                yield from _arguments(seen, dotted)
            elif dotted == "chatgot":
                yield from _chatgot(seen, seen.chatgot.model_dump(by_alias=True), "chatgot")
            continue
        if node.instead and dotted not in values:
            continue
        if any(is_off(values, section) and dotted != section_switch(section) for section in _around(dotted)):
            continue
        if dotted.startswith(("optimizer.", "scheduler.")) and dotted.partition(".")[0] not in values:
            continue
        derived = seen.derived.get(dotted)
        name = values.name(dotted)
        if derived is not None:
            yield Effective(name, derived.value, "derived", derived.reason)
        elif dotted in values and not (values[dotted] is None and dotted in implied):
            yield _stated(seen, name, values[dotted])
        elif dotted in implied:
            yield Effective(name, implied[dotted][0], "derived", implied[dotted][1])
        elif not idle(values, dotted):
            yield Effective(name, node.default, "default", f"DeepSpeed {VERSION}")


def _around(dotted: str) -> Iterator[str]:
    while "." in dotted:
        dotted = dotted.rpartition(".")[0]
        yield dotted


def _stated(seen: Inspection, name: str, value: Any) -> Effective:
    if seen.findings.from_override(name):
        return Effective(name, value, "override", f"override ds.{name}")
    mark = seen.findings.mark(name)
    return Effective(name, value, "file", f"{seen.name}:{mark.line}" if mark else seen.name)


def _arguments(seen: Inspection, dotted: str) -> Iterator[Effective]:
    """The arguments of the optimizer or scheduler: those given, then the defaults of the others."""
    section = dotted.partition(".")[0]
    kind, params = seen.values[f"{section}.type"], given_arguments(seen.tree, section)
    for key, value in params.items():
        yield _stated(seen, f"{dotted}.{key}", value)
    decoupled = str(kind).lower() in ("adam", "adamw") and params.get("torch_adam") and params.get("adam_w_mode", True)
    for key, node in known_arguments(seen.values, seen.tree, section).items():
        default = 0.01 if key == "weight_decay" and decoupled else node.default  # torch.optim.AdamW's own
        if key not in params and default is not None:
            yield Effective(f"{dotted}.{key}", default, "default", str(kind))


def _chatgot(seen: Inspection, section: dict[str, Any], where: str) -> Iterator[Effective]:
    for key, value in section.items():
        dotted = f"{where}.{key}"
        derived = seen.derived.get(dotted)
        if isinstance(value, dict):
            yield from _chatgot(seen, value, dotted)
        elif derived is not None:
            yield Effective(dotted, derived.value, "derived", derived.reason)
        elif _given(seen.tree, dotted):
            yield _stated(seen, dotted, value)
        else:
            yield Effective(dotted, value, "default", "ChatGoT")


def _given(tree: Any, dotted: str) -> bool:
    for key in dotted.split("."):
        if not isinstance(tree, dict) or key not in tree:
            return False
        tree = tree[key]
    return True
