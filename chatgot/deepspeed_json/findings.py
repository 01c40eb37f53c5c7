"""What is to be said about a configuration: errors, what is adapted, warnings and notes, each with its place, what is
allowed and what to do.

The rules put findings into a collector; train.py refuses on errors and prints the rest, `chatgot check` lists them all.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from chatgot.errors import ConfigError

Level = Literal["error", "adapted", "warning", "note"]
"""error: it would fail or train wrongly, and is refused. adapted: it runs, differently from the letter. warning: it has
no effect, or is unwise. note: good to know.
"""
LEVELS: tuple[Level, ...] = ("error", "adapted", "warning", "note")

ABSENT: Any = object()
"""Value of a finding about a key that stands nowhere."""
_LONG = 200
"""A list of what is allowed that is longer (characters) stays out of messages that have a suggestion."""


@dataclass(frozen=True)
class Mark:
    """A place in a text, both counted from 1."""

    line: int
    column: int


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
        ours = self.key.partition(".")[0] in ("model", "data", "train")  # sections of the run YAML
        name = f"ds.{self.key}" if self.file == OVERRIDE and not ours else self.key
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
        too_long = self.suggestion and len(self.allowed) > _LONG
        allowed = f"expected {self.allowed}" if self.allowed and not too_long else ""
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
        fields = {name: value for name, value in vars(self).items() if name != "excerpt"}
        for name in ("key", "allowed", "suggestion"):
            fields[name] = fields[name] or None
        given = self.value is not ABSENT
        return {**fields, "value": self.value if given else None, "given": given, "message": self.message}


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
    strict: bool = False
    """Whether every warning is an error, but for those of a machine: ranks on unlike ones must refuse alike."""

    def add(
        self,
        level: Level,
        key: str,
        value: Any,
        why: str,
        *,
        of_machine: bool = False,
        at: Mark | None = None,
        allowed: str = "",
        suggestion: str = "",
    ) -> None:
        """Note something about a key, or of this machine because of it.

        Args:
            of_machine: another machine would not say so, so that no warning is an error.
            at: a place of the file, where it is not the key's.
        """
        if self.strict and level == "warning" and not of_machine:
            level, why = "error", f"{why} (a warning, refused because of --strict)"
        file, mark = (OVERRIDE, None) if at is None and self.from_override(key) else (self.file, at or self.mark(key))
        finding = Finding(
            level, file, mark and mark.line, mark and mark.column, shortened(key, 200), value, why, allowed, suggestion
        )
        if finding not in self.all:
            self.all.append(finding)

    def error(self, key: str, value: Any, why: str, allowed: str = "", suggestion: str = "") -> None:
        """Note what forbids to start."""
        self.add("error", key, value, why, allowed=allowed, suggestion=suggestion)

    def from_override(self, key: str) -> bool:
        """Whether the key, or a section around it, came from the command line."""
        return not self.overridden.isdisjoint(around(key))

    def mark(self, key: str) -> Mark | None:
        """Where a key stands; that of the nearest section around it when it is absent."""
        return next((self.marks[name] for name in around(key) if name in self.marks), None)

    def at_level(self, *levels: Level) -> list[Finding]:
        """The findings of these levels, in the order in which they were found."""
        return [finding for finding in self.all if finding.level in levels]

    def refuse(self) -> None:
        """Raise one ConfigRefusal with all errors, if there are any."""
        if errors := self.at_level("error"):
            raise ConfigRefusal(errors)


def around(dotted: str) -> Iterator[str]:
    """A dotted name, and those of the sections around it, the nearest first."""
    while dotted:
        yield dotted
        dotted = dotted.rpartition(".")[0]


def shown(value: Any) -> str:
    """A value as it stands in a JSON, shortened before it is written: a YAML's aliases can hold each other."""
    return shortened(json.dumps(_outlined(value, 4), ensure_ascii=False, default=str))


def _outlined(value: Any, levels: int) -> Any:
    """Leave out of a value what `shown` would cut off."""
    if isinstance(value, (dict, list, tuple)) and value and not levels:
        return "..."
    if isinstance(value, dict):
        first = list(value.items())[:9]
        return {shortened(str(key)): _outlined(inner, levels - 1) for key, inner in first}
    if isinstance(value, (list, tuple)):
        return [_outlined(inner, levels - 1) for inner in value[:40]]
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 300:
        return f"a number of {value.bit_length()} bits"
    return shortened(value, 200) if isinstance(value, str) else value


def shortened(text: str, to: int = 80) -> str:
    """A text for a message: cut, and `printable`."""
    return printable(text if len(text) <= to else text[: to - 3] + "...")


def printable(text: str) -> str:
    """A text with escapes for the lone surrogates that no terminal and no file takes, as in names that are no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def meant(word: object, known: Iterable[str]) -> str:
    """The nearest known word, or an empty string.

    One slip of the finger (a character too many, too few, another one, or two swapped) is always taken for the word;
    beyond that difflib must see a likeness of 0.6. Upper and lower case count as equal.
    """
    if not isinstance(word, str):
        return ""
    folded = {name.lower(): name for name in known}
    word = word.lower()
    slips = [name for name in folded if one_slip_apart(word, name)]
    if len(slips) > 1:
        slips = [max(slips, key=lambda name: (difflib.SequenceMatcher(None, word, name).ratio(), name))]
    close = slips or difflib.get_close_matches(word, folded, n=1, cutoff=0.6)
    return folded[close[0]] if close else ""


def one_slip_apart(one: str, other: str) -> bool:
    """Whether one insertion, deletion, replacement or swap of neighbours turns one word into the other, or nothing has
    to.
    """
    start = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
    a, b = one[start:], other[start:]
    return a[1:] == b[1:] or a == b[1:] or a[1:] == b or (a[:2] == b[:2][::-1] and a[2:] == b[2:])
