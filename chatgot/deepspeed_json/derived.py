"""Values that nobody wrote down: what they are and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from chatgot.deepspeed_json.findings import shown
from chatgot.deepspeed_json.values import Values


@dataclass(frozen=True)
class Derived:
    """A value that nobody wrote down."""

    name: str
    value: Any
    reason: str
    inform_deepspeed: bool
    """Whether it goes into the configuration that DeepSpeed gets."""


class Derivations:
    """Every derived value of a configuration, by its documented name."""

    def __init__(self, values: Values) -> None:
        self._values = values
        self._derived: dict[str, Derived] = {}

    def add(self, dotted: str, value: Any, reason: str, inform_deepspeed: bool = True) -> None:
        """Note one value and why it is so."""
        self._derived[dotted] = Derived(self._values.name(dotted), value, reason, inform_deepspeed)

    def get(self, dotted: str) -> Derived | None:
        """What was derived for a key."""
        return self._derived.get(dotted)

    def resolved(self) -> dict[str, Any]:
        """What DeepSpeed is to be told."""
        return {dotted: derived.value for dotted, derived in self._derived.items() if derived.inform_deepspeed}

    def lines(self) -> list[str]:
        """'key = value: reason', one per value."""
        return [f"{derived.name} = {shown(derived.value)}: {derived.reason}" for derived in self._derived.values()]
