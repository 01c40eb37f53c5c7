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

from chatgot.errors import ConfigError

VARIABLE = "CHATGOT_FAULT"
_FORM = re.compile(
    r"save:(?P<number>\d+):(?P<kind>kill9|sigstop|enospc|eio|list|delay=(?P<seconds>\d+(\.\d+)?))(:(?P<rank>\d+|all))?"
)
_SIGNALS = {"kill9": signal.SIGKILL, "sigstop": signal.SIGSTOP}
_ERRORS = {"enospc": errno.ENOSPC, "eio": errno.EIO}


_planned: re.Match[str] | None = None
"""The fault of this process, by _FORM."""
_begun = 0
"""File operations since then."""


def arm(rank: int) -> str | None:
    """Read CHATGOT_FAULT (ConfigError: it has another form) and begin to count; returns a note if one is planned."""
    global _planned, _begun
    _planned, _begun = None, 0
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    if (match := _FORM.fullmatch(text)) is None:
        form = "save:N:kill9|sigstop|enospc|eio|delay=SECONDS|list[:RANK|:all]"
        raise ConfigError(f"{VARIABLE}={text}: must be {form}; unset it to train")
    if (match["rank"] or "0") in ("all", str(rank)):
        _planned = match
    return f"rehearsal: {VARIABLE}={text}"


def operation(what: str) -> None:
    """Count a file operation of saving, right before it, and let the fault happen if it is the planned one."""
    global _begun
    if _planned is None:
        return
    _begun += 1
    if (kind := _planned["kind"]) == "list":
        print(f"{VARIABLE}: operation {_begun}: {what}", file=sys.stderr, flush=True)
    elif _begun != int(_planned["number"]):
        return
    elif _planned["seconds"]:
        time.sleep(float(_planned["seconds"]))
    elif kind in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[kind])
    else:
        raise OSError(_ERRORS[kind], f"{os.strerror(_ERRORS[kind])} (asked for by {VARIABLE})", what)
