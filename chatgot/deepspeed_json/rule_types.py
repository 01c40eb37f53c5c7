"""What a rule about a DeepSpeed JSON is, what it looks at, and how it becomes a finding."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any, Literal, NamedTuple

from chatgot.deepspeed_json import schema
from chatgot.deepspeed_json.findings import ABSENT, Findings, Level
from chatgot.deepspeed_json.read import Document
from chatgot.deepspeed_json.settings import ChatGoTSection
from chatgot.deepspeed_json.values import Values
from chatgot.devices import DeviceFacts

RECOMPUTATION_OF_DEEPSPEED = (
    "partition_activations",
    "contiguous_memory_optimization",
    "cpu_checkpointing",
    "synchronize_checkpoint_boundary",
    "profile",
)
"""Keys of activation_checkpointing that torch.utils.checkpoint cannot honour."""


class Derived(NamedTuple):
    """A value that nobody wrote down."""

    value: Any
    reason: str


@dataclass(frozen=True)
class Batch:
    """What an optimizer step is made of."""

    total: int
    """Samples over all ranks."""
    micro: int
    """Samples per rank and forward pass."""
    accumulation: int
    """Forward passes."""
    is_open: bool = False
    """Whether memory decides the micro-batch ("auto", and the other two numbers do not determine it)."""


@dataclass
class Subject:
    """A JSON with all that is known of it: what the rules look at, what follows from it, what is said about it."""

    document: Document
    tree: dict[str, Any]
    """The JSON with overrides; arguments of optimizer and scheduler that are "auto" are filled in here."""
    v: Values
    chatgot: ChatGoTSection
    facts: DeviceFacts
    ranks: int
    findings: Findings
    derived: dict[str, Derived] = field(default_factory=dict)
    """By documented dotted name. What does not begin with "chatgot." DeepSpeed gets too."""
    batch: Batch | None = None
    """None: there is an error."""
    n_params: int | None = None
    """The model's parameters; None: not known yet."""

    def derive(self, dotted: str, value: Any, reason: str) -> None:
        """Note a value that nobody wrote down."""
        self.derived[dotted] = Derived(value, reason)

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
        return self.params("optimizer")

    def params(self, section: str) -> dict[str, Any]:
        """The params of the optimizer or scheduler section; empty where there are none, or no mapping."""
        parent = self.tree.get(section)
        params = parent.get("params") if isinstance(parent, dict) else None
        return params if isinstance(params, dict) else {}

    @property
    def offloaded(self) -> bool:
        """Whether the optimizer state lives outside the device."""
        zero = self.v.zero_optimization
        return zero.offload_optimizer.device != "none" or bool(zero.cpu_offload)

    @property
    def precision(self) -> Literal["bf16", "fp16", "fp32"]:
        """Of the parameters."""
        return "bf16" if self.v.bf16.enabled else "fp16" if self.v.fp16.enabled else "fp32"

    def needs_deepspeed(self) -> list[str]:
        """What only DeepSpeed's recomputation can do, and the JSON asks for."""
        section = self.v.activation_checkpointing
        return [key for key in RECOMPUTATION_OF_DEEPSPEED if getattr(section, key)]

    @property
    def backend(self) -> Literal["torch", "deepspeed"] | None:
        """Which implementation recomputes; None: no recomputation."""
        asked = self.chatgot.activation_checkpointing.backend
        if "activation_checkpointing" not in self.v:
            return None
        return ("deepspeed" if self.needs_deepspeed() else "torch") if asked == "auto" else asked

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
        misspelled = any(one.suggestion == dotted for one in self.findings.at_level("error"))
        return dotted not in self.v.spelled and dotted not in self.v and not misspelled


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
    machine: bool = False
    """Whether it is about this machine's packages and files: ranks on unlike ones must still refuse alike."""
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


def apply(rules: Iterable[Rule], subject: Subject, *, late: bool) -> None:
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
            subject.findings.add(known.get("level", level), name, shown, why, of_machine=guessed or rule.machine)


def _value(subject: Subject, dotted: str) -> Any:
    """None for an argument of the optimizer or scheduler."""
    if dotted in schema.NODES:
        return subject.v[dotted]
    home, *names = dotted.split(".")
    return reduce(getattr, names, subject.chatgot) if home == "chatgot" else None
