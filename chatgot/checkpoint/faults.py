"""Rehearsing a disaster: CHATGOT_FAULT makes one file operation of saving fail, hang or kill its process.

    CHATGOT_FAULT=save:N:KIND[:RANK]

At the N-th file operation of saving (counted from 1 over all saves of the process) on rank RANK (default 0; `all`: each
at its own N-th): `kill9` (the process is gone), `sigstop` (it hangs), `enospc` and `eio` (the operation fails as on a
full or broken disk), `delay=SECONDS`. `save:0:list[:RANK]` harms nothing and prints the operations with their numbers
on stderr.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import time
from dataclasses import dataclass

from chatgot.errors import ConfigError

VARIABLE = "CHATGOT_FAULT"
_FORM = re.compile(
    r"save:(?P<number>\d+):(?P<kind>kill9|sigstop|enospc|eio|list|delay=(?P<seconds>\d+(\.\d+)?))(:(?P<rank>\d+|all))?"
)
_SIGNALS = {"kill9": signal.SIGKILL, "sigstop": signal.SIGSTOP}
_ERRORS = {"enospc": errno.ENOSPC, "eio": errno.EIO}


@dataclass
class Rehearsal:
    """The fault that is planned for this process, and how many file operations it has begun."""

    number: int
    kind: str
    seconds: float
    begun: int = 0


_rehearsal: Rehearsal | None = None


def arm(rank: int) -> str | None:
    """Read CHATGOT_FAULT (ConfigError: it has another form) and begin to count; returns a note if one is planned."""
    global _rehearsal
    _rehearsal = None
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    if (match := _FORM.fullmatch(text)) is None:
        form = "save:N:kill9|sigstop|enospc|eio|delay=SECONDS|list[:RANK|:all]"
        raise ConfigError(f"{VARIABLE}={text}: must be {form}; unset it to train")
    if match["rank"] in ("all", str(rank)) or (match["rank"] is None and rank == 0):
        _rehearsal = Rehearsal(int(match["number"]), match["kind"].partition("=")[0], float(match["seconds"] or 0))
    return f"rehearsal: {VARIABLE}={text}"


def operation(what: str) -> None:
    """Count a file operation of saving, right before it, and let the fault happen if it is the planned one."""
    if _rehearsal is None:
        return
    _rehearsal.begun += 1
    if _rehearsal.kind == "list":
        print(f"{VARIABLE}: operation {_rehearsal.begun}: {what}", file=sys.stderr, flush=True)
    if _rehearsal.begun != _rehearsal.number:
        return
    if _rehearsal.kind == "delay":
        time.sleep(_rehearsal.seconds)
    elif _rehearsal.kind in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[_rehearsal.kind])
    else:
        number = _ERRORS[_rehearsal.kind]
        raise OSError(number, f"{os.strerror(number)} (asked for by {VARIABLE})", what)
