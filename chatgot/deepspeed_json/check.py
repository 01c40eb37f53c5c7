"""`chatgot check`: everything that is to be said about a DeepSpeed JSON, without a GPU and without importing torch.

The rules are train.py's own (resolve.resolve); this module only gathers and prints: findings, and every value in
use with where it comes from.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from chatgot.deepspeed_json import schema
from chatgot.deepspeed_json.findings import ABSENT, LEVELS, OVERRIDE, ConfigRefusal, Finding, around, shown
from chatgot.deepspeed_json.optimizers import given_arguments, known_arguments
from chatgot.deepspeed_json.reach import idle, is_off, section_switch
from chatgot.deepspeed_json.read import find_json, name_of, read_document
from chatgot.deepspeed_json.resolve import Resolved, resolve
from chatgot.devices import DeviceFacts
from chatgot.errors import EXIT_CONFIG, EXIT_DONE, ConfigError

VERSION = "0.19.8"
_ASSIGNMENT_WIDTH = 70


@dataclass(frozen=True)
class Effective:
    """A value that DeepSpeed or ChatGoT will use."""

    key: str
    value: Any
    source: Literal["file", "override", "adapted", "derived", "default"]
    where: str
    """'file:line', 'override', the reason of an adapted or derived value, or whose default it is."""


@dataclass(frozen=True)
class Report:
    """All findings about one file, errors first, then in the file's order."""

    file: str
    findings: tuple[Finding, ...]
    resolved: Resolved | None
    """None: the file could not be read."""

    @property
    def exit_code(self) -> int:
        """2 if there is an error, else 0."""
        return EXIT_CONFIG if any(finding.level == "error" for finding in self.findings) else EXIT_DONE

    def effective(self) -> list[Effective]:
        """Every value in use; empty when the file could not be read."""
        said = {finding.key for finding in self.findings if finding.level == "adapted"}
        values = list(effective(self.resolved)) if self.resolved is not None else []
        return [
            dataclasses.replace(one, source="adapted")
            if one.source == "derived" and said & set(around(one.key))
            else one
            for one in values
        ]


def check(
    path: str,
    overrides: dict[str, Any] | None = None,
    *,
    world_size: int,
    facts: DeviceFacts,
    n_params: int | None = None,
    max_steps: int | None = None,
    strict: bool = False,
) -> Report:
    """Hold a DeepSpeed JSON against every rule; see `resolve` and `Resolved.complete` for the arguments. Its content
    raises nothing.
    """
    try:
        path = str(find_json(path))
        document = read_document(Path(path))
    except ConfigError as error:
        return Report(name_of(path), findings_of(error, path), None)
    resolved = resolve(document, overrides, world_size=world_size, facts=facts, strict=strict)
    resolved = resolved.complete(n_params, max_steps=max_steps)

    def order(finding: Finding) -> tuple[int, bool, int, int]:
        return LEVELS.index(finding.level), finding.file == OVERRIDE, finding.line or 0, finding.column or 0

    return Report(document.name, tuple(sorted(resolved.findings.all, key=order)), resolved)


def findings_of(error: ConfigError, file: str) -> tuple[Finding, ...]:
    """A refusal as findings, one per line of its message where it does not carry any."""
    if isinstance(error, ConfigRefusal):
        return error.findings
    lines = str(error).splitlines()
    return tuple(Finding("error", file, None, None, "", ABSENT, line.removeprefix(f"{file}: ")) for line in lines)


def as_text(report: Report, with_effective: bool) -> Iterator[str]:
    """Lines for people: `file:line:column: level: key = value`, what is to be said below it, and a summary at the
    end.
    """
    for finding in report.findings:
        place = finding.place if finding.column is None else f"{finding.place}:{finding.column}"
        yield f"{place}: {finding.level}: {finding.subject or 'the file'}"
        if finding.excerpt:
            yield finding.excerpt
        yield from (f"    {sentence}" for sentence in finding.sentences)
    if with_effective:
        if report.findings:
            yield ""
        for value in report.effective():
            assignment = f"{value.key} = {shown(value.value)}"
            yield f"{assignment:<{_ASSIGNMENT_WIDTH}} {_source(value)}"
        yield ""
    counts = Counter(finding.level for finding in report.findings)
    plural = {level: level if level == "adapted" else f"{level}s" for level in LEVELS}
    said = ", ".join(f"{counts[one]} {plural[one] if counts[one] > 1 else one}" for one in LEVELS if counts[one])
    yield f"{report.file}: {said or 'nothing to say'}"


def _source(value: Effective) -> str:
    prefix = {"default": "default of ", "derived": "derived: ", "adapted": "adapted: "}.get(value.source, "")
    return prefix + value.where


def as_json(report: Report, with_effective: bool) -> str:
    """One JSON object for editors and CI."""
    counts = Counter(finding.level for finding in report.findings)
    tree: dict[str, Any] = {
        "file": report.file,
        "exit_code": report.exit_code,
        "counts": {level: counts[level] for level in LEVELS},
        "findings": [finding.to_dict() for finding in report.findings],
    }
    if with_effective:
        tree["effective"] = [dataclasses.asdict(value) for value in report.effective()]
    return json.dumps(tree, indent=2, ensure_ascii=False, default=str)


def effective(resolved: Resolved) -> Iterator[Effective]:
    """Every value in use, in the schema's order; of a section that is switched off, the switch alone."""
    values = resolved.subject.v
    precision = next((name for name in ("bf16", "fp16") if values[f"{name}.enabled"] is True), "fp32")
    implied = {
        "zero_optimization.overlap_comm": (values.zero_optimization.stage == 3, "null: on at stage 3 only"),
        "communication_data_type": (precision, "null: the training precision"),
        "data_types.grad_accum_dtype": (precision, "null: the training precision"),
        "data_types.param_dtype": (precision, "null: the training precision"),
    }
    for dotted, node in schema.NODES.items():
        if isinstance(node, schema.Section):
            if dotted in ("optimizer.params", "scheduler.params") and dotted.partition(".")[0] in values:
                yield from _arguments(resolved, dotted)
            elif dotted == "chatgot":
                yield from _chatgot(resolved, resolved.subject.chatgot.model_dump(by_alias=True), "chatgot")
            continue
        if node.instead and dotted not in values:
            continue
        if any(is_off(values, section) and dotted != section_switch(section) for section in around(dotted)):
            continue
        if dotted.startswith(("optimizer.", "scheduler.")) and dotted.partition(".")[0] not in values:
            continue
        derived = resolved.derived.get(dotted)
        name = values.name(dotted)
        if derived is not None:
            yield Effective(name, derived.value, "derived", derived.reason)
        elif dotted in values and not (values[dotted] is None and dotted in implied):
            yield _stated(resolved, name, values[dotted])
        elif dotted in implied:
            yield Effective(name, implied[dotted][0], "derived", implied[dotted][1])
        elif not idle(values, dotted):
            yield Effective(name, node.default, "default", f"DeepSpeed {VERSION}")


def _stated(resolved: Resolved, name: str, value: Any) -> Effective:
    if resolved.findings.from_override(name):
        return Effective(name, value, "override", f"override ds.{name}")
    mark = resolved.findings.mark(name)
    return Effective(name, value, "file", f"{resolved.document.name}:{mark.line}" if mark else resolved.document.name)


def _arguments(resolved: Resolved, dotted: str) -> Iterator[Effective]:
    """The arguments of the optimizer or scheduler: those given, then the defaults of the others."""
    section = dotted.partition(".")[0]
    kind, params = resolved.subject.v[f"{section}.type"], given_arguments(resolved.subject.tree, section)
    for key, value in params.items():
        name, derived = f"{dotted}.{key}", resolved.derived.get(f"{dotted}.{key}")
        yield Effective(name, derived.value, "derived", derived.reason) if derived else _stated(resolved, name, value)
    coupled = str(kind).lower() == "adam" and params.get("adam_w_mode") is False
    for key, node in known_arguments(resolved.subject.v, resolved.subject.tree, section).items():
        default = 0.0 if key == "weight_decay" and coupled else node.default  # torch.optim.Adam's, not AdamW's
        if key not in params and default is not None:
            yield Effective(f"{dotted}.{key}", default, "default", str(kind))


def _chatgot(resolved: Resolved, section: dict[str, Any], where: str) -> Iterator[Effective]:
    for key, value in section.items():
        dotted = f"{where}.{key}"
        derived = resolved.derived.get(dotted)
        if isinstance(value, dict):
            yield from _chatgot(resolved, value, dotted)
        elif derived is not None:
            yield Effective(dotted, derived.value, "derived", derived.reason)
        elif resolved.subject.states(dotted):
            yield _stated(resolved, dotted, value)
        else:
            yield Effective(dotted, value, "default", "ChatGoT")
