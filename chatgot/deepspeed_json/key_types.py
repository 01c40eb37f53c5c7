"""What a key of the DeepSpeed JSON is: its type, default and range, and how DeepSpeed understands a value of it.

A section is `typed` when DeepSpeed reads it with a pydantic model: such sections convert leniently ("stage": "2", 5e8
for a whole number). In the others DeepSpeed takes the value as it stands, so a text where a number belongs fails or
lies much later, and is refused here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, FiniteFloat, TypeAdapter

Kind = Literal["flag", "int", "float", "text", "path", "texts", "words", "betas", "numbers", "mapping", "interval"]
Effect = Literal["batches", "numbers", "rounding", "nothing"]
"""What another value does to a run's numbers. batches: other samples, and so other numbers. numbers: the same samples,
other numbers. rounding: the same mathematics, other roundings. nothing: every bit stays.
"""


@dataclass(frozen=True)
class Key:
    """One value: its type, default and range."""

    kind: Kind
    default: Any = None
    help: str = ""
    null: bool = False
    """Whether null may stand for 'not set'."""
    choices: tuple[Any, ...] = ()
    fold_case: bool = False
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    alias: str = ""
    """Another spelling that DeepSpeed reads."""
    instead: str = ""
    """Set for a deprecated key that DeepSpeed still honours: what to write instead."""
    auto: bool = False
    """Whether ChatGoT resolves the value "auto"."""
    required: bool = False
    no_flag: bool = False
    """Whether true and false are refused for a number even where pydantic would convert them."""
    effect: Effect | None = None
    """What another value does to a run's numbers; None: what the section's does, or "numbers"."""

    def allowed(self) -> str:
        """What may stand here, in words."""
        if self.choices:
            words = "one of " + ", ".join(map(str, self.choices))
        else:
            limits = ((">=", self.low), ("<=", self.high), (">", self.above), ("<", self.below))
            bounds = [f"{sign} {bound:g}" for sign, bound in limits if bound is not None]
            words = " and ".join([_KINDS[self.kind][0], *bounds])
        return words + (" or null" if self.null else "") + (' or "auto"' if self.auto else "")

    def read(self, value: Any, typed: bool) -> Any:
        """`value` as DeepSpeed will understand it.

        Args:
            value: as parsed from the file.
            typed: whether a pydantic model reads it (lenient conversions).

        Raises:
            ValueError: the value is of another type, out of range, or none of the choices.
        """
        if value is None and self.null:
            return None
        if value is None or (self.no_flag and isinstance(value, bool)):
            raise ValueError
        if not typed and (isinstance(value, _ONLY_TYPED.get(self.kind, ())) or (self.kind == "path" and not value)):
            raise ValueError
        value = _reader(self.kind, self.low, self.high, self.above, self.below).validate_python(value)
        if self.choices:
            folded = {str(choice).lower() if self.fold_case else choice: choice for choice in self.choices}
            word = str(value).lower() if self.fold_case else value
            if word not in folded:
                raise ValueError
            return folded[word]
        return value


@dataclass(frozen=True)
class Section:
    """A mapping of keys."""

    keys: dict[str, Key | Section] = field(default_factory=dict)
    help: str = ""
    model: str = ""
    """module:Class of the pydantic model that reads it; empty: plain getters."""
    null: bool = False
    open: bool = False
    """Whether other keys may stand here as well (they are somebody else's arguments)."""
    alias: str = ""
    bare: tuple[Any, ...] = ()
    """Values that may stand in place of the mapping."""
    effect: Effect | None = None
    group: type[Group] | None = None
    """The class that holds its values."""
    default: ClassVar[Any] = None

    @property
    def typed(self) -> bool:
        """Whether DeepSpeed reads the section with a pydantic model."""
        return bool(self.model)


class Group:
    """The values of a section, as attributes. A subclass states its keys with `key` and `section`."""

    KEYS: ClassVar[dict[str, Key | Section]] = {}

    def __init_subclass__(cls) -> None:
        cls.KEYS = cls.KEYS | {name: node for name, node in vars(cls).items() if isinstance(node, (Key, Section))}

    def __init__(self) -> None:
        for name, node in self.KEYS.items():
            setattr(self, name, node.default if isinstance(node, Key) else node.group() if node.group else None)


def key(kind: Kind, default: Any = None, help: str = "", **more: Any) -> Any:
    """State a key of a Group; `more` are fields of Key."""
    return Key(kind, default, help, **more)


def section(group: type[Group], **more: Any) -> Any:
    """State a section inside a Group; `more` are fields of Section."""
    return Section(group.KEYS, (group.__doc__ or "").strip(), group=group, **more)


_Whole = Annotated[int, BeforeValidator(lambda x: int(x) if isinstance(x, float) and x.is_integer() else x)]
"""1e20 is one, which pydantic by itself refuses."""
_Strict = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_Betas = Annotated[list[Annotated[_Strict, Field(ge=0.0, lt=1.0)]], Field(min_length=2, max_length=2)]
_Words = Annotated[list[str], BeforeValidator(lambda x: [x] if isinstance(x, str) else x)]
_KINDS: dict[Kind, tuple[str, Any]] = {
    "flag": ("true or false", bool),
    "int": ("a whole number", _Whole),
    "float": ("a number", FiniteFloat),
    "text": ("a text", str),
    "path": ("a path", str),
    "texts": ("a list of texts", list[str]),
    "words": ("a text or a list of texts", _Words),
    "betas": ("a list of two numbers, each >= 0 and < 1", _Betas),
    "numbers": ("a number or a list of numbers", _Strict),
    "mapping": ("a mapping of keys", dict[str, Any]),
    "interval": ("a text or a whole number", str | _Whole),
}
"""Kind -> what it is in words, and the type that pydantic reads it, or a number in it, as."""
_ONLY_TYPED: dict[Kind, Any] = {"flag": str, "int": str | bool, "float": str | bool, "interval": bool}
"""What is converted in a typed section only."""


@cache
def _reader(kind: Kind, low: Any, high: Any, above: Any, below: Any) -> TypeAdapter[Any]:
    if kind not in ("int", "float", "numbers"):
        return TypeAdapter(_KINDS[kind][1])
    number: Any = Annotated[_KINDS[kind][1], Field(ge=low, le=high, gt=above, lt=below)]
    several: Any = Annotated[list[number], Field(min_length=1)]  # pyright: ignore[reportInvalidTypeForm] - made here
    return TypeAdapter(number | several if kind == "numbers" else number)
