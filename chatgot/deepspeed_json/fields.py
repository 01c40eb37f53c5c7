"""Base of ChatGoT's own settings: pydantic models that are strict about types, ranges and keys, and whose fields are
described by the text that follows them. What is wrong is said in our words, with its place.
"""

from __future__ import annotations

import copy
import types
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo

from chatgot.deepspeed_json.findings import Findings, meant, shortened, shown
from chatgot.errors import ConfigError


class Settings(BaseModel):
    """Settings that refuse unknown keys and lossy conversions, and cannot be changed. A section may be null: empty."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_empty(cls, values: object) -> object:
        return {} if values is None else values


def _whole(value: object) -> object:
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError("is beyond what 64 bits hold")
    return value


def _number(value: object) -> object:
    try:
        return (
            float(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else value
        )  # YAML 1.1 reads 3e-4 (no dot) as a text
    except (ValueError, OverflowError):
        return value


Whole = Annotated[int, BeforeValidator(_whole)]
"""A whole number; 3.0 is one."""
Number = Annotated[float, BeforeValidator(_number)]
"""A number; 1 and '3e-4' are such."""
Texts = Annotated[tuple[str, ...], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)]
"""A list of texts."""

_S = TypeVar("_S", bound=Settings)
_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", types.NoneType: "null"}
_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


class Fault(NamedTuple):
    """What is wrong with one setting."""

    key: str
    """Dotted; empty: all of it."""
    value: object
    why: str = ""
    allowed: str = ""
    suggestion: str = ""


def read_section(cls: type[_S], values: object, place: Callable[[str], str]) -> _S:
    """Read settings from a mapping as parsed from YAML or JSON.

    Args:
        place: what a message about a dotted key begins with: 'tiny.yaml:3: '.

    Raises:
        ConfigError: unknown keys (with the nearest known one), wrong types, values out of range or that do not go
            together; all of them, one per line.
    """
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        faults = [_fault(cls, values, details) for details in error.errors()]
    lines = []
    for key, value, why, allowed, suggestion in faults:
        name = shortened(key, 200)
        subject = name if why and not allowed else f"{name} = {shown(value)}" if key else shown(value)
        said = (why, allowed and f"expected {allowed}", suggestion and f"did you mean '{suggestion}'?")
        lines.append(f"{place(key)}{subject}: {'; '.join(filter(None, said))}")
    raise ConfigError("\n".join(dict.fromkeys(lines)))


def read_fields(cls: type[_S], values: dict[str, Any], where: str, findings: Findings) -> _S:
    """Read settings from a mapping; what is wrong becomes a finding and is left at its default."""
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        good = copy.deepcopy(values)
        for details in error.errors():
            key, value, why, allowed, suggestion = _fault(cls, values, details)
            why = why or "ChatGoT cannot use it"
            findings.error(f"{where}.{key}", value, why, allowed=allowed, suggestion=suggestion)
            *sections, name = (*details["loc"], *([details["input"]] if _is_of_key(values, details) else ()))
            _at(good, sections).pop(name, None)
        return cls.model_validate(good)


def _fault(cls: type[Settings], values: Any, details: Any) -> Fault:
    """Say in our words what pydantic found."""
    if _is_of_key(values, details):
        return Fault(_dotted(details["loc"]), details["input"], f"the key {shown(details['input'])} is no text")
    path, field = [], None
    for part in details["loc"]:
        fields = keys_of(cls)
        path.append(part)
        field = fields.get(part)
        if field is None:
            meaning = meant(part, fields)
            return Fault(_dotted(path), _at(values, path), "unknown key", "one of " + ", ".join(fields), meaning)
        nested = nested_class(field)
        if nested is None:
            break
        cls = nested
    value = _at(values, path)
    if details["type"] == "value_error":  # settings that do not go together
        return Fault(_dotted(path), value, str(details["ctx"]["error"]))
    allowed = described(field) if field is not None else "a section {...}"
    words = typing.get_args(field.annotation) if field is not None else ()
    return Fault(_dotted(path), value, "", allowed, meant(value, [word for word in words if isinstance(word, str)]))


def _is_of_key(values: Any, details: Any) -> bool:
    """Tell whether a key itself is what is wrong: no text, or with a lone surrogate."""
    of_surrogate = details["type"] == "string_unicode"
    return details["type"] == "invalid_key" or (of_surrogate and isinstance(_at(values, details["loc"]), dict))


def _dotted(path: list[str | int]) -> str:
    return ".".join(map(str, path))


def _at(values: Any, path: list[Any]) -> Any:
    for key in path:
        values = values[key]
    return values


def keys_of(cls: type[Settings]) -> dict[str, FieldInfo]:
    """The fields of a section by their keys in YAML and JSON."""
    return {field.alias or name: field for name, field in cls.model_fields.items()}


def dotted_keys(cls: type[Settings], prefix: str = "") -> Iterator[str]:
    """Every key and section in a section, by its dotted name."""
    for key, field in keys_of(cls).items():
        yield prefix + key
        if nested := nested_class(field):
            yield from dotted_keys(nested, f"{prefix}{key}.")


def nested_class(field: FieldInfo) -> type[Settings] | None:
    """The section that a field holds, if it holds one."""
    options = (field.annotation, *typing.get_args(field.annotation))
    return next((option for option in options if isinstance(option, type) and issubclass(option, Settings)), None)


def described(field: FieldInfo) -> str:
    """What a field may hold, in words."""
    limits = [f"{sign} {getattr(x, name)}" for x in field.metadata for name, sign in _SIGNS.items() if hasattr(x, name)]
    return _words(field.annotation) + (f" ({' and '.join(limits)})" if limits else "")


def _words(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _words(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_words, arguments))
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    return "a list of texts" if origin is tuple else _WORDS.get(hint, "a section {...}")
