"""ChatGoT's own settings: pydantic models that are strict about types, ranges and keys, and whose fields are described
by the text that follows them. What is wrong is said in our words, with its place.

They are the JSON's extra top-level section, "chatgot", with what DeepSpeed lacks, and the run YAML (config/run.py).
"""

from __future__ import annotations

import copy
import itertools
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from chatgot.deepspeed_json.findings import ABSENT, Findings, meant, shown


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


def read_section(cls: type[_S], values: Any, findings: Findings) -> _S:
    """Read settings from a mapping as parsed from YAML or JSON.

    Raises:
        ConfigError: unknown keys (with the nearest known one), wrong types, values out of range or that do not go
            together; all of them, one per line.
    """
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        for details in error.errors():
            _note(cls, values, details, "", findings)
        findings.refuse()
        raise AssertionError("a refusal without a finding") from error


def read_fields(cls: type[_S], values: dict[str, Any], where: str, findings: Findings) -> _S:
    """Read settings from a mapping; what is wrong becomes a finding and is left at its default."""
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        good = copy.deepcopy(values)
        for details in error.errors():
            _note(cls, values, details, f"{where}.", findings)
            path = (*details["loc"], *([details["input"]] if _is_of_key(values, details) else ()))
            *sections, name = itertools.takewhile(lambda part: isinstance(part, str), path)  # of a list all of it
            _at(good, sections).pop(name, None)
        return cls.model_validate(good)


def _note(cls: type[Settings], values: Any, details: Any, prefix: str, findings: Findings) -> None:
    """Say in our words what pydantic found."""
    path, why, allowed, known, word = [], "", "a section {...}", (), None
    for part in () if _is_of_key(values, details) else details["loc"]:
        path.append(part)
        field = keys_of(cls).get(part)
        if field is None:
            why, allowed, known, word = "unknown key", "one of " + ", ".join(keys_of(cls)), keys_of(cls), part
            break
        allowed, nested = described(field), nested_class(field)
        if nested is None:
            word = _at(values, path)
            known = [one for one in typing.get_args(field.annotation) if isinstance(one, str)]
            break
        cls = nested
    key, value = prefix + ".".join(map(str, path)), _at(values, path)
    if _is_of_key(values, details):
        place = prefix + ".".join(map(str, details["loc"]))
        findings.error(place, ABSENT, f"the key {shown(details['input'])} is no text")
    elif details["type"] == "value_error" and isinstance(value, dict):  # settings that do not go together
        overridden = [name for name in sorted(findings.overridden) if name.startswith(f"{key}.")]
        findings.error((overridden or [key])[0], ABSENT, str(details["ctx"]["error"]))
    elif details["type"] == "value_error":
        findings.error(key, value, str(details["ctx"]["error"]))
    else:
        if not key:
            value, why = ABSENT, f"got {shown(value)}"
        findings.error(key, value, why, allowed=allowed, suggestion=meant(word, known))


def _is_of_key(values: Any, details: Any) -> bool:
    """Tell whether a key itself is what is wrong: no text, or with a lone surrogate."""
    of_surrogate = details["type"] == "string_unicode"
    return details["type"] == "invalid_key" or (of_surrogate and isinstance(_at(values, details["loc"]), dict))


def _at(values: Any, path: Iterable[Any]) -> Any:
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


class ScheduleConfig(Settings):
    """Learning-rate schedule: a pure function of the optimizer step over train.max_steps, multiplying the JSON's lr."""

    type: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """cosine, linear: from the peak down to min_lr_ratio; wsd: stays at the peak, falls over the last decay_fraction;
    constant: stays.
    """
    warmup_steps: Whole = Field(default=100, ge=0)
    """Steps over which the rate rises linearly to its peak; the first step already has lr / warmup_steps."""
    min_lr_ratio: Number = Field(default=0.1, ge=0.0, le=1.0)
    """Last learning rate over the peak."""
    decay_fraction: Number = Field(default=0.2, gt=0.0, le=1.0)
    """Share of max_steps that wsd decays over (wsd only)."""


class CheckpointConfig(Settings):
    """When to save, and what to keep."""

    every_steps: Whole | None = Field(default=100, ge=1)
    """Optimizer steps between saves; null: not by steps."""
    every_minutes: Number | None = Field(default=2.0, gt=0.0)
    """Minutes between saves (rank 0's clock); null: not by time."""
    keep_last: Whole = Field(default=3, ge=2)
    """Newest checkpoints kept; at least 2, because the newest one may be the broken one."""
    keep_best: Whole = Field(default=1, ge=0)
    """Checkpoints with the lowest val/loss that are kept besides."""
    keep_every_steps: Whole | None = Field(default=None, ge=1)
    """Checkpoints whose step is a multiple of this are kept for ever; null: none."""
    disk_budget_gb: Number | None = Field(default=None, gt=0.0)
    """GB (of 1e9 bytes) that the checkpoints folder may hold, the one being written included; before the keep_ rules.
    null: no limit.
    """
    async_: bool = Field(default=False, alias="async")
    """Write while training goes on, from a copy in CPU memory, which every rank keeps."""


class ActivationCheckpointingConfig(Settings):
    """Refines the DeepSpeed section activation_checkpointing, whose presence turns recomputation on."""

    backend: Literal["auto", "torch", "deepspeed"] = "auto"
    """torch: torch.utils.checkpoint (non-reentrant); deepspeed: its own; auto: torch, unless only DeepSpeed can."""
    every_n_layers: Whole = Field(default=1, ge=1)
    """Recompute every n-th block (1: all of them)."""


class GuardConfig(Settings):
    """When a run has diverged, and what happens then."""

    max_consecutive_skips: Whole = Field(default=5, ge=1)
    """Optimizer steps in a row that may be skipped for a non-finite loss or gradient before the run has diverged."""
    spike_zscore: Number | None = Field(default=None, gt=0.0)
    """The run has diverged when a step's loss lies this many standard deviations above the mean of the 50 steps before
    it; null: never.
    """
    spike_min_rise: Number = Field(default=0.5, ge=0.0)
    """Nats by which that loss must lie above the mean besides: where losses hardly vary, little is many deviations."""
    on_diverge: Literal["stop", "rollback"] = "stop"
    """stop: end with exit 5, naming the last good checkpoint; rollback: go back to it, leave out the data since, go
    on.
    """
    max_rollbacks: Whole = Field(default=3, ge=0)
    """Rollbacks of a run, resumes included; the next divergence stops it."""


class CompileConfig(Settings):
    """torch.compile through engine.compile()."""

    enabled: bool = False
    """Compile the model; the first step then takes longer."""
    mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"
    """torch.compile's mode."""


class WandbSettings(Settings):
    """What wandb is told beyond the JSON's own `wandb` section."""

    tags: Texts = ()
    """Tags of the run."""
    artifacts: Literal["none", "report", "checkpoint", "both"] = "none"
    """What is uploaded when the run is complete: report.html, the newest checkpoint, or both."""


class ChatGoTSection(Settings):
    """The whole "chatgot" section."""

    schedule: ScheduleConfig | None = None
    """null: the lr stays constant, or follows a stock `scheduler` section."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    activation_checkpointing: ActivationCheckpointingConfig = ActivationCheckpointingConfig()
    guard: GuardConfig = GuardConfig()
    compile: CompileConfig = CompileConfig()
    wandb: WandbSettings = WandbSettings()
