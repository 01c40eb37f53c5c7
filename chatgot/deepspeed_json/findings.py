"""What is to be said about a configuration: errors, warnings and notes, each with its place, what is allowed and what
to do.

The rules (deepspeed_values, deepspeed_checks, deepspeed_remarks, batch) put findings into a collector; train.py refuses
on errors and prints the rest, `chatgot check` lists them all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from chatgot.deepspeed_json.relaxed_json import Mark
from chatgot.devices import DeviceFacts
from chatgot.errors import ConfigError

Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note")

ABSENT: Any = object()
"""Value of a finding about a key that stands nowhere."""
_LONG = 200
"""A list of what is allowed that is longer (characters) stays out of messages that have a suggestion."""


@dataclass(frozen=True)
class Finding:
    """One thing to say about one key."""

    level: Level
    file: str
    """The file; 'override' for a value from the command line."""
    line: int | None
    column: int | None
    key: str
    """Dotted, as the file spells it; empty: about the file as a whole."""
    value: Any
    """As given; ABSENT when the key stands nowhere."""
    why: str
    """What is wrong or unwise, why it matters, what to do."""
    allowed: str = ""
    suggestion: str = ""
    """The key or value that was probably meant."""
    excerpt: str = ""
    """The line of the file with a caret under the spot."""

    @property
    def place(self) -> str:
        """'file:line', or 'override'."""
        return self.file if self.line is None else f"{self.file}:{self.line}"

    @property
    def subject(self) -> str:
        """'key = value', as it stands."""
        name = f"ds.{self.key}" if self.file == OVERRIDE and self.key else self.key
        return name if self.value is ABSENT else f"{name} = {shown(self.value)}"

    @property
    def hint(self) -> str:
        """The suggestion as a question; a key of the same name elsewhere is a move."""
        if not self.suggestion:
            return ""
        moved = "." in self.suggestion and self.suggestion.rpartition(".")[2] == self.key.rpartition(".")[2]
        return f"it belongs at {self.suggestion}" if moved else f"did you mean '{self.suggestion}'?"

    @property
    def sentences(self) -> list[str]:
        """Why, what is allowed unless the list is long and a suggestion says enough, what was meant."""
        allowed = (
            "" if not self.allowed or (self.suggestion and len(self.allowed) > _LONG) else f"expected {self.allowed}"
        )
        return [part for part in (self.why, allowed, self.hint) if part]

    @property
    def message(self) -> str:
        """All of it in one line."""
        return "; ".join(self.sentences)

    @property
    def text(self) -> str:
        """One line: place: key = value: message; the excerpt of a syntax error follows it."""
        if self.excerpt:
            return f"{self.place}:{self.column}: {self.message}\n{self.excerpt}"
        between = " " if self.file == OVERRIDE else ": "
        return f"{self.place}{between}{self.subject}: {self.message}" if self.key else f"{self.place}: {self.message}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for --format json; null where something is unknown."""
        return {
            "level": self.level,
            "file": self.file,
            "line": self.line,
            "column": self.column,
            "key": self.key or None,
            "value": None if self.value is ABSENT else self.value,
            "given": self.value is not ABSENT,
            "allowed": self.allowed or None,
            "suggestion": self.suggestion or None,
            "why": self.why,
            "message": self.message,
        }


OVERRIDE = "override"


class ConfigRefusal(ConfigError):
    """A configuration with errors; the message has one line per error."""

    def __init__(self, findings: list[Finding]) -> None:
        super().__init__("\n".join(dict.fromkeys(finding.text for finding in findings)))
        self.findings = tuple(findings)


@dataclass
class Findings:
    """Collects what the rules say about one file and its overrides."""

    file: str
    overridden: frozenset[str] = frozenset()
    """Dotted names that came from the command line."""
    marks: Mapping[str, Mark] = field(default_factory=dict)
    """Where each key stands in the file; empty when the tree came from elsewhere."""
    all: list[Finding] = field(default_factory=list)

    def error(self, key: str, value: Any, why: str, **more: str) -> None:
        """A finding that forbids to start; `more` is allowed or suggestion."""
        self._add("error", key, value, why, more)

    def warning(self, key: str, value: Any, why: str, **more: str) -> None:
        """A finding about something legal that is wrong or unwise."""
        self._add("warning", key, value, why, more)

    def note(self, key: str, value: Any, why: str, **more: str) -> None:
        """A finding that is good to know."""
        self._add("note", key, value, why, more)

    def device(self, facts: DeviceFacts, key: str, value: Any, why: str) -> None:
        """Something that this device cannot do: an error for the run itself, a warning from a machine that may not be
        the one.
        """
        if facts.certain:
            self.error(key, value, why)
        else:
            self.warning(key, value, f"{why} (seen from this machine; --device says what the run will have)")

    def missing(self, key: str, why: str) -> None:
        """An error about a key that should stand there and does not."""
        self._add("error", key, ABSENT, why, {})

    def _add(self, level: Level, key: str, value: Any, why: str, more: dict[str, str]) -> None:
        if self.from_override(key):
            finding = Finding(level, OVERRIDE, None, None, key, value, why, **more)
        else:
            mark = self.mark(key)
            finding = Finding(level, self.file, mark and mark.line, mark and mark.column, key, value, why, **more)
        if finding not in self.all:
            self.all.append(finding)

    def from_override(self, key: str) -> bool:
        """Whether the key, or a section around it, came from the command line."""
        return any(key == name or key.startswith(name + ".") for name in self.overridden)

    def mark(self, key: str) -> Mark | None:
        """Where a key stands; that of the nearest section around it when it is absent."""
        while key and key not in self.marks:
            key = key.rpartition(".")[0]
        return self.marks.get(key)

    def at_level(self, *levels: Level) -> list[Finding]:
        """The findings of these levels, in the order in which they were found."""
        return [finding for finding in self.all if finding.level in levels]

    def refuse(self) -> None:
        """Raise one ConfigRefusal with all errors, if there are any."""
        if errors := self.at_level("error"):
            raise ConfigRefusal(errors)


def shown(value: Any) -> str:
    """A value as it stands in a JSON, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
