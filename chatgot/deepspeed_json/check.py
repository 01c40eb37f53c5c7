"""`chatgot check`: everything that is to be said about a DeepSpeed JSON, without a GPU and without importing torch.

The rules are train.py's own (inspection.inspect); this module only gathers and prints.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatgot.deepspeed_json.batch import TO_BE_FOUND
from chatgot.deepspeed_json.effective import Effective, effective
from chatgot.deepspeed_json.file import read_document
from chatgot.deepspeed_json.findings import (
    ABSENT,
    LEVELS,
    OVERRIDE,
    ConfigRefusal,
    Finding,
    shown,
)
from chatgot.deepspeed_json.inspection import Inspection, inspect
from chatgot.deepspeed_json.shipped import find_json
from chatgot.devices import DeviceFacts
from chatgot.errors import EXIT_CONFIG, EXIT_DONE, ConfigError

_VALUE_WIDTH = 30


@dataclass(frozen=True)
class Report:
    """All findings about one file, errors first, then in the file's order."""

    file: str
    findings: tuple[Finding, ...]
    seen: Inspection | None
    """None: the file could not be read."""

    @property
    def exit_code(self) -> int:
        """2 if there is an error, else 0."""
        return EXIT_CONFIG if any(finding.level == "error" for finding in self.findings) else EXIT_DONE

    def effective(self) -> list[Effective]:
        """Every value in use; empty when the file could not be read."""
        return list(effective(self.seen)) if self.seen is not None else []


def check(
    path: str,
    overrides: dict[str, Any] | None = None,
    *,
    world_size: int,
    facts: DeviceFacts,
    n_params: int | None = None,
) -> Report:
    """Hold a DeepSpeed JSON against every rule; see `read_engine_config` for the arguments. Nothing is raised about the
    file's content.
    """
    try:
        path = str(find_json(path))
        document = read_document(Path(path))
    except ConfigError as error:
        return Report(path, findings_of(error, path), None)
    seen = inspect(
        document, path, overrides, world_size=world_size, facts=facts, n_params=n_params, found_micro_batch=TO_BE_FOUND
    )
    found = sorted(
        seen.findings.all, key=lambda f: (LEVELS.index(f.level), f.file == OVERRIDE, f.line or 0, f.column or 0)
    )
    return Report(path, tuple(found), seen)


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
            yield f"{assignment:<{_VALUE_WIDTH + 40}} {_source(value)}"
        yield ""
    counts = Counter(finding.level for finding in report.findings)
    said = ", ".join(f"{counts[level]} {level}{'s' if counts[level] > 1 else ''}" for level in LEVELS if counts[level])
    yield f"{report.file}: {said or 'nothing to say'}"


def _source(value: Effective) -> str:
    return {"default": f"default of {value.where}", "derived": f"derived: {value.where}"}.get(value.source, value.where)


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
        tree["effective"] = [value.to_dict() for value in report.effective()]
    return json.dumps(tree, indent=2, ensure_ascii=False, default=str)
