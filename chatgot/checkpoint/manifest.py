"""manifest.json: what a checkpoint is, readable without torch; and what DeepSpeed's files hold of ours."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import stat
import string
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, cast, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import NotRequired, Required, TypedDict  # pydantic asks for it before Python 3.12

from chatgot.config.run import ModelConfig
from chatgot.deepspeed_json.findings import Findings
from chatgot.deepspeed_json.settings import read_section
from chatgot.errors import CheckpointError, ConfigError, quoted
from chatgot.files import sha256, write_atomically
from chatgot.model.shapes import parameter_shapes
from chatgot.run_folder import read_bytes

NAME = "manifest.json"
LARGEST = 64 << 20
"""Bytes of a manifest that are read: 200 for each file, of which a rank has one or two."""
FORMAT_VERSION = 2

MUST_MATCH: dict[str, str | None] = {
    "model": None,
    "parameters": None,
    "tokenizer": None,
    "optimizer": None,
    "data": "--allow_data_change",
    "train": "--allow_data_change",
    "train_batch_size": "--allow_batch_change",
}
"""Fields that a resumed run must share with its checkpoint -> the switch of train.py that lets them differ, if any."""
MAY_CHANGE = ("world_size", "zero_stage", "precision", "layout")
"""Fields that decide what DeepSpeed's files look like; they may change, and the files are then read by parameter."""
ANNOUNCED = ("learning_rates", "gradient_clipping")
"""Fields that follow the JSON, and that not every stage's files hold as the JSON said them."""
SAME_SIZE = ("parameters", *MAY_CHANGE)
"""Fields that two checkpoints of the same size share."""

HASHING_THREADS = 4
"""Files that are hashed at once."""


Count = Annotated[int, Field(ge=0, lt=2**63)]


class RunFields(TypedDict):
    """What identifies a run."""

    model: dict[str, Any]
    parameters: str
    """`parameter_fingerprint` of the model."""
    tokenizer: str
    data: str
    train: dict[str, Any]
    optimizer: str
    learning_rates: dict[str, Any]
    gradient_clipping: float
    world_size: int
    zero_stage: int
    precision: str
    layout: dict[str, Any]
    """`resume.layout` of the DeepSpeed JSON."""
    train_batch_size: int
    versions: dict[str, str]
    init_from: NotRequired[str]
    """The folder whose weights the run began with, see train.py --init_from."""


class StateFields(RunFields):
    """The run and how far it has come."""

    tokens: int
    val_loss: float | None
    """The validation loss at this very step, if it was measured."""


class Measured(TypedDict):
    """A file of a checkpoint."""

    bytes: Count
    sha256: str


class Manifest(StateFields):
    """All fields of manifest.json but its own sha256."""

    format_version: int
    step: Count
    sequence: Count
    """Order of publication in this folder: a run can go back, so the steps do not tell it."""
    files: dict[str, Measured]
    """By relative name, with '/' between folders."""
    suspect: NotRequired[str]
    """Why the guard takes the state for wrecked, though it is finite: it is used when it is asked for by name only."""


class ClientState(TypedDict):
    """What DeepSpeed stores for us in its own files, under the key "chatgot". Older checkpoints lack some."""

    format: int
    next_sample: int
    skipped_samples: int
    guard: dict[str, Any]
    best_val_loss: float | None
    last_val: dict[str, float]
    micro_batch: dict[str, int]
    rng: list[dict[str, Any]]
    """`rng.capture` of every rank."""
    parameter_groups: list[list[str]]
    grad_scaler: dict[str, float] | None
    """`zero_view.autocast_scale`."""
    owed: NotRequired[list[str]]
    """What is due after the step and not done yet: "evaluation", "samples"."""
    eval_targets: NotRequired[int]
    """How many targets the validation losses are over."""


@dataclass(frozen=True)
class Difference:
    """A value of the manifest that is another one now, as shown: fingerprints are shortened."""

    field: str
    name: str
    """The field, or field.key where it has keys."""
    before: str
    now: str

    def __str__(self) -> str:
        return f"{self.name.removeprefix('layout.')}: {self.before} -> {self.now}"


def parameter_fingerprint(named_shapes: Iterable[tuple[str, tuple[int, ...]]]) -> str:
    """sha256 over the ordered (name, shape) list: the order is part of DeepSpeed's flat buffers."""
    text = "\n".join(f"{name} {tuple(shape)}" for name, shape in named_shapes)
    return hashlib.sha256(text.encode()).hexdigest()


def write(folder: Path, fields: Mapping[str, Any], before: Callable[[str], None] = lambda operation: None) -> None:
    """Write manifest.json, last of a checkpoint's files, and flush it to the disk; `before` as in write_atomically."""
    said = {"format_version": FORMAT_VERSION, **fields}
    write_atomically(folder / NAME, json.dumps({**said, "sha256": _digest(said)}, indent=2), before)


def mark_suspect(folder: Path, why: str) -> None:
    """Note in a published checkpoint why its state is taken for wrecked. Raises CheckpointError, OSError."""
    write(folder, {**read(folder), "suspect": why})


def _digest(fields: dict[str, Any]) -> str:
    """sha256 over what the manifest says, so that a damaged manifest is noticed too."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(fields)), sort_keys=True).encode()).hexdigest()


def read(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint folder; CheckpointError: missing, unreadable, damaged, or of another format."""
    path = folder / NAME
    try:
        fields = json.loads(read_bytes(path, LARGEST))
    except FileNotFoundError:
        why = "the checkpoint is incomplete, or was not written by ChatGoT"
        raise CheckpointError(f"{folder}: no {NAME}: {why}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("format_version"), int):
        raise CheckpointError(f"{path}: not a manifest (no format_version)")
    if (version := fields["format_version"]) != FORMAT_VERSION:
        why = "has no hashes, so that nobody can tell whether the files are whole"
        why = "needs a newer ChatGoT" if version > FORMAT_VERSION else why
        raise CheckpointError(f"{path}: format version {quoted(version)} {why}; this one reads {FORMAT_VERSION}")
    if fields.pop("sha256", None) != _digest(fields):
        raise CheckpointError(f"{path}: damaged: its own sha256 does not fit what it says")
    try:
        _checked().validate_python(fields, strict=True)
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        where, value = ".".join(map(str, wrong["loc"])), wrong["input"]
        raise CheckpointError(f"{path}: {quoted(where)}: {wrong['msg']}, got {quoted(value)}") from error
    return cast(Manifest, fields)


@functools.cache
def _checked() -> TypeAdapter[Any]:
    """The types of a manifest's fields. All but those that every one has had are optional, and others may be there."""
    hints = get_type_hints(Manifest, include_extras=True)
    fields = {name: Required[hint] if name in ("step", "sequence", "files") else hint for name, hint in hints.items()}
    return TypeAdapter(TypedDict("Checked", fields, total=False))  # pyright: ignore - its fields are Manifest's


def listed(folder: Path) -> list[str]:
    """List every file below a checkpoint folder by its relative name ('/' between folders). Left out are the manifest,
    and hidden files, which systems leave anywhere (.DS_Store, .nfs0001).
    """
    paths = (Path(parent) / name for parent, _, files in os.walk(folder) for name in files if not name.startswith("."))
    return sorted({path.relative_to(folder).as_posix() for path in paths} - {NAME})


def measure(path: Path) -> Measured:
    """Size and hash of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def bytes_of(folder: Path, fields: Manifest) -> int:
    """Bytes of a checkpoint by its manifest, the manifest itself included."""
    return sum(file["bytes"] for file in fields["files"].values()) + (folder / NAME).lstat().st_size


def verify(folder: Path, fields: Mapping[str, Any], contents: bool = True) -> list[str]:
    """Compare every file of a checkpoint with its manifest: names and sizes first, they cost nothing, then `contents`.

    Returns:
        Files that are not listed and that nothing reads.

    Raises:
        CheckpointError: naming the first file that is missing, a link, of another size or contents, or not listed
            although DeepSpeed, which looks for *.pt, could read it.
    """
    files = fields.get("files")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{folder / NAME}: lists no files")
    try:
        strays = _compare(folder, files)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise CheckpointError(f"its files cannot be looked at: {error}") from error
    if not contents:
        return strays
    executor = ThreadPoolExecutor(HASHING_THREADS, thread_name_prefix="hash")
    try:
        measured = [(name, executor.submit(measure, folder / name)) for name in files]
        for name, future in measured:  # in the manifest's order, whichever is done first
            try:
                digest = future.result()["sha256"]
            except OSError as error:
                raise CheckpointError(f"file {name}: cannot be read: {error}") from error
            if digest != (expected := files[name]["sha256"]):
                changed = f"its contents have changed (sha256 {digest[:12]}…, not {expected[:12]}…)"
                raise CheckpointError(f"file {name}: {changed}")
    finally:
        executor.shutdown(cancel_futures=True)
    return strays


def _compare(folder: Path, files: dict[str, Measured]) -> list[str]:
    """Names and sizes; see `verify`."""
    present = set(listed(folder))
    root = os.path.realpath(folder)
    for name, expected in files.items():
        relative, shown = PurePosixPath(name), quoted(name)
        if relative.is_absolute() or ".." in relative.parts:
            raise CheckpointError(f"file {shown}: leads out of the checkpoint")
        if os.path.realpath(folder / name) != os.path.join(root, *relative.parts):
            raise CheckpointError(f"file {shown}: is, or is reached through, a symbolic link")
        if name not in present:
            raise CheckpointError(f"file {shown}: is missing")
        status = os.lstat(folder / name)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"file {shown}: is not a regular file")
        if status.st_size != expected["bytes"]:
            raise CheckpointError(f"file {shown}: has {status.st_size} bytes, not {expected['bytes']}")
    strays = sorted(present - files.keys())
    if readable := [name for name in strays if name.endswith(".pt")]:
        raise CheckpointError(f"file {readable[0]}: is not in the manifest")
    return strays


def model_of(fields: Mapping[str, Any]) -> tuple[ModelConfig, int]:
    """The model in a manifest, and its vocabulary's size. Raises CheckpointError."""
    model = dict(fields["model"])
    vocab_size = model.pop("vocab_size", None)
    if type(vocab_size) is not int or not 1 <= vocab_size <= 1 << 32:
        raise CheckpointError(f"{NAME}: model.vocab_size = {quoted(vocab_size)}: must be a whole number >= 1")
    try:
        return read_section(ModelConfig, model, Findings(NAME)), vocab_size
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def check_model(fields: Mapping[str, Any], looks: Mapping[str, Any]) -> None:
    """Hold the manifest's model against the parameters in the files; it may be of any size, and is not built here."""
    config, vocab_size = model_of(fields)
    at_stage_3, else_ = (f"{name}mp_rank_00_model_states.pt" for name in ("zero_pp_rank_0_", ""))
    saved = looks.get(at_stage_3, looks.get(else_))
    if not isinstance(saved, dict) or not isinstance(saved.get("chatgot"), dict):
        raise CheckpointError(f"file {else_}: is missing, or has no state of train.py")
    groups = saved.get("param_shapes") or [saved["module"]]
    shapes = {name: shape for group in groups for name, shape in group.items()}
    if config.n_layers > len(shapes) or any(
        shapes.get(name) != shape for name, shape in parameter_shapes(config, vocab_size).items()
    ):
        raise CheckpointError(f"the parameters in its files are not those of the model in {NAME}")


def differences(saved: Mapping[str, Any], now: Mapping[str, Any], fields: Iterable[str]) -> list[Difference]:
    """Compare the given fields of two manifests, key by key where they have keys."""
    different = []
    for field in fields:
        before, after = saved.get(field), now.get(field)
        pairs = {field: (before, after)}
        if isinstance(before, dict) and isinstance(after, dict):
            keys = sorted(before.keys() | after.keys())
            pairs = {f"{field}.{key}": (before.get(key), after.get(key)) for key in keys}
        different += [Difference(field, name, _shown(a), _shown(b)) for name, (a, b) in pairs.items() if a != b]
    return different


def _shown(value: Any) -> str:
    if value is None:
        return "not given"
    text = quoted(str(value))
    return f"{text[:12]}…" if len(text) == 64 and set(text) <= set(string.hexdigits) else text
