"""The run folder: resolved configuration and environment, so that another machine needs only this folder."""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from chatgot.config.errors import ConfigError


def check_writable(folder: Path) -> None:
    """Make the folder and try to write in it.

    Raises:
        ConfigError: it is a file, or cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"--out_dir {folder}: cannot be written to: {error}") from error


def environment(extra: dict[str, Any]) -> dict[str, Any]:
    """Machine and command of this start, with `extra` (versions, data)."""
    import numpy

    return {
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        **extra,
    }


def write_settings(folder: Path, run: dict[str, Any], engine: dict[str, Any], environ: dict[str, Any], tokenizer) -> None:
    """run.yaml, ds_config.json, environment.json and tokenizer.json. Rank 0 only."""
    import yaml

    (folder / "run.yaml").write_text(yaml.safe_dump(run, sort_keys=False, allow_unicode=True), encoding="utf-8")
    (folder / "ds_config.json").write_text(json.dumps(engine, indent=2) + "\n", encoding="utf-8")
    (folder / "environment.json").write_text(json.dumps(environ, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(folder / "tokenizer.json")


def changed_settings(folder: Path, run: dict[str, Any]) -> list[str]:
    """One line per key of run.yaml that differs from the folder's: 'train.max_steps: 1000 -> 2000'."""
    import yaml

    path = folder / "run.yaml"
    if not path.is_file():
        return []
    before = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [
        f"{section}.{key}: {before.get(section, {}).get(key)!r} -> {value!r}"
        for section, keys in run.items()
        for key, value in keys.items()
        if before.get(section, {}).get(key) != value
    ]
