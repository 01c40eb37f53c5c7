"""Finding a whole checkpoint, and choosing the one to go on from. A requested resume that fails is an error, never a
fresh start. Needs no torch.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatgot.checkpoint import manifest
from chatgot.checkpoint.manifest import Difference, Manifest
from chatgot.checkpoint.pickles import look
from chatgot.errors import CheckpointError, ConfigError, quoted
from chatgot.run_folder import CHECKPOINTS, LATEST, REPLACED, UNFINISHED, read_bytes

MEANWHILE = 100
"""How often a reader beside a run that saves begins again, because what it was reading has been deleted."""
TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TAG_OF_STEP = re.compile(r"step-(\d{1,18})")


@dataclass(frozen=True)
class Found:
    """A published checkpoint whose files are those of its manifest."""

    folder: Path
    """The `checkpoints` folder."""
    tag: str
    manifest: Manifest
    notes: tuple[str, ...] = ()
    """What the user must hear: newer checkpoints that are damaged, a `latest` that leads nowhere."""
    damaged: tuple[str, ...] = ()
    """Tags in the same folder that were found damaged on the way here."""

    @property
    def path(self) -> Path:
        """The checkpoint's own folder."""
        return self.folder / self.tag


@dataclass(frozen=True)
class Published:
    """A good checkpoint."""

    tag: str
    step: int
    sequence: int
    """Order of publication: after a resume from an older checkpoint the newest one need not have the highest step."""
    bytes: int
    files: int
    val_loss: float | None = None


@dataclass(frozen=True)
class Holdings:
    """What a folder of checkpoints holds."""

    good: tuple[Published, ...] = ()
    """In order of publication."""
    damaged: tuple[tuple[str, str], ...] = ()
    """(tag, "checkpoint ... is damaged: why" or "is suspect: why") of those that turned out not to be good just now;
    those that were known are left out.
    """
    other_bytes: int = 0
    """Of everything else that stays: damaged checkpoints, small files."""
    leftover_bytes: int = 0
    """Of what a save that was cut short has left, which the next one sweeps."""


def find(folder: Path, tag: str | None = None) -> Found | None:
    """Find the named checkpoint, or of those that are whole and not suspect the last published; None if there is none.

    Every file is compared with the manifest's size and hash before anything is loaded. Where `latest`, which is for
    stock DeepSpeed, disagrees with the manifests, they decide.

    Raises:
        CheckpointError: the named one is missing, damaged, or no plain name; without a name: none of several is whole.
    """
    if tag is not None:
        return _open(folder, tag)
    for _ in range(MEANWHILE):
        found, is_gone = _newest(folder)
        if found is not None or not is_gone:
            return found
    raise CheckpointError(f"{folder}: its checkpoints are deleted faster than they can be read")


def find_again(folder: Path, tag: str) -> Found | None:
    """Find the named checkpoint, beside a run that may save or delete it meanwhile; None: it is gone.

    Raises:
        CheckpointError: it is damaged, and was not replaced while it was read.
    """
    for _ in range(MEANWHILE):
        before = _identity(folder / tag)
        try:
            return _open(folder, tag) if before is not None else None
        except CheckpointError:
            if _identity(folder / tag) == before:
                raise
    raise CheckpointError(f"{folder / tag}: is replaced faster than it can be read")


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _newest(folder: Path) -> tuple[Found | None, bool]:
    """See `find`; and whether a checkpoint that was listed has been deleted since: then it is worth looking again."""
    gone = False
    damaged: list[tuple[str, int, str]] = []

    def order(name: str) -> tuple[float, int, bool, str]:
        try:
            fields = _manifest(folder / name)
        except CheckpointError:  # looked at first, so that it is named
            return math.inf, _step_of(name) or 0, False, name
        return fields["sequence"], fields["step"], fields["step"] == _step_of(name), name  # before its copies

    for _, step, _, name in sorted(map(order, tags_in(folder)), reverse=True):
        try:
            whole = find_again(folder, name)
        except CheckpointError as error:
            damaged.append((name, step, str(error)))
            continue
        if whole is None:
            gone = True
            continue
        if why := whole.manifest.get("suspect"):
            forced = f"--resume_from {folder}@{name} takes it all the same"
            damaged.append((name, step, f"checkpoint {whole.path} is suspect: {why}; {forced}"))
            continue
        notes = (*whole.notes, *_notes(folder, name, step, damaged))
        return Found(folder, name, whole.manifest, notes, tuple(lost for lost, _, _ in damaged)), gone
    if damaged and not gone:
        raise CheckpointError(
            f"{folder}: no checkpoint is whole: " + "; ".join(reason for _, _, reason in damaged[-9:])
        )
    return None, gone


def tags_in(folder: Path) -> list[str]:
    """List what is, or should be, a published checkpoint: it has a manifest, or the name of one. Raises CheckpointError
    where the folder is a link to a disk that is not mounted.
    """
    if not folder.is_dir():
        if folder.is_symlink():
            raise CheckpointError(f"{folder}: is a symbolic link that leads to no folder; is its disk mounted?")
        return []
    names = [one.name for one in folder.iterdir() if TAG.fullmatch(one.name) and (one.is_dir() or one.is_symlink())]
    return sorted(name for name in names if _TAG_OF_STEP.fullmatch(name) or (folder / name / manifest.NAME).is_file())


def _step_of(tag: str) -> int | None:
    """The step that a tag of ours names."""
    match = _TAG_OF_STEP.fullmatch(tag)
    return int(match[1]) if match else None


def _manifest(path: Path) -> Manifest:
    damaged = f"checkpoint {path} is damaged: "
    if path.is_symlink():
        raise CheckpointError(f"{damaged}it is a symbolic link, and a checkpoint is a folder of its own")
    try:
        return manifest.read(path)
    except CheckpointError as error:
        raise CheckpointError(f"{damaged}file {manifest.NAME}: {error}") from error


def _open(folder: Path, tag: str, contents: bool = True) -> Found:
    if not TAG.fullmatch(tag):
        raise CheckpointError(f"{folder}: tag {tag!r} is not the plain name of a checkpoint folder")
    path = folder / tag
    if not (path.is_dir() or path.is_symlink()):
        raise CheckpointError(f"{folder}: no checkpoint '{tag}' (there are: {', '.join(tags_in(folder)) or 'none'})")
    fields = _manifest(path)
    try:
        strays = manifest.verify(path, fields, contents)
        looks = {name: look(path / name) for name in fields["files"] if contents and name.endswith(".pt")}
        if contents and "model" in fields:
            manifest.check_model(fields, looks)
    except (CheckpointError, AttributeError, KeyError, TypeError) as error:  # others: what `look` saw has another form
        raise CheckpointError(f"checkpoint {path} is damaged: {error}") from error
    unread = "is not in the manifest, and is not read"
    suspect = [f"checkpoint {path} is suspect: {fields['suspect']}"] if "suspect" in fields else []
    return Found(folder, tag, fields, (*suspect, *(f"{path}/{quoted(one)}: {unread}" for one in strays)))


def _notes(folder: Path, tag: str, step: int, damaged: list[tuple[str, int, str]]) -> list[str]:
    notes = []
    for _, lost, reason in damaged:
        behind = f", {lost - step} steps are lost" if lost > step else ""
        notes.append(f"{reason}; going back to {tag}{behind}")
    pointer = folder / LATEST
    if pointer.is_symlink():
        notes.append(f"{pointer} is a symbolic link and was not followed; using {tag}, the newest whole checkpoint")
        return notes
    try:
        named = read_bytes(pointer)[:200]
    except OSError:
        named = b""  # a kill right before it was first written
    if named and named != tag.encode() and not any(named == name.encode() for name, _, _ in damaged):
        notes.append(f"{pointer} says {named.decode('utf-8', 'replace')!r}; using {tag}, the newest whole checkpoint")
    return notes


def examine(folder: Path, damaged: Collection[str] = ()) -> Holdings:
    """Look at every checkpoint of a folder: its manifest, and names and sizes of its files, but not their contents.
    Those in `damaged` are known not to be good, whatever they look like; those whose name is not that of their step
    are a person's, and left alone.
    """
    good: list[Published] = []
    bad: list[tuple[str, str]] = []
    for tag in sorted(set(tags_in(folder)) - set(damaged)):
        try:
            found = _open(folder, tag, contents=False)
        except CheckpointError as error:
            bad.append((tag, str(error)))
            continue
        fields, step = found.manifest, found.manifest["step"]
        if "suspect" in fields:
            bad.append((tag, found.notes[0]))
        elif _step_of(tag) == step:  # else renamed or copied by somebody who wants to keep it
            size, files = manifest.bytes_of(found.path, fields), len(fields["files"]) + 1
            good.append(Published(tag, step, fields["sequence"], size, files, fields.get("val_loss")))
    good.sort(key=lambda checkpoint: checkpoint.sequence)
    replaced = [path for path in folder.glob(f"{REPLACED}*") if (folder / path.name.removeprefix(REPLACED)).exists()]
    leftover = sum(map(_bytes_below, (*folder.glob(f"{UNFINISHED}*"), *replaced)))  # what the next save sweeps
    other = _bytes_below(folder) - leftover - sum(checkpoint.bytes for checkpoint in good)
    return Holdings(tuple(good), tuple(bad), other, leftover)


def _bytes_below(folder: Path) -> int:
    return sum((Path(parent) / name).lstat().st_size for parent, _, names in os.walk(folder) for name in names)


def expected_bytes(folder: Path, fields: Mapping[str, Any], estimated: int, damaged: Collection[str] = ()) -> int:
    """Bytes of the next checkpoint, given the manifest's fields of this run: as many as the newest good one of the same
    layout has, or else the estimate. Raises CheckpointError if the folder cannot be looked at.
    """
    try:
        good = examine(folder, damaged).good
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be looked at: {error}") from error
    for checkpoint in reversed(good):
        saved = manifest.read(folder / checkpoint.tag)
        if all(saved.get(name) == fields.get(name) for name in manifest.SAME_SIZE):
            return checkpoint.bytes
    return estimated


def take_apart(path: Path) -> tuple[Path, str | None]:
    """Take the path of a checkpoint, or of the folder of all of them, apart: the run folder, and the tag if it has one.
    Any other path is a run folder's.
    """
    whole = path.absolute()
    if whole.parent.name == CHECKPOINTS and not (path / CHECKPOINTS).is_dir():
        return whole.parent.parent, whole.name
    return (whole.parent if whole.name == CHECKPOINTS and not (path / CHECKPOINTS).is_dir() else path), None


def place(resume_from: str, out_dir: Path) -> tuple[Path, str | None]:
    """The folder of checkpoints that --resume_from means, which need not be there, and the tag if it names one."""
    if resume_from in ("auto", "must", "never"):
        return out_dir / CHECKPOINTS, None
    whole = "@" not in resume_from or Path(resume_from).is_dir()
    path_text, tag = (resume_from, "") if whole else resume_from.rsplit("@", 1)
    folder, named = take_apart(Path(path_text))
    return folder / CHECKPOINTS if (folder / CHECKPOINTS).is_dir() else folder, tag or named or None


def choose(resume_from: str, out_dir: Path) -> Found | None:
    """Apply --resume_from auto|must|never|PATH[@TAG]; None means: start a new run.

    Args:
        resume_from: PATH is a run folder, its `checkpoints` folder, or a checkpoint in that.

    Raises:
        ConfigError: `never`, but the run folder has checkpoints, which the new run would replace.
        CheckpointError: `must` or a PATH without a usable checkpoint.
    """
    folder, tag = place(resume_from, out_dir)
    if resume_from == "never":
        if tags_in(folder):
            why = "a new run would mix with them; choose another --out_dir or remove it"
            raise ConfigError(f"--resume_from never: {folder} has checkpoints, and {why}")
        return None
    if resume_from not in ("auto", "must") and not folder.is_dir():
        raise CheckpointError(f"--resume_from {resume_from}: no such folder: {folder}")
    chosen = find(folder, tag)
    if chosen is None and resume_from != "auto":
        raise CheckpointError(f"--resume_from {resume_from}: {folder} has no complete checkpoint")
    return chosen


def refuse_differences(found: Found, now: Mapping[str, Any], allowed: Collection[str] = ()) -> list[Difference]:
    """Compare the manifest with this run's fields, before an engine is built.

    Args:
        allowed: switches of train.py that were given (manifest.MUST_MATCH).

    Returns:
        The differences that the switches allow.

    Raises:
        CheckpointError: with a table of all others, and the switches that would allow them.
    """
    different = manifest.differences(found.manifest, now, manifest.MUST_MATCH)
    refused = [one for one in different if manifest.MUST_MATCH[one.field] not in allowed]
    if not refused:
        return different
    rows = [("", "checkpoint", "this run", "")]
    for one in refused:
        switch = manifest.MUST_MATCH[one.field]
        rows.append((one.name, one.before, one.now, f"allowed by {switch}" if switch else ""))
    first, second, third = (max(len(row[column]) for row in rows) for column in range(3))
    lines = [
        f"  {name:{first}}  {before:{second}} | {after:{third}}  {allowed_by}".rstrip()
        for name, before, after, allowed_by in rows
    ]
    advice = "Give the same settings, or start a new run in another --out_dir"
    raise CheckpointError("\n".join([f"{found.path}: does not fit this run:", *lines, advice]))
