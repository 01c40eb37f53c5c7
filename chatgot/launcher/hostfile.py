"""The machines of a run that DeepSpeed's runner starts: lines of `host slots=N`."""

from __future__ import annotations

import re
from pathlib import Path

from chatgot.errors import ConfigError


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots of each host. Stricter than DeepSpeed's regular expression, which takes `slots=4x` for 4. ConfigError with
    the line number.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--hostfile {path}: cannot be read as text: {error}") from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)", text)
        if match is None or int(match[2]) == 0:
            raise ConfigError(
                f"{path}:{number}: {text!r} is not of the form `host slots=N` with N from 1 on, as in `worker-1 "
                f"slots=8`"
            )
        if match[1] in hosts:
            raise ConfigError(f"{path}:{number}: host {match[1]!r} is listed twice; give its slots on one line")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise ConfigError(f"{path}: no hosts in it; write one `host slots=N` per line")
    return hosts
