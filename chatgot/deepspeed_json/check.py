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
from chatgot.deepspeed_json.optimizers import known_arguments
from chatgot.deepspeed_json.read import find_json, name_of, read_document
from chatgot.deepspeed_json.resolve import Resolved, resolve
from chatgot.deepspeed_json.schema import section_switch
from chatgot.deepspeed_json.values import idle, is_off
from chatgot.devices import DeviceFacts
from chatgot.errors import EXIT_CONFIG, EXIT_DONE, ConfigError
from chatgot.run_folder import flattened

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
        return list(effective(self.resolved)) if self.resolved is not None else []


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
            prefix = {"default": "default of ", "derived": "derived: ", "adapted": "adapted: "}.get(value.source, "")
            yield f"{f'{value.key} = {shown(value.value)}':<{_ASSIGNMENT_WIDTH}} {prefix}{value.where}"
        yield ""
    counts = Counter(finding.level for finding in report.findings)
    plural = {level: level if level == "adapted" else f"{level}s" for level in LEVELS}
    said = ", ".join(f"{counts[one]} {plural[one] if counts[one] > 1 else one}" for one in LEVELS if counts[one])
    yield f"{report.file}: {said or 'nothing to say'}"


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


def effective(s: Resolved) -> Iterator[Effective]:
    """Every value in use, in the schema's order; of a section that is switched off, the switch alone."""
    values = s.v
    implied = {
        "zero_optimization.overlap_comm": (s.stage == 3, "null: on at stage 3 only"),
        "communication_data_type": (s.precision, "null: the training precision"),
        "data_types.grad_accum_dtype": (s.precision, "null: the training precision"),
        "data_types.param_dtype": (s.precision, "null: the training precision"),
    }
    for dotted, node in schema.NODES.items():
        section = dotted.partition(".")[0]
        if dotted == "chatgot":
            for name, value in flattened(s.chatgot.model_dump(by_alias=True), "chatgot.").items():
                yield _used(s, name, s.states(name), value, "ChatGoT")
        if section in ("optimizer", "scheduler") and section not in values:
            continue
        if dotted in schema.ARGUMENTS:
            yield from _arguments(s, section)
        if isinstance(node, schema.Section) or (node.instead and dotted not in values):
            continue
        if any(is_off(values, one) and dotted != section_switch(one) for one in around(dotted)):
            continue
        if dotted in implied and dotted not in s.derived and values[dotted] is None:
            yield Effective(values.name(dotted), implied[dotted][0], "derived", implied[dotted][1])
        elif dotted in s.derived or dotted in values or not idle(values, dotted):
            yield _used(s, dotted, dotted in values, values[dotted], f"DeepSpeed {VERSION}")


def _arguments(s: Resolved, section: str) -> Iterator[Effective]:
    """The arguments of the optimizer or scheduler: those given, then the defaults of the others."""
    kind, given = str(s.v[f"{section}.type"]), s.params(section)
    defaults = {key: node.default for key, node in known_arguments(s, section).items() if node.default is not None}
    if s.optimizer == "adam" and given.get("adam_w_mode") is False and "weight_decay" in defaults:
        defaults["weight_decay"] = 0.0  # torch.optim.Adam's, not AdamW's
    for key, value in {**given, **{key: value for key, value in defaults.items() if key not in given}}.items():
        yield _used(s, f"{section}.params.{key}", key in given, value, kind)


def _used(s: Resolved, dotted: str, is_stated: bool, value: Any, owner: str) -> Effective:
    """A value with its source; `owner` gives it where nobody states it."""
    name = s.v.name(dotted)
    if derived := s.derived.get(dotted):
        is_adapted = any(one.key in around(name) for one in s.findings.at_level("adapted"))
        return Effective(name, derived.value, "adapted" if is_adapted else "derived", derived.reason)
    if not is_stated:
        return Effective(name, value, "default", owner)
    if s.findings.from_override(name):
        return Effective(name, value, "override", f"override ds.{name}")
    mark = s.findings.mark(name)
    return Effective(name, value, "file", f"{s.document.name}:{mark.line}" if mark else s.document.name)
