"""`chatgot check --explain KEY`: what a key does, its default and what it may hold, what it interacts with; `--rules`:
what becomes of a stock JSON.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import replace

from chatgot.deepspeed_json import rules, schema
from chatgot.deepspeed_json.adapt import ADAPTED
from chatgot.deepspeed_json.findings import around, meant, shown
from chatgot.deepspeed_json.optimizers import REFUSED_OPTIMIZERS, REFUSED_SCHEDULERS
from chatgot.deepspeed_json.rule_types import adapted
from chatgot.deepspeed_json.schema import (
    NEEDS,
    NEVER,
    NEVER_SECTIONS,
    STAGES,
    Key,
    Section,
    section_switch,
    stages_in_words,
)
from chatgot.deepspeed_json.settings import ChatGoTSection, Settings, described, keys_of, nested_class
from chatgot.errors import ConfigError

_WIDTH = 110
RULES = (*rules.RULES, *(adapted(key, lambda *_: None, why) for key, why in ADAPTED.items()))
"""Every rule that explanations take from; what adapt.py does has no other condition than its own."""


def explain(key: str, run: type[Settings] | None = None) -> str:
    """The explanation of a key, by its dotted name or by its last part where that is unique.

    Args:
        run: the run YAML, whose keys are explained too.

    Raises:
        ConfigError: no such key, with the nearest one, or several with this last part.
    """
    of_run = {} if run is None else _fields(run, "", "It stands in the run YAML (--config).")
    dotted = _find(key, of_run)
    paragraphs = [line for part in of_run.get(dotted) or sentences(dotted) for line in part.splitlines()]
    return "\n".join([dotted, *(textwrap.fill(f"  {one}", _WIDTH, subsequent_indent="    ") for one in paragraphs)])


def verdict_table(with_reasons: bool) -> str:
    """What becomes of a stock JSON, from the rules, as a table in Markdown: passed on, adapted, refused."""
    rows, changed, refused = [("verdict", "keys", "reason"), ("---", "---", "---")], dict[str, list[str]](), {}
    for rule in RULES:
        said = refused if rule.unsupported else changed if rule.level == "adapted" else {}
        said.setdefault(replace(rule, source="").text(), []).extend(rule.keys.split())
    for key, kinds in (("optimizer.type", REFUSED_OPTIMIZERS), ("scheduler.type", REFUSED_SCHEDULERS)):
        for why in dict.fromkeys(kinds.values()):
            refused[why] = [f"{key} = {' or '.join(kind for kind in kinds if kinds[kind] == why)}"]
    changed["where DeepSpeed drops it: its default; anywhere else: as in the shipped JSON of this device"] = ['"auto"']
    refused["removed from DeepSpeed, which refuses it too"] = list(schema.REMOVED)
    idle = [*NEVER, *NEVER_SECTIONS]
    elsewhere = {"chatgot", *idle, *(key for keys in refused.values() for key in keys)}
    passed = [name for name in schema.ROOT.keys if not {name, section_switch(name)} & elsewhere]
    for verdict, said in (
        ("passed on", {"as it stands, but for the keys below; ChatGoT writes `wandb` itself": passed}),
        ("adapted", changed),
        ("no effect", {"passed on, and changes nothing: `--explain` says why": idle}),
        ("refused", refused),
    ):
        said = said if with_reasons else {"": list(dict.fromkeys(key for keys in said.values() for key in keys))}
        rows += [(verdict, ", ".join(f"`{key}`" for key in keys), why) for why, keys in said.items()]
    return "\n".join("| " + " | ".join(row if with_reasons else row[:2]) + " |" for row in rows)


def sentences(dotted: str) -> tuple[str, str, str]:
    """What a key does; its default and what is allowed; what it interacts with, a line for each."""
    owner, _, name = dotted.rpartition(".")
    if owner in schema.ARGUMENTS:
        return _argument(owner, name)
    fields = _fields()
    if dotted in fields:
        return fields[dotted]
    node = schema.NODES[dotted]
    if isinstance(node, Section):
        names = ", ".join(node.keys) or "whatever its reader takes"
        return node.help, f"Keys: {names}.", _relations(dotted)
    does = node.help
    if name == "enabled":
        section = schema.NODES[owner]
        does = f"Turns {owner} on: {section.help[:1].lower()}{section.help[1:]}"
    spelled = f" (also spelled {node.alias})" if node.alias else ""
    return does, f"Default {shown(node.default)}{spelled}; allowed: {node.allowed()}.", _relations(dotted)


def _rules_about(dotted: str) -> Iterator[str]:
    """What the rules say about a key: its own ones, then those of other keys whose message names it."""
    words = {"error": "refused", "adapted": "adapted", "warning": "warned of", "note": "noted"}
    own = [rule for rule in RULES if dotted in rule.keys.split()]
    yield from (f"May be {words[rule.level]}: {rule.text()}." for rule in own)
    for rule in RULES:
        if rule not in own and any(word.strip("();,:") == dotted for word in rule.text().split()):
            yield f"See {rule.keys.split()[0]}: {rule.text()}."


def _relations(dotted: str) -> str:
    """What the tables of rules and of reach say about a key, else what its section says."""
    said, node = [], schema.NODES.get(dotted)
    if isinstance(node, Key) and node.instead:
        said.append(f"It is deprecated: write {node.instead}.")
    if dotted in STAGES:
        said.append(f"DeepSpeed reads it at ZeRO {stages_in_words(STAGES[dotted])} only.")
    if dotted in NEEDS:
        other, values = NEEDS[dotted]
        said.append(f"It is read only when {other} is {' or '.join(map(shown, values))}.")
    if dotted in NEVER:
        said.append(f"It never changes a run of ChatGoT: {NEVER[dotted]}.")
    said += _rules_about(dotted)
    return "\n".join(said) or _inherited(dotted)


def _inherited(dotted: str) -> str:
    """What the section around a key, or its switch, says about it."""
    for section in around(dotted):
        if section in NEVER_SECTIONS:
            return f"It never changes a run of ChatGoT: {NEVER_SECTIONS[section]}."
        if section != dotted and (said := next(_rules_about(section), "")):
            return f"{section}: {said}"
        switch = section_switch(section)
        if switch and switch != dotted:
            return f"It is read only when {switch} is on. {next(_rules_about(switch), '')}".strip()
    return "It stands alone: no other key changes what it does."


def _argument(where: str, name: str) -> tuple[str, str, str]:
    takers = {owner: entry[name] for owner, entry in schema.ARGUMENTS[where].items() if name in entry}
    first = next(iter(takers.values()))
    defaults = dict.fromkeys(shown(key.default) for key in takers.values())
    words = {
        "adam/fused": "DeepSpeed's Adam(W)",
        "adam/cpu": "DeepSpeed's CPU Adam(W)",
        "adam/torch": "Adam(W) with torch_adam",
    }
    owners = (words.get(owner, owner.removeprefix("torch.").partition("/")[0]) for owner in takers)
    names = list(dict.fromkeys(owners))
    required = " It must be given." if all(key.required for key in takers.values()) else ""
    kind = where.partition(".")[0]
    default = f"Default {' or '.join(defaults)}, by the {kind}; allowed: {first.allowed()}.{required}"
    taken = f"Taken by {', '.join(names)}; any other {kind} fails on it."
    return first.help, default, "\n".join([taken, *_rules_about(f"{where}.{name}")])


def _fields(
    cls: type[Settings] = ChatGoTSection, where: str = "chatgot", home: str = "DeepSpeed never sees it."
) -> dict[str, tuple[str, str, str]]:
    """Explain a section of ours, whose fields are described by the text that follows each in the source."""
    explanations: dict[str, tuple[str, str, str]] = {}
    for key, field in keys_of(cls).items():
        dotted = f"{where}.{key}".lstrip(".")
        relation = "\n".join(_rules_about(dotted)) or home
        nested = nested_class(field)
        if nested is not None:
            does = f"{(nested.__doc__ or '').strip()} {field.description or ''}".strip()
            explanations[dotted] = (does, f"Keys: {', '.join(keys_of(nested))}.", relation)
            explanations.update(_fields(nested, dotted, home))
        else:
            allowed = f"Default {shown(field.default)}; allowed: {described(field)}."
            explanations[dotted] = (field.description or "", allowed, relation)
    return explanations


def _find(key: str, more: Iterable[str]) -> str:
    known, key = [*schema.dotted_names(), *more], key.removeprefix("ds.")
    if schema.documented(key) in known:
        return schema.documented(key)
    if key in schema.REMOVED:
        raise ConfigError(f"--explain {key}: {schema.REMOVED[key]}")
    ends = [name for name in known if name.rpartition(".")[2] == key]
    if len(ends) == 1:
        return ends[0]
    if ends:
        raise ConfigError(f"--explain {key}: several keys end like this: {', '.join(ends)}")
    near = meant(key, known) or meant(key, {name.rpartition(".")[2] for name in known})
    raise ConfigError(f"--explain {key}: no such key" + (f"; did you mean '{near}'?" if near else ""))
