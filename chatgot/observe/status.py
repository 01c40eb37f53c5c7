"""`chatgot status`: what became of a run, from its folder alone, with an exit code for scripts that start it again."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import socket
from pathlib import Path
from typing import Any

import chatgot.run_folder as run_folder
from chatgot.errors import EXIT_DONE, EXIT_INTERRUPTED, ConfigError
from chatgot.files import write_atomically
from chatgot.observe.journal import newest_step, read_lines

EXIT_RUNNING = 10
_TURNS = ("started", "resumed", "finished", "preempted", "out_of_memory", "failed")
"""Events that begin or end a start; of those that end one, the first says why."""


def status(folder: Path, ending: bool = False) -> tuple[str, int]:
    """Tell the state of the run in `folder`, and the exit code that goes with it: 0 finished, 10 running, 75 run the
    same command again, else the code of the failure.

    Args:
        ending: the run itself asks, which has written its last event and holds the lock for a moment yet.

    Raises:
        ConfigError: there is no run in the folder.
    """
    events = [event for event in read_lines(folder / run_folder.EVENTS) if event is not None]
    last: dict[str, Any] = {}
    for event in events:
        if (kind := event.get("event")) in _TURNS and (kind in _TURNS[:2] or last.get("event") in (None, *_TURNS[:2])):
            last = event
    holder = None if ending else holder_of_lock(folder)
    if holder is None and (note := _note(folder)) is not None:
        if _runs(note):
            return f"starting, pid {note['pid']}: before its first step", EXIT_RUNNING
        error, code = note["error"], note["code"]
        return f"the last start ended before its first step, with exit code {code}: {error}", code
    if not last and holder is None:
        hint = "one that is killed at once leaves no word; give the --out_dir of a run"
        raise ConfigError(f"{folder}: no run has started here ({hint})")
    saved = next((event.get("step") for event in reversed(events) if event.get("event") == "saved"), None)
    state = "nothing is saved" if saved is None else f"saved at step {saved}"
    again = f"{state}: run the same command again"
    step, kind = last.get("step"), last.get("event")
    if holder is not None:
        return f"running, {holder}: at step {newest_step(folder / run_folder.METRICS) or 0}, {state}", EXIT_RUNNING
    if kind == "finished":
        val = f", val/loss {last['val/loss']:.4f}" if isinstance(last.get("val/loss"), float) else ""
        return f"finished at step {step}{val}", EXIT_DONE
    if kind == "preempted":
        return f"stopped by {last.get('signal')} at step {step}, {again}", EXIT_INTERRUPTED
    if kind in ("out_of_memory", "failed"):
        code = last.get("exit_code")
        why = last.get("error") or f"memory ran out in {last.get('doing')}"
        code = code if isinstance(code, int) else 1
        return f"failed with exit code {code}: {why}; {again if code == EXIT_INTERRUPTED else state}", code
    at = newest_step(folder / run_folder.METRICS) or 0
    return f"ended without a word at step {at} or later (killed, or the machine went down), {again}", EXIT_INTERRUPTED


def note_refused_start(folder: Path, error: str, code: int, **more: Any) -> None:
    """Leave a word for `status` on this machine, or where its home is shared: a refusal changes nothing in the folder
    of the run, which may not even exist.

    Args:
        more: what else the note says.
    """
    with contextlib.suppress(OSError, RuntimeError):  # no home, or it is full: the refusal itself has been said
        note = _note_of(folder)
        note.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(note, json.dumps({"error": error, "code": code, "events": _events(folder), **more}))


def note_start(folder: Path) -> None:
    """Note that this process starts a run; unless it notes another end, it was killed before its first step."""
    why = f"without a word (killed, or {socket.gethostname()} went down): run the same command again"
    note_refused_start(folder, why, EXIT_INTERRUPTED, pid=os.getpid(), **_birth(os.getpid()))


def forget_start(folder: Path) -> None:
    """Take back the note of this start, whose end the folder will tell."""
    with contextlib.suppress(OSError, RuntimeError):
        _note_of(folder).unlink()


def _note(folder: Path) -> dict[str, Any] | None:
    """What the last start noted, if it has not yet written to the folder."""
    try:
        note = json.loads(run_folder.read_bytes(_note_of(folder)))
        note["error"], note["code"] = str(note["error"]), int(note["code"])
        return note if note["events"] == _events(folder) else None
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):
        return None


def _birth(pid: int) -> dict[str, Any]:
    """Identify a process of this machine: its start in clock ticks since the boot, and the host; nothing if it is gone
    or a zombie.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return {}
    return {} if fields[0] == "Z" else {"born": fields[19], "host": socket.gethostname()}


def _runs(note: dict[str, Any]) -> bool:
    """Whether the start that left a note still goes on, on this machine."""
    born = _birth(note["pid"]) if isinstance(note.get("pid"), int) else {}
    return bool(born) and born.items() <= note.items()


def _note_of(folder: Path) -> Path:
    cache = Path(os.environ.get("CHATGOT_CACHE") or Path.home() / ".cache" / "chatgot")
    return cache / "starts" / f"{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]}.json"


def _events(folder: Path) -> int:
    """Size of events.jsonl, which every start that has come further makes longer."""
    try:
        return (folder / run_folder.EVENTS).stat().st_size
    except OSError:
        return 0


def holder_of_lock(folder: Path) -> str | None:
    """Say which process holds the lock of a run folder; None: nobody does.

    A lock of this machine's is looked up without touching it, since a run that starts in that moment would be refused.
    """
    try:
        file = run_folder.open_file(folder / run_folder.LOCK)
    except FileNotFoundError:
        return None
    text = ""
    try:
        text, status = run_folder.holder_of(file), os.fstat(file)
        if f"on host {socket.gethostname()}," in text:
            place = f":{status.st_ino} "  # the device before it is not always that of stat
            lines = Path("/proc/locks").read_text(encoding="utf-8").splitlines()
            return text if any("FLOCK" in line and place in line for line in lines) else None
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return text
    finally:
        os.close(file)
