"""Finding a checkpoint and loading it into an engine. A requested resume that fails is an error, never a fresh start."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatgot.checkpoint import manifest
from chatgot.checkpoint.ranks import Ranks
from chatgot.checkpoint.save import published
from chatgot.config.errors import CheckpointError, ConfigError

TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Found:
    """A published checkpoint."""

    folder: Path
    """The `checkpoints` folder."""
    tag: str
    manifest: dict[str, Any]

    @property
    def path(self) -> Path:
        """The checkpoint's own folder."""
        return self.folder / self.tag


def find(folder: Path, tag: str | None = None) -> Found | None:
    """The named checkpoint, or the one `latest` points to, or the newest published one; None where there is none at all.

    Raises:
        CheckpointError: the named tag is missing, not a plain name, or incomplete.
    """
    if tag is not None:
        return _open(folder, tag)
    tags = published(folder) if folder.is_dir() else []
    if not tags:
        return None
    pointer = folder / "latest"
    wanted = pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else ""
    names = [name for _, name in tags]
    return _open(folder, wanted if wanted in names else names[-1])


def _open(folder: Path, tag: str) -> Found:
    if not TAG.fullmatch(tag):
        raise CheckpointError(f"{folder}: tag {tag!r} is not the plain name of a checkpoint folder")
    path = folder / tag
    if not path.is_dir():
        names = ", ".join(name for _, name in published(folder)) if folder.is_dir() else ""
        raise CheckpointError(f"{folder}: no checkpoint '{tag}' (there are: {names or 'none'})")
    return Found(folder, tag, manifest.read(path))


def choose(resume_from: str, out_dir: Path) -> Found | None:
    """Apply --resume_from auto|must|never|PATH[@TAG]; None means: start a new run.

    Args:
        resume_from: PATH is a run folder or its `checkpoints` folder.

    Raises:
        ConfigError: `never`, but the run folder has checkpoints, which the new run would replace.
        CheckpointError: `must` or a PATH without a usable checkpoint.
    """
    own = out_dir / "checkpoints"
    if resume_from == "never":
        if own.is_dir() and published(own):
            raise ConfigError(
                f"--resume_from never: {own} has checkpoints, and a new run would mix with them; choose another --out_dir or remove it"
            )
        return None
    if resume_from in ("auto", "must"):
        found = find(own)
        if found is None and resume_from == "must":
            raise CheckpointError(f"--resume_from must: {own} has no complete checkpoint")
        return found
    path_text, _, tag = resume_from.partition("@")
    path = Path(path_text)
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if not folder.is_dir():
        raise CheckpointError(f"--resume_from {resume_from}: no such folder: {folder}")
    found = find(folder, tag or None)
    if found is None:
        raise CheckpointError(f"--resume_from {resume_from}: {folder} has no complete checkpoint")
    return found


def refuse_differences(found: Found, now: dict[str, Any]) -> None:
    """Compare the manifest with what this run would be, before an engine is built.

    Raises:
        CheckpointError: with one line per difference.
    """
    lines = manifest.differences(found.manifest, now)
    if lines:
        raise CheckpointError(
            f"{found.path}: does not fit this run (checkpoint | now):\n  "
            + "\n  ".join(lines)
            + "\nGive the same settings, or start a new run in another --out_dir"
        )


def load(engine: Any, found: Found, ranks: Ranks) -> tuple[dict[str, Any], list[str]]:
    """Load weights, optimizer and counters, and put the JSON's hyper-parameters back. Collective.

    DeepSpeed returns (None, None) with a warning where there is nothing to load, and its resumed optimizer has the checkpoint's learning
    rate, betas, weight decay and (ZeRO 1-2) clipping, whatever the JSON says.

    Returns:
        The client state that `save` was given, and one line per hyper-parameter that differs from the checkpoint's.

    Raises:
        CheckpointError: on all ranks, if any could not load.
    """
    wished = [{key: value for key, value in group.items() if key != "params"} for group in engine.optimizer.param_groups]
    error: CheckpointError | None = None
    client_state: dict[str, Any] = {}
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the BF16_Optimizer prints keys of the file
            path, loaded = engine.load_checkpoint(str(found.folder), tag=found.tag)
        if path is None or "chatgot" not in (loaded or {}):
            error = CheckpointError(f"{found.path}: DeepSpeed found nothing to load there")
        else:
            client_state = loaded["chatgot"]
    except Exception as caught:  # noqa: BLE001 - AssertionError, KeyError, EOFError, RuntimeError, ...: each means "does not load"
        error = CheckpointError(f"{found.path}: cannot be loaded: {type(caught).__name__}: {caught}")
    ranks.agree(error)
    return client_state, _reapply(engine, wished)


def _reapply(engine: Any, wished: list[dict[str, Any]]) -> list[str]:
    notes = []
    for index, (group, ours) in enumerate(zip(engine.optimizer.param_groups, wished)):
        for key, value in ours.items():
            theirs = group.get(key)
            if _plain(theirs) != _plain(value) and key not in ("lr", "initial_lr"):  # the schedule sets lr before every step
                notes.append(f"optimizer group {index}: {key} was {theirs!r}, is now {value!r} (from the JSON)")
            group[key] = value
    if hasattr(engine.optimizer, "clip_grad"):
        if engine.optimizer.clip_grad != engine.gradient_clipping():
            notes.append(f"gradient_clipping was {engine.optimizer.clip_grad!r}, is now {engine.gradient_clipping()!r} (from the JSON)")
        engine.optimizer.clip_grad = engine.gradient_clipping()
    return notes


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
