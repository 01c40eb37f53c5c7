"""What a rule about a DeepSpeed JSON is, what it looks at, and how it becomes a finding or an explanation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from chatgot.deepspeed_json import schema
from chatgot.deepspeed_json.batch import Batch
from chatgot.deepspeed_json.chatgot_section import ChatGoTSection
from chatgot.deepspeed_json.findings import ABSENT, Findings, Level
from chatgot.deepspeed_json.values import Values, given_arguments, is_offloaded
from chatgot.devices import DeviceFacts

RECOMPUTATION_OF_DEEPSPEED = (
    "partition_activations",
    "contiguous_memory_optimization",
    "cpu_checkpointing",
    "synchronize_checkpoint_boundary",
    "profile",
)
"""Keys of activation_checkpointing that torch.utils.checkpoint cannot honour."""


@dataclass(frozen=True)
class Subject:
    """What the rules look at."""

    v: Values
    tree: dict[str, Any]
    chatgot: ChatGoTSection
    facts: DeviceFacts
    ranks: int
    batch: Batch | None = None
    n_params: int | None = None
    """The model's parameters; None: not known yet."""
    misspelled: frozenset[str] = frozenset()
    """Names that errors suggest: those keys do stand there, misspelled."""

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return self.v.zero_optimization.stage

    @property
    def device(self) -> str:
        """The device in words."""
        return self.facts.name or self.facts.kind

    @property
    def optimizer(self) -> str:
        """The optimizer's type in lower case; empty where it is no text."""
        kind = self.v.optimizer.type
        return kind.lower() if isinstance(kind, str) else ""

    @property
    def arguments(self) -> dict[str, Any]:
        """The optimizer's arguments as given."""
        return given_arguments(self.tree, "optimizer")

    @property
    def offloaded(self) -> bool:
        """Whether the optimizer state lives outside the device."""
        return is_offloaded(self.v)

    @property
    def precision(self) -> str:
        """bf16, fp16 or fp32."""
        return "bf16" if self.v.bf16.enabled else "fp16" if self.v.fp16.enabled else "fp32"

    def needs_deepspeed(self) -> list[str]:
        """What only DeepSpeed's recomputation can do, and the JSON asks for."""
        section = self.v.activation_checkpointing
        return [key for key in RECOMPUTATION_OF_DEEPSPEED if getattr(section, key)]

    def states(self, dotted: str) -> bool:
        """Whether the file, or an override, has a key by this very name."""
        tree: Any = self.tree
        for key in dotted.split("."):
            if not isinstance(tree, dict) or key not in tree:
                return False
            tree = tree[key]
        return True

    def is_unstated(self, dotted: str) -> bool:
        """Whether a key stands nowhere, not even misspelled."""
        return dotted not in self.v.spelled and dotted not in self.v and dotted not in self.misspelled


@dataclass(frozen=True)
class Rule:
    """Something to say about a key when a condition holds."""

    level: Level
    keys: str
    """Dotted names, separated by spaces; the rule is held against each of them."""
    when: Callable[[Subject, Any], Any]
    """The configuration and the key's value -> falsy: nothing to say; a dict fills the message's {names}, and may hold
    another `level` and the `value` to show.
    """
    why: str
    source: str = ""
    """Where it comes from, unless that is plain: a file or an issue of DeepSpeed, or what was measured."""
    absent: bool = False
    """Whether it is about a key that does not stand there."""
    device: bool = False
    """Whether it is about the device: only a warning where this machine may not be the one that runs."""
    late: bool = False
    """Whether the model's size or the batch must be known."""
    unsupported: bool = False
    """Whether ChatGoT cannot honour the key, whatever stands beside it."""

    def text(self) -> str:
        """The message with names in angle brackets where values will stand, and its source."""
        plain = self.why.replace("{{}}", "a section").replace("{peak}", "").replace("{waste}", "")
        return plain.replace("{", "<").replace("}", ">") + (f" ({self.source})" if self.source else "")


error, adapted = partial(Rule, "error"), partial(Rule, "adapted")
warning, note = partial(Rule, "warning"), partial(Rule, "note")


def accepts(key: str, why: str, *allowed: Any) -> Rule:
    """A rule about a key that ChatGoT cannot honour: only these values pass; none of a section."""
    if isinstance(schema.NODES[key], schema.Section):
        return error(key, lambda s, _: {"value": "{...}"} if key in s.v else None, why, unsupported=True)
    return error(key, lambda s, value: key in s.v and value not in allowed, why, unsupported=True)


def apply(rules: Iterable[Rule], subject: Subject, findings: Findings, *, late: bool) -> None:
    """Hold the rules against a configuration: those that need its size and batch, or the others."""
    for rule in rules:
        for dotted in rule.keys.split() if rule.late == late else ():
            value, level = _value(subject, dotted), rule.level
            filled = rule.when(subject, value)
            if not filled:
                continue
            known = filled if isinstance(filled, dict) else {}
            why = rule.why.format(**known)
            guessed = rule.device and not subject.facts.certain
            if guessed:
                level, why = "warning", f"{why} (seen from this machine; --device says what the run will have)"
            name = dotted if dotted not in schema.NODES else subject.v.name(dotted)
            shown = ABSENT if rule.absent else known.get("value", value)
            findings.add(known.get("level", level), name, shown, why, guessed)


def rules_about(rules: tuple[Rule, ...], dotted: str) -> Iterator[str]:
    """What the rules say about a key: its own ones, then those of other keys whose message names it."""
    words = {
        "error": "May be refused",
        "adapted": "May be adapted",
        "warning": "May be warned of",
        "note": "May be noted",
    }
    own = [rule for rule in rules if dotted in rule.keys.split()]
    yield from (f"{words[rule.level]}: {rule.text()}." for rule in own)
    for rule in rules:
        if rule not in own and any(word.strip("();,:") == dotted for word in rule.text().split()):
            yield f"See {rule.keys.split()[0]}: {rule.text()}."


def _value(subject: Subject, dotted: str) -> Any:
    if dotted in schema.NODES:
        return subject.v[dotted]
    node: Any = subject.chatgot if dotted.startswith("chatgot.") else None
    for name in dotted.split(".")[1:]:
        node = getattr(node, name, None)
    return node
