"""The file's tree held against the schema: what is unknown or mistyped is a problem, what is known can be asked for by
its dotted name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from chatgot.deepspeed_json import schema
from chatgot.deepspeed_json.findings import Findings
from chatgot.deepspeed_json.schema import Key, Section
from chatgot.deepspeed_json.suggestions import meant, one_slip_apart


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


def read_values(tree: dict[str, Any], findings: Findings) -> Values:
    """Hold a tree against the whole schema and note every problem."""
    values = Values()
    _read_section(tree, schema.ROOT, "", "", findings, values)
    return values


def _read_section(tree: dict, section: Section, spelled: str, dotted: str, findings: Findings, values: Values) -> None:
    known = schema.spellings(section)
    for key, value in tree.items():
        place = f"{spelled}{key}"
        if key not in known:
            if not section.open or any(one_slip_apart(key.lower(), name) for name in known):
                _unknown(key, place, value, dotted, known, findings)
            continue
        name = dotted + known[key]
        node = section.keys[known[key]]
        if name in values.given:
            findings.error(
                place, value, f"is another spelling of {values.spelled[name]}, which stands here too; keep one of them"
            )
            continue
        values.spelled[name] = place
        if isinstance(node, Section):
            _read_subsection(value, node, place, name, findings, values)
        else:
            _read_key(value, node, section.typed, place, name, findings, values)
    for name, node in section.keys.items():
        if (
            isinstance(node, Key)
            and node.required
            and dotted + name not in values.given
            and dotted + name not in values.spelled
        ):
            findings.missing(f"{spelled}{name}", f"must be given: {node.help or node.allowed()}")


def _read_subsection(value: Any, node: Section, place: str, name: str, findings: Findings, values: Values) -> None:
    if isinstance(value, dict):
        values.given[name] = True
        _read_section(value, node, place + ".", name + ".", findings, values)
    elif isinstance(value, bool) and value in node.bare:
        if name == "zero_optimization":  # the form of 2020; runtime/zero/config.py, read_zero_config_deprecated
            values.given[name] = True
            values.given[f"{name}.stage"] = int(value)
    elif not (value is None and node.null):
        findings.error(
            place, value, _consequence(node.typed), allowed="a section {...}" + (" or null" if node.null else "")
        )


def _read_key(value: Any, node: Key, typed: bool, place: str, name: str, findings: Findings, values: Values) -> None:
    if value == "auto" and node.auto:
        values.given[name] = "auto"
        return
    if value == "auto" and node.kind in ("texts", "text") and node.default == "auto":
        values.given[name] = "auto"
        return
    try:
        values.given[name] = node.read(value, typed)
    except (ValueError, OverflowError):
        _wrong(place, value, node, typed, findings)


def _wrong(place: str, value: Any, node: Key, typed: bool, findings: Findings) -> None:
    """A value of the wrong type, out of range, or none of the choices."""
    auto = value == "auto"
    why = '"auto" is not resolved here, write a value or leave the key out' if auto else _consequence(typed)
    suggestion = "" if auto else meant(value, map(str, node.choices))
    findings.error(place, value, why, allowed=node.allowed(), suggestion=suggestion)


def _consequence(typed: bool) -> str:
    return (
        "DeepSpeed refuses it" if typed else "DeepSpeed takes it as it stands, and fails or means something else later"
    )


def _unknown(key: str, place: str, value: Any, dotted: str, known: dict[str, str], findings: Findings) -> None:
    removed = schema.REMOVED.get(dotted + key)
    if removed:
        findings.error(place, value, removed)
        return
    homes = [name for name in schema.NODES if name.rpartition(".")[2] == key]
    section = schema.NODES[dotted[:-1]] if dotted else schema.ROOT
    typed = isinstance(section, Section) and section.typed
    findings.error(
        place,
        value,
        f"unknown key, DeepSpeed would {'refuse' if typed else 'ignore'} it",
        allowed="one of " + ", ".join(known),
        suggestion=homes[0] if len(homes) == 1 else meant(key, known),
    )


def read_arguments(
    params: dict, known: dict[str, Key], owner: str, where: str, findings: Findings, elsewhere: dict[str, str]
) -> None:
    """Check the arguments of an optimizer or scheduler.

    Args:
        params: the arguments as given.
        known: the arguments that it takes.
        owner: its name in messages.
        where: dotted name of the arguments' section.
        findings: what is wrong is added here.
        elsewhere: argument -> what makes the argument known.
    """
    for key, value in params.items():
        if key not in known:
            advice = elsewhere.get(key, "")
            why = f"{owner} has no such argument, and its constructor fails" + (f"; {advice}" if advice else "")
            suggestion = "lr" if key == "learning_rate" else "" if advice else meant(key, known)
            findings.error(f"{where}.{key}", value, why, allowed="one of " + ", ".join(known), suggestion=suggestion)
            continue
        try:
            known[key].read(value, False)
        except (ValueError, OverflowError):
            _wrong(f"{where}.{key}", value, known[key], False, findings)
    for key, node in known.items():
        if node.required and key not in params:
            findings.missing(f"{where}.{key}", f"must be given for {owner}: {node.allowed()}")
