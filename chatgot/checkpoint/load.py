"""Finding a whole checkpoint and loading it into an engine. A requested resume that fails is an error, never a fresh
start.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatgot import run_folder
from chatgot.checkpoint import lr_scheduler, manifest, pickles
from chatgot.checkpoint.manifest import Difference
from chatgot.distributed import ControlGroup
from chatgot.errors import CheckpointError, ConfigError

TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


_TAG_OF_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Found:
    """A published checkpoint whose files are those of its manifest."""

    folder: Path
    """The `checkpoints` folder."""
    tag: str
    manifest: dict[str, Any]
    notes: tuple[str, ...] = ()
    """What the user must hear: newer checkpoints that are damaged, a `latest` that leads nowhere."""
    damaged: tuple[str, ...] = ()
    """Tags in the same folder that were found damaged on the way here."""

    @property
    def path(self) -> Path:
        """The checkpoint's own folder."""
        return self.folder / self.tag


def find(folder: Path, tag: str | None = None) -> Found | None:
    """The named checkpoint, or the one that was published last of those that are whole; None where there is none at
    all.

    Every file is compared with the manifest's size and hash before anything is loaded. `latest` is a hint for stock
    DeepSpeed: where it disagrees with the manifests, they decide.

    Raises:
        CheckpointError: the named checkpoint is missing, damaged, or not a plain name; without a name: there are
            checkpoints, none whole.
    """
    if tag is not None:
        return _open(folder, tag)
    damaged: list[tuple[str, int | None, str]] = []
    candidates: list[tuple[int, int, str]] = []
    for name in tags_in(folder):
        try:
            fields = _manifest(folder / name)
            candidates.append((int(fields["sequence"]), int(fields["step"]), name))
        except (CheckpointError, KeyError, TypeError, ValueError) as error:
            damaged.append((name, _step_in(name), str(error)))
    for _, step, name in sorted(candidates, reverse=True):
        try:
            found = _open(folder, name)
        except CheckpointError as error:
            damaged.append((name, step, str(error)))
            continue
        return Found(
            folder,
            name,
            found.manifest,
            tuple(_notes(folder, name, step, damaged)),
            tuple(lost for lost, _, _ in damaged),
        )
    if damaged:
        raise CheckpointError(f"{folder}: no checkpoint is whole: " + "; ".join(reason for _, _, reason in damaged))
    return None


def tags_in(folder: Path) -> list[str]:
    """Names of what is, or should be, a published checkpoint: a manifest in it, or the name of one."""
    if not folder.is_dir():
        return []
    names = [
        path.name for path in folder.iterdir() if TAG.fullmatch(path.name) and (path.is_dir() or path.is_symlink())
    ]
    return sorted(name for name in names if _TAG_OF_STEP.fullmatch(name) or (folder / name / manifest.NAME).is_file())


def _manifest(path: Path) -> dict[str, Any]:
    if path.is_symlink():
        raise CheckpointError(
            f"checkpoint {path} is damaged: it is a symbolic link, and a checkpoint is a folder of its own"
        )
    try:
        return manifest.read(path)
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {path} is damaged: file {manifest.NAME}: {error}") from error


def _open(folder: Path, tag: str) -> Found:
    if not TAG.fullmatch(tag):
        raise CheckpointError(f"{folder}: tag {tag!r} is not the plain name of a checkpoint folder")
    path = folder / tag
    if not path.is_dir():
        raise CheckpointError(f"{folder}: no checkpoint '{tag}' (there are: {', '.join(tags_in(folder)) or 'none'})")
    fields = _manifest(path)
    try:
        manifest.verify(path, fields)
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {error}") from error
    return Found(folder, tag, fields)


def _notes(folder: Path, tag: str, step: int, damaged: list[tuple[str, int | None, str]]) -> list[str]:
    notes = []
    for _, lost, reason in damaged:
        behind = f", {lost - step} steps are lost" if lost is not None and lost > step else ""
        notes.append(f"{reason}; going back to {tag}{behind}")
    pointer = folder / "latest"
    if pointer.is_symlink():
        notes.append(f"{pointer} is a symbolic link and was not followed; using {tag}, the newest whole checkpoint")
        return notes
    try:
        named = pointer.read_bytes()[:200]
    except OSError:
        named = b""  # a kill right before it was first written
    if named and named != tag.encode() and not any(named == name.encode() for name, _, _ in damaged):
        notes.append(f"{pointer} says {named.decode('utf-8', 'replace')!r}; using {tag}, the newest whole checkpoint")
    return notes


def _step_in(name: str) -> int | None:
    match = _TAG_OF_STEP.fullmatch(name)
    return int(match.group(1)) if match else None


def choose(resume_from: str, out_dir: Path) -> Found | None:
    """Apply --resume_from auto|must|never|PATH[@TAG]; None means: start a new run.

    Args:
        resume_from: PATH is a run folder or its `checkpoints` folder.

    Raises:
        ConfigError: `never`, but the run folder has checkpoints, which the new run would replace.
        CheckpointError: `must` or a PATH without a usable checkpoint.
    """
    own = out_dir / run_folder.CHECKPOINTS
    if resume_from == "never":
        if tags_in(own):
            raise ConfigError(
                f"--resume_from never: {own} has checkpoints, and a new run would mix with them; choose another "
                f"--out_dir or remove it"
            )
        return None
    if resume_from in ("auto", "must"):
        found = find(own)
        if found is None and resume_from == "must":
            raise CheckpointError(f"--resume_from must: {own} has no complete checkpoint")
        return found
    path_text, _, tag = resume_from.partition("@")
    path = Path(path_text)
    folder = path / run_folder.CHECKPOINTS if (path / run_folder.CHECKPOINTS).is_dir() else path
    if not folder.is_dir():
        raise CheckpointError(f"--resume_from {resume_from}: no such folder: {folder}")
    found = find(folder, tag or None)
    if found is None:
        raise CheckpointError(f"--resume_from {resume_from}: {folder} has no complete checkpoint")
    return found


def refuse_differences(found: Found, now: dict[str, Any], allowed: Collection[str] = ()) -> list[Difference]:
    """Compare the manifest with what this run would be, before an engine is built.

    Args:
        now: the manifest's fields of this run.
        allowed: switches of train.py that were given (manifest.MUST_MATCH).

    Returns:
        The differences that the switches allow.

    Raises:
        CheckpointError: with a table of all others, and the switches that would allow them.
    """
    different = manifest.differences(found.manifest, now, manifest.MUST_MATCH)
    refused = [one for one in different if manifest.MUST_MATCH[one.field] not in allowed]
    if refused:
        rows = [
            ("", "checkpoint", "this run", ""),
            *((d.name, d.before, d.now, manifest.MUST_MATCH[d.field] or "") for d in refused),
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [
            f"  {name:{widths[0]}}  {before:{widths[1]}} | {after:{widths[2]}}"
            + (f"  allowed by {switch}" if switch else "")
            for name, before, after, switch in rows
        ]
        raise CheckpointError(
            f"{found.path}: does not fit this run:\n"
            + "\n".join(line.rstrip() for line in lines)
            + "\nGive the same settings, or start a new run in another --out_dir"
        )
    return different


def load(engine: Any, found: Found, ranks: ControlGroup) -> tuple[dict[str, Any], list[str]]:
    """Load weights, optimizer and counters, and put the JSON's hyper-parameters back. Collective.

    DeepSpeed returns (None, None) with a warning where there is nothing to load, and its resumed optimizer has the
    checkpoint's learning rate, betas, weight decay and (ZeRO 1-2) clipping, whatever the JSON says.

    Returns:
        The client state that `save` was given, and one line per hyper-parameter that differs from the checkpoint's.

    Raises:
        CheckpointError: on all ranks, if any could not load.
    """
    wished = [
        {key: value for key, value in group.items() if key != "params"} for group in engine.optimizer.param_groups
    ]
    error: CheckpointError | None = None
    client_state: dict[str, Any] = {}
    try:
        # The BF16_Optimizer prints keys of the file. A checkpoint never runs code.
        with contextlib.redirect_stdout(io.StringIO()), pickles.weights_only():
            path, loaded = engine.load_checkpoint(str(found.folder), tag=found.tag, load_lr_scheduler_states=False)
        if path is None or "chatgot" not in (loaded or {}):
            error = CheckpointError(f"{found.path}: DeepSpeed found nothing to load there")
        else:
            client_state = loaded["chatgot"]
    except Exception as caught:  # noqa: BLE001
        error = CheckpointError(f"{found.path}: cannot be loaded: {pickles.explained(caught)}")
    ranks.agree(error)
    notes = _reapply(engine, wished)
    lr_scheduler.go_on(engine)
    return client_state, notes


def _reapply(engine: Any, wished: list[dict[str, Any]]) -> list[str]:
    notes = []
    for index, (group, ours) in enumerate(zip(engine.optimizer.param_groups, wished)):
        for key, value in ours.items():
            theirs = group.get(key)
            if _plain(theirs) != _plain(value) and key not in lr_scheduler.moved(engine):
                notes.append(f"optimizer group {index}: {key} was {theirs!r}, is now {value!r} (from the JSON)")
            group[key] = value
    if hasattr(engine.optimizer, "clip_grad"):
        engine.optimizer.clip_grad = engine.gradient_clipping()
    return notes


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
