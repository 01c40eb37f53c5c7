"""Every one-character slip in every known key, at every depth: always an error, and nearly always with the key that was
meant.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from chatgot.deepspeed_json import schema
from chatgot.deepspeed_json.findings import meant, one_slip_apart
from chatgot.deepspeed_json.read import Document
from chatgot.deepspeed_json.resolve import resolve
from chatgot.deepspeed_json.schema import Section
from chatgot.deepspeed_json.settings import ChatGoTSection, Settings, keys_of, nested_class
from tests.deepspeed_json.conftest import GPU, with_keys

ALPHABET = "e_7S"
"""A letter that is common in keys, the separator, a digit and a capital."""
WANTED = 0.98


def slips(word: str) -> set[str]:
    """Every deletion, swap, replacement and insertion of one character."""
    found = {word[:i] + word[i + 1 :] for i in range(len(word))}
    found |= {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(len(word) - 1)}
    found |= {word[:i] + letter + word[i + 1 :] for i in range(len(word)) for letter in ALPHABET}
    found |= {word[:i] + letter + word[i:] for i in range(len(word) + 1) for letter in ALPHABET}
    return found - {word}


def chatgot_sections(
    cls: type[Settings] = ChatGoTSection, where: str = "chatgot"
) -> Iterator[tuple[str, list[str], dict[str, Any]]]:
    fields = keys_of(cls)
    yield where, list(fields), {}
    for key, field in fields.items():
        nested = nested_class(field)
        if nested is not None:
            yield from chatgot_sections(nested, f"{where}.{key}")


def argument_sections() -> Iterator[tuple[str, list[str], dict[str, Any]]]:
    """Optimizers and schedulers with the configuration in which each takes its arguments."""
    offload = {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}
    for entry, arguments in schema.OPTIMIZER_PARAMS.items():
        kind = {"adam/fused": "AdamW", "adam/cpu": "Adam", "adam/torch": "AdamW"}.get(
            entry, entry.removeprefix("torch.").partition("/")[0]
        )
        params = {"torch_adam": True} if entry == "adam/torch" else {}
        changes = {"optimizer": {"type": kind, "params": params}, "zero_allow_untested_optimizer": True}
        yield "optimizer.params", list(arguments), changes | (offload if entry.endswith("/cpu") else {})
    for kind, arguments in schema.SCHEDULER_PARAMS.items():
        yield "scheduler.params", list(arguments), {"scheduler": {"type": kind, "params": {}}}


def sections() -> Iterator[tuple[str, list[str], dict[str, Any]]]:
    """Dotted name of every section, the spellings it knows, and what the configuration needs besides."""
    for dotted, node in {"": schema.ROOT, **schema.NODES}.items():
        if (
            isinstance(node, Section)
            and dotted not in ("optimizer.params", "scheduler.params", "chatgot")
            and node.keys
        ):
            yield dotted, list(schema.spellings(node)), {}
    yield from argument_sections()
    yield from chatgot_sections()


def judged(dotted: str, known: list[str], needs: dict[str, Any]) -> Iterator[tuple[str, str, str | None]]:
    """(key meant, slip, suggestion; None where no error was found) for every slip of every key of a section."""
    for key in known:
        wrong = {slip for slip in slips(key) if slip not in known}
        tree = with_keys(needs)
        here = tree
        for section in filter(None, dotted.split(".")):
            here = here.setdefault(section, {})
        here.update(dict.fromkeys(wrong, 1))
        found = resolve(Document(tree), world_size=1, facts=GPU).findings.at_level("error")
        prefix = f"{dotted}." if dotted else ""
        suggestions = {
            finding.key: finding.suggestion
            for finding in found
            if finding.value == 1 and "." not in finding.key[len(prefix) :]
        }
        for slip in sorted(wrong):
            yield key, slip, suggestions.get(prefix + slip)


def test_every_slip_is_flagged_and_nearly_every_suggestion_is_right() -> None:
    total, missed, misled = 0, [], []
    for dotted, known, needs in sections():
        node = schema.NODES.get(dotted, schema.ROOT)
        same = schema.spellings(node) if isinstance(node, Section) else {}
        for key, slip, suggestion in judged(dotted, known, needs):
            total += 1
            if suggestion is None:
                missed.append(f"{dotted}.{slip}")
            elif suggestion != key and same.get(suggestion, suggestion) != same.get(key, key):
                misled.append(f"{dotted}.{slip}: {suggestion}, not {key}")
    right = 1 - len(misled) / total
    said = f"{total} slips, {len(missed)} missed, {right:.2%} of the suggestions right; {missed[:10]} {misled[:20]}"
    assert total > 75_000, said
    assert missed == [], said
    assert right >= WANTED, said


@pytest.mark.parametrize(
    ("one", "other", "near"),
    [
        ("lr", "l", True),
        ("lr", "rl", True),
        ("lr", "xlr", True),
        ("lr", "lx", True),
        ("lr", "lr", True),
        ("d", "x", True),
        ("d", "", True),
        ("aab", "abb", True),
        ("abc", "cba", False),
        ("lr", "xlrx", False),
        ("abcd", "badc", False),
        ("ab", "cd", False),
    ],
)
def test_one_slip_apart(one: str, other: str, near: bool) -> None:
    assert one_slip_apart(one, other) is near
    assert one_slip_apart(other, one) is near


def test_nothing_is_suggested_for_a_word_like_no_other() -> None:
    assert meant("quux", ["stage", "enabled"]) == ""
    assert meant(3, ["stage"]) == ""
    assert meant("OVERLAP_COM", ["overlap_comm", "stage"]) == "overlap_comm"


def test_key_of_another_section_is_sent_home_but_a_slip_is_believed_first() -> None:
    tree = with_keys({"cpu_checkpointing": True, "fp15": {"enabled": False}})
    found = {f.key: f.suggestion for f in resolve(Document(tree), world_size=1, facts=GPU).findings.at_level("error")}
    assert found == {"cpu_checkpointing": "activation_checkpointing.cpu_checkpointing", "fp15": "fp16"}
