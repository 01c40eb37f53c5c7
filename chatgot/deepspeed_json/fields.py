"""Strict reading of plain mappings into frozen dataclasses: unknown keys, wrong types and out-of-range values are
refused.

A field's default is its documentation's anchor: the string literal that follows a field in the class body is its help
text. Ranges are given in the field's metadata: `ranged(0.1, low=0, high=1)`.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from chatgot.deepspeed_json.findings import Findings, meant
from chatgot.errors import ConfigError

_MISSING = dataclasses.MISSING


def ranged(default: Any, low: float | None = None, high: float | None = None, above: float | None = None) -> Any:
    """A dataclass field with `low <= value <= high` and `value > above`."""
    return dataclasses.field(default=default, metadata={"low": low, "high": high, "above": above})


def did_you_mean(word: object, known: typing.Iterable[str]) -> str:
    """'; did you mean 'x'?' for the closest known word, or an empty string."""
    close = meant(str(word), known)
    return f"; did you mean '{close}'?" if close else ""


def key_of(field: dataclasses.Field) -> str:
    """The key of a field in YAML and JSON: its name, without the underscore that lets a Python keyword be a name
    (async_).
    """
    return field.name.rstrip("_")


def to_plain(section: Any) -> dict[str, Any]:
    """The mapping that `read_section` makes an equal `section` of."""
    plain = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        plain[key_of(field)] = to_plain(value) if dataclasses.is_dataclass(value) else value
    return plain


def read_section(cls: type, values: Any, where: str) -> Any:
    """Build the frozen dataclass `cls` from a mapping.

    Args:
        cls: a dataclass whose fields have plain types (int, float, str, bool, X | None, tuple[X, ...], Literal, a
            nested dataclass).
        values: the mapping as parsed from YAML or JSON.
        where: 'file: section', the start of every message.

    Raises:
        ConfigError: unknown key (with the nearest known one), missing key, wrong type, or value out of range.
    """
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected a mapping of keys, got {values!r}")
    hints = typing.get_type_hints(cls)
    fields = {key_of(f): f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise ConfigError(f"{where}: unknown key '{key}'{did_you_mean(key, fields)} (known: {', '.join(fields)})")
    kwargs = {}
    for key, field in fields.items():
        if key not in values:
            if field.default is _MISSING and field.default_factory is _MISSING:
                raise ConfigError(f"{where}: key '{key}' is missing ({_describe(hints[field.name])})")
            continue
        kwargs[field.name] = coerce(values[key], hints[field.name], f"{where}.{key}")
        _check_range(kwargs[field.name], field, f"{where}.{key}")
    try:
        return cls(**kwargs)
    except ValueError as error:  # a dataclass' own __post_init__ check; it knows the keys, we know the place
        raise ConfigError(f"{where}: {error}") from error


def read_fields(cls: type, values: dict[str, Any], where: str, findings: Findings) -> Any:
    """As `read_section`, for a dataclass whose fields all have defaults; what is wrong becomes a finding and is left at
    its default.
    """
    hints = typing.get_type_hints(cls)
    fields = {key_of(f): f for f in dataclasses.fields(cls)}
    good: dict[str, Any] = {}
    for key, value in values.items():
        dotted = f"{where}.{key}"
        if key not in fields:
            findings.error(
                dotted, value, "unknown key", allowed="one of " + ", ".join(fields), suggestion=meant(key, fields)
            )
            continue
        name = fields[key].name
        hint = hints[name]
        nested = nested_class(hint)
        if nested is not None and isinstance(value, dict):
            good[name] = read_fields(nested, value, dotted, findings)
            continue
        try:
            coerced = coerce(value, hint, dotted)
            _check_range(coerced, fields[key], dotted)
        except ConfigError:
            words = [str(word) for option in _options(hint) for word in typing.get_args(option)]
            findings.error(
                dotted,
                value,
                "ChatGoT cannot use it",
                allowed=described(fields[key], hint),
                suggestion=meant(value, words),
            )
        else:
            good[name] = coerced
    return cls(**good)


def nested_class(hint: Any) -> type | None:
    """The dataclass that a field holds, if it holds one."""
    return next(
        (option for option in _options(hint) if isinstance(option, type) and dataclasses.is_dataclass(option)), None
    )


def described(field: dataclasses.Field, hint: Any) -> str:
    """What a field may hold, in words."""
    limits = _limits(field)
    return _describe(hint) + (f" ({limits})" if limits else "")


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def coerce(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`, or a ConfigError that names the place. Only lossless conversions: 3.0 -> 3, 1 -> 1.0,
    '3e-4' -> 3e-4.
    """
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        rest = [o for o in options if o is not type(None)]
        for option in rest[:-1]:
            try:
                return coerce(value, option, where)
            except ConfigError:
                continue  # the last option raises, and names all of them through _describe
        if len(rest) > 1:
            try:
                return coerce(value, rest[-1], where)
            except ConfigError as error:
                raise ConfigError(f"{where} = {value!r}: expected {_describe(hint)}") from error
        return coerce(value, rest[0], where)
    if origin is typing.Literal:
        options = typing.get_args(hint)
        if value in options and not isinstance(value, bool):
            return value
        raise ConfigError(
            f"{where} = {value!r}: expected one of "
            f"{', '.join(map(str, options))}{did_you_mean(value, map(str, options))}"
        )
    if origin is tuple:
        item = typing.get_args(hint)[0]
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} = {value!r}: expected a list")
        return tuple(coerce(v, item, f"{where}[{i}]") for i, v in enumerate(value))
    if dataclasses.is_dataclass(hint):
        if dataclasses.is_dataclass(value):
            return value
        return read_section(typing.cast(type, hint), value, where)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and not isinstance(value, bool):
        if isinstance(value, int):
            return value
        if isinstance(value, float) and value.is_integer():
            return int(value)
    if hint is float and not isinstance(value, bool):
        if isinstance(value, (int, float)):
            return float(value)
        if isinstance(value, str):  # YAML 1.1 reads 3e-4 (no dot) as a string
            try:
                return float(value)
            except ValueError:
                pass
    if hint is str and isinstance(value, str):
        return value
    raise ConfigError(f"{where} = {value!r}: expected {_describe(hint)}")


def _describe(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(o) for o in typing.get_args(hint))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if origin is tuple:
        return f"a list of {_describe(typing.get_args(hint)[0])}"
    if hint is type(None):
        return "null"
    if dataclasses.is_dataclass(hint):
        return "a section {...}"
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _limits(field: dataclasses.Field) -> str:
    bounds = ((">=", field.metadata.get("low")), ("<=", field.metadata.get("high")), (">", field.metadata.get("above")))
    return " and ".join(f"{sign} {bound}" for sign, bound in bounds if bound is not None)


def _check_range(value: Any, field: dataclasses.Field, where: str) -> None:
    if value is None or not field.metadata:
        return
    low, high, above = field.metadata.get("low"), field.metadata.get("high"), field.metadata.get("above")
    limits = _limits(field)
    inside = (
        value == value  # NaN is outside every range
        and (low is None or value >= low)
        and (high is None or value <= high)
        and (above is None or value > above)
    )
    if limits and not inside:
        raise ConfigError(f"{where} = {value!r}: must be {limits}")
