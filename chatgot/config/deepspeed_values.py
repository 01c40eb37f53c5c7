"""The file's tree held against the schema: what is unknown or mistyped is a problem, what is known can be asked for by its dotted name."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from chatgot.config import deepspeed_schema as schema
from chatgot.config.deepspeed_schema import Key, Section
from chatgot.config.errors import ConfigError


@dataclass
class Problems:
    """All that is wrong with a configuration, each line with its place."""

    file: str
    overridden: frozenset[str] = frozenset()
    """Dotted names that came from the command line."""
    lines: list[str] = field(default_factory=list)

    def place(self, dotted: str) -> str:
        """Where a key stands: 'file: key', or 'override ds.key'."""
        if any(dotted == name or dotted.startswith(name + ".") for name in self.overridden):
            return f"override ds.{dotted}"
        return f"{self.file}: {dotted}"

    def add(self, dotted: str, value: Any, message: str) -> None:
        """One problem: place = value: message."""
        self.lines.append(f"{self.place(dotted)} = {shown(value)}: {message}")

    def missing(self, dotted: str, message: str) -> None:
        """A key that should stand there and does not."""
        self.lines.append(f"{self.file}: {dotted}: {message}")

    def refuse(self) -> None:
        """Raise one ConfigError with all problems, if there are any."""
        if self.lines:
            raise ConfigError("\n".join(dict.fromkeys(self.lines)))


@dataclass
class Values:
    """What the file states, as DeepSpeed will understand it."""

    given: dict[str, Any] = field(default_factory=dict)
    """Documented dotted name -> value read; sections stand here as True."""
    spelled: dict[str, str] = field(default_factory=dict)
    """Documented dotted name -> the name in the file."""

    def __getitem__(self, dotted: str) -> Any:
        if dotted in self.given:
            return self.given[dotted]
        node = schema.NODES[dotted]
        return node.default if isinstance(node, Key) else None

    def __contains__(self, dotted: str) -> bool:
        return dotted in self.given

    def name(self, dotted: str) -> str:
        """The spelling in the file, or the one that fits the file's spelling of the section around it."""
        if dotted in self.spelled or "." not in dotted:
            return self.spelled.get(dotted, dotted)
        section, _, key = dotted.rpartition(".")
        return f"{self.name(section)}.{key}"


def shown(value: Any) -> str:
    """A value as it stands in a JSON, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def read_values(tree: dict[str, Any], problems: Problems) -> Values:
    """Hold a tree against the whole schema and note every problem."""
    values = Values()
    _read_section(tree, schema.ROOT, "", "", problems, values)
    return values


def _read_section(tree: dict, section: Section, spelled: str, dotted: str, problems: Problems, values: Values) -> None:
    known = schema.spellings(section)
    for key, value in tree.items():
        place = f"{spelled}{key}"
        if key not in known:
            if not section.open:
                problems.add(place, value, _unknown(key, dotted, known))
            continue
        name = dotted + known[key]
        node = section.keys[known[key]]
        if name in values.given:
            problems.add(place, value, f"is another spelling of {values.spelled[name]}, which stands here too; keep one of them")
            continue
        values.spelled[name] = place
        if isinstance(node, Section):
            _read_subsection(value, node, place, name, problems, values)
        else:
            _read_key(value, node, section.typed, place, name, problems, values)
    for name, node in section.keys.items():
        if isinstance(node, Key) and node.required and dotted + name not in values.given and dotted + name not in values.spelled:
            problems.missing(f"{spelled}{name}", f"must be given: {node.help or node.allowed()}")


def _read_subsection(value: Any, node: Section, place: str, name: str, problems: Problems, values: Values) -> None:
    if isinstance(value, dict):
        values.given[name] = True
        _read_section(value, node, place + ".", name + ".", problems, values)
    elif isinstance(value, bool) and value in node.bare:
        if name == "zero_optimization":  # the form of 2020; runtime/zero/config.py, read_zero_config_deprecated
            values.given[name] = True
            values.given[f"{name}.stage"] = int(value)
    elif not (value is None and node.null):
        allowed = "a section {...}" + (" or null" if node.null else "")
        problems.add(place, value, f"expected {allowed}")


def _read_key(value: Any, node: Key, typed: bool, place: str, name: str, problems: Problems, values: Values) -> None:
    if value == "auto" and node.auto:
        values.given[name] = "auto"
        return
    if value == "auto" and node.kind in ("texts", "text") and node.default == "auto":
        values.given[name] = "auto"
        return
    try:
        values.given[name] = node.read(value, typed)
    except (ValueError, OverflowError):
        problems.add(place, value, _expected(node, value))


def _expected(node: Key, value: Any) -> str:
    note = '; "auto" is not resolved here, write a value or leave the key out' if value == "auto" else ""
    return f"expected {node.allowed()}{note}{nearest(value, map(str, node.choices))}"


def nearest(word: Any, known: Iterable[str]) -> str:
    """'; did you mean 'x'?', upper and lower case counting as equal."""
    if not isinstance(word, str):
        return ""
    folded = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), folded, n=1, cutoff=0.6)
    return f"; did you mean '{folded[close[0]]}'?" if close else ""


def _unknown(key: str, dotted: str, known: dict[str, str]) -> str:
    removed = schema.REMOVED.get(dotted + key)
    if removed:
        return removed
    homes = [name for name in schema.NODES if name.rpartition(".")[2] == key]
    hint = f"; it belongs at {homes[0]}" if len(homes) == 1 else nearest(key, known)
    return "unknown key, DeepSpeed would ignore it" + (hint or (f" (known here: {', '.join(known)})" if len(known) <= 12 else ""))


def read_arguments(params: dict, known: dict[str, Key], owner: str, where: str, problems: Problems, elsewhere: dict[str, str]) -> None:
    """Check the arguments of an optimizer or scheduler.

    Args:
        params: the arguments as given.
        known: the arguments that it takes.
        owner: its name in messages.
        where: dotted name of the arguments' section.
        problems: what is wrong is added here.
        elsewhere: argument -> what makes the argument known.
    """
    for key, value in params.items():
        if key not in known:
            hint = elsewhere.get(key, "") or nearest(key, known)
            problems.add(f"{where}.{key}", value, f"{owner} has no such argument (it takes {', '.join(known)}){hint}")
            continue
        try:
            known[key].read(value, False)
        except (ValueError, OverflowError):
            problems.add(f"{where}.{key}", value, _expected(known[key], value))
    for key, node in known.items():
        if node.required and key not in params:
            problems.missing(f"{where}.{key}", f"must be given for {owner}: {node.allowed()}")
