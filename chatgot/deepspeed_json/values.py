"""Hold the file's tree against the schema: what is unknown or mistyped is a finding, what is known becomes a value, and
what nothing reads is said.
"""

from __future__ import annotations

import difflib
import re
from functools import reduce
from typing import Any

from chatgot.deepspeed_json import schema
from chatgot.deepspeed_json.findings import ABSENT, Findings, Level, meant, one_slip_apart, shown
from chatgot.deepspeed_json.schema import Key, Section
from chatgot.deepspeed_json.settings import ChatGoTSection, dotted_keys

_COMMENT = re.compile(r"_|//|#|\$|comments?$")
"""How a key begins that nobody reads."""
_IS_COMMENT = "a comment: DeepSpeed ignores it, and so does ChatGoT"
_OTHER_NAMES = {
    "clip_grad": "gradient_clipping",
    "gradient_checkpointing": "activation_checkpointing",
    "learning_rate": "optimizer.params.lr",
    "max_grad_norm": "gradient_clipping",
    "micro_batch_size": "train_micro_batch_size_per_gpu",
    "mixed_precision": "bf16",
    "zero_stage": "zero_optimization.stage",
}
"""What other programs call keys that stand here."""
_SHORT = 4
"""Letters of a name that is too short for a slip of it to be told from another word, in another section."""
_LIKENESS = 0.85
"""difflib's ratio from which on a key is taken for one of another section."""


class Values(schema.Root):
    """The values that DeepSpeed will see, as attributes: what the file states, and the defaults of the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.given: dict[str, Any] = {}
        """Documented dotted name -> value read; sections stand here as True."""
        self.spelled: dict[str, str] = {}
        """Documented dotted name -> the name in the file."""
        self.autos: list[str] = []
        """Documented dotted names of keys that are "auto" and have their default: DeepSpeed drops such a key."""
        self.ignored: list[tuple[str, ...]] = []
        """The path of every key that DeepSpeed and ChatGoT ignore, as the file spells it."""

    def __getitem__(self, dotted: str) -> Any:
        """A value by its dotted name, for rules that are data; None for a section."""
        if isinstance(schema.NODES[dotted], Section):
            return self.given.get(dotted)
        return reduce(getattr, dotted.split("."), self)

    def __setitem__(self, dotted: str, value: Any) -> None:
        self.given[dotted] = value
        if isinstance(schema.NODES[dotted], Key):
            *sections, name = dotted.split(".")
            setattr(reduce(getattr, sections, self), name, value)

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
    _read_section(tree, schema.ROOT, (), "", findings, values)
    return values


def _read_section(
    tree: dict[str, Any], section: Section, spelled: tuple[str, ...], dotted: str, findings: Findings, values: Values
) -> None:
    known = schema.spellings(section)
    for key, value in tree.items():
        place = ".".join((*spelled, key))
        if key not in known:
            if not section.open or any(one_slip_apart(key.lower(), name) for name in known):
                level = _note_unknown(key, place, value, section, dotted, findings)
                values.ignored += [(*spelled, key)] if level != "error" else []
            continue
        name, node = dotted + known[key], section.keys[known[key]]
        if name in values:
            other = values.spelled[name]
            findings.error(place, value, f"is another spelling of {other}, which stands here too; keep one of them")
            continue
        values.spelled[name] = place
        dropped = value == "auto" and (section.typed or name == "gradient_clipping")  # transformers fills the latter
        if isinstance(node, Section) and not dropped:
            _read_subsection(value, node, (*spelled, key), name, findings, values)
        elif value == "auto" and isinstance(node, Key) and (node.auto or node.default == "auto"):
            values[name] = "auto"
        elif dropped or isinstance(node, Section):
            values.autos.append(name)
        else:
            try:
                values[name] = node.read(value, section.typed)
            except (ValueError, OverflowError):
                note_wrong(place, value, node, section.typed, findings)
    for key, node in section.keys.items():
        if isinstance(node, Key) and node.required and dotted + key not in values.spelled:
            findings.error(".".join((*spelled, key)), ABSENT, f"must be given: {node.help or node.allowed()}")


def _read_subsection(
    value: Any, node: Section, spelled: tuple[str, ...], name: str, findings: Findings, values: Values
) -> None:
    if isinstance(value, dict):
        values[name] = True
        _read_section(value, node, spelled, name + ".", findings, values)
    elif isinstance(value, bool) and value in node.bare:
        if name == "zero_optimization":  # the form of 2020; runtime/zero/config.py, read_zero_config_deprecated
            values[name] = True
            values[f"{name}.stage"] = int(value)
    elif not (value is None and node.null):
        allowed = "a section {...}" + (" or null" if node.null else "")
        findings.error(".".join(spelled), value, _consequence(node.typed), allowed=allowed)


def note_wrong(place: str, value: Any, node: Key, typed: bool, findings: Findings) -> None:
    """Note a value of the wrong type, out of range, or none of the choices."""
    auto = value == "auto"
    why = '"auto" is not resolved here, write a value or leave the key out' if auto else _consequence(typed)
    suggestion = "" if auto else meant(value, map(str, node.choices))
    findings.error(place, value, why, allowed=node.allowed(), suggestion=suggestion)


def _consequence(typed: bool) -> str:
    return (
        "DeepSpeed refuses it" if typed else "DeepSpeed takes it as it stands, and fails or means something else later"
    )


def _note_unknown(key: str, place: str, value: Any, section: Section, dotted: str, findings: Findings) -> Level:
    """Note a key that the section does not have, and return how bad that is."""
    if removed := schema.REMOVED.get(dotted + key):
        findings.error(place, value, removed)
        return "error"
    known = schema.spellings(section)
    is_comment = _COMMENT.match(key) is not None
    homes = _homes(key, list(known), is_comment)
    if homes or section.typed or findings.from_override(place):
        why = f"unknown key, DeepSpeed would {'refuse' if section.typed else 'ignore'} it"
        if is_comment and not homes:
            why += "; comments may stand at the top level"
        elif len(homes) > 1:
            why += f"; it belongs at {' or '.join(homes[:3])}{' or elsewhere' if len(homes) > 3 else ''}"
        elif homes and homes[0] in schema.RUN_KEYS:
            why += "; the run YAML (--config) has it"
        allowed, suggestion = ("", "") if len(homes) > 1 else ("one of " + ", ".join(known), "".join(homes))
        findings.error(place, value, why, allowed=allowed, suggestion=suggestion)
        return "error"
    if is_comment:
        findings.add("note", place, value, _IS_COMMENT)
        return "note"
    findings.add("warning", place, value, "no key of DeepSpeed, which ignores it, and so does ChatGoT")
    return "warning"


def without_comments(section: Any, where: str, findings: Findings) -> Any:
    """A section that DeepSpeed never sees without the comments in it, each of which is noted."""
    if not isinstance(section, dict):
        return section
    placed = (dotted.rpartition(".") for dotted in dotted_keys(ChatGoTSection, "chatgot."))
    names = [name for around, _, name in placed if around == where]
    kept = {}
    for key, value in section.items():
        if _COMMENT.match(str(key)) and not any(one_slip_apart(key.lower().lstrip("_"), name) for name in names):
            findings.add("note", f"{where}.{key}", value, _IS_COMMENT)
        else:
            kept[key] = without_comments(value, f"{where}.{key}", findings)
    return kept


def _homes(key: str, known: list[str], is_comment: bool) -> list[str]:
    """What a key is likely to be a slip of: one of the known keys around it, else one that stands elsewhere; several
    where its name stands in several sections.
    """
    word = key.lower()
    if is_comment:
        word = word.lstrip("_")
        near = any(one_slip_apart(name, spelled) for name in (key.lower(), word) for spelled in map(str.lower, known))
        homes = [name for name in schema.homes().get(word, ()) if name not in schema.RUN_KEYS]
        return [meant(word, known)] if near else homes if len(homes) == 1 else []
    if any(one_slip_apart(word, name.lower()) for name in known):
        return [meant(key, known)]
    if exact := [_OTHER_NAMES[word]] if word in _OTHER_NAMES else schema.homes().get(word):
        return exact
    if near := meant(key, known):
        return [near]
    long = [name for name in schema.homes() if min(len(name), len(word)) > _SHORT]
    close = [name for name in long if one_slip_apart(word, name)]
    close = close or difflib.get_close_matches(word, long, n=1, cutoff=_LIKENESS)
    return schema.homes()[close[0]] if close else []


def is_off(values: Values, section: str) -> bool:
    """Whether a section does nothing because its switch is off, or because it stands nowhere and has no switch."""
    if section in schema.NEVER_SECTIONS or (section in schema.ON_WHEN_GIVEN and section not in values):
        return True
    switch = schema.section_switch(section)
    return switch is not None and values[switch] in (None, False, 0, "none")


def idle(values: Values, dotted: str) -> str:
    """Why a key that is given does nothing here, or an empty text. Switches are the business of its section."""
    if dotted in schema.NEVER:
        return schema.NEVER[dotted]
    stage = values.zero_optimization.stage
    if dotted in schema.STAGES and stage not in schema.STAGES[dotted]:
        return f"read at ZeRO {schema.stages_in_words(schema.STAGES[dotted])} only, and the stage is {stage}"
    if dotted in schema.NEEDS:
        other, wanted = schema.NEEDS[dotted]
        if not any(values[name] in wanted for name in other.split(" or ")):
            return f"read only when {other} is {' or '.join(map(shown, wanted))}"
    return ""


def note_idle(values: Values, findings: Findings) -> None:
    """Note sections that are off, keys that nothing reads, and deprecated ones. A stated default harms nobody."""
    off: dict[str, list[str]] = {}
    for dotted in values.given:
        node, value = schema.NODES[dotted], values[dotted]
        section, name = dotted.rpartition(".")[0], values.name(dotted)
        if isinstance(node, Section):
            switch = schema.section_switch(dotted)
            if dotted in schema.NEVER_SECTIONS:
                findings.add("note", name, "{...}", f"does nothing: {schema.NEVER_SECTIONS[dotted]}")
            elif switch and switch not in values and switch not in values.spelled and values[switch] in (None, False):
                why = f"stands here but is off: {switch.rpartition('.')[2]} is not given"
                findings.add("note", name, value, why)
            continue
        if node.instead and value and dotted not in schema.NEVER:
            findings.add("note", name, value, f"is deprecated: write {node.instead}")
        if value in (node.default, "auto"):
            continue
        if section and is_off(values, section) and dotted != schema.section_switch(section):
            off.setdefault(section, []).append(dotted)
        elif reason := idle(values, dotted):
            level: Level = "warning" if dotted in schema.STAGES or dotted in schema.NEVER else "note"
            findings.add(level, name, value, f"does nothing: {reason}")
    for section, keys in off.items():
        switch = schema.section_switch(section) or section
        names = ", ".join(key.rpartition(".")[2] for key in keys)
        why = f"does nothing ({names}): the section is off, {values.name(switch)} = {shown(values[switch])}"
        findings.add("note", values.name(keys[0]), values[keys[0]], why)
    zero = "zero_optimization"
    if zero in values and f"{zero}.stage" in values and f"{zero}.stage" not in values.spelled:
        findings.add("note", zero, bool(values[f"{zero}.stage"]), 'is deprecated: write {"stage": 1} or {"stage": 0}')


def apply_overrides(tree: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Put overrides into the JSON's tree, under the spelling that the file uses; null takes a section out."""
    for dotted, value in overrides.items():
        section: Section | None = schema.ROOT
        here = tree
        *parents, last = dotted.split(".")
        for parent in parents:
            name, node = _spelling(parent, here, section)
            if not isinstance(here.get(name), dict):
                here[name] = {}
            here, section = here[name], node if isinstance(node, Section) else None
        name, node = _spelling(last, here, section)
        if value is None and isinstance(node, Section):
            here.pop(name, None)
        else:
            here[name] = value
    return tree


def _spelling(name: str, here: dict[str, Any], section: Section | None) -> tuple[str, Key | Section | None]:
    """How the file spells a key, and its node."""
    if section is None:
        return name, None
    documented = schema.spellings(section).get(name, name)
    node = section.keys.get(documented)
    if node is not None and name not in here:
        name = next((other for other in (documented, node.alias) if other and other in here), name)
    return name, node
