"""`chatgot report`: runs in one HTML file that needs no network, drawn from their run folders alone.

The file holds the numbers as JSON, plotly's JavaScript, and report.html, which draws them.
"""

from __future__ import annotations

import html
import importlib.resources
import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import chatgot.run_folder as run_folder
from chatgot.distributed import python_path
from chatgot.errors import ConfigError, MachineError
from chatgot.files import write_atomically
from chatgot.observe.curves import at_steps, drawn, last_numbers, read_curves, show, step_of
from chatgot.observe.goodput import PARTS
from chatgot.observe.journal import read_lines
from chatgot.observe.status import status
from chatgot.version import __version__

SAMPLES, SAMPLE_BYTES = 100, 1 << 16
"""How many of a run's samples are shown, and how many bytes of one are read."""
EVENTS, LONGEST_FIELD = 2000, 600
"""How many events of a run are shown, and how many characters of one's longest field."""
STARTS = ("started", "resumed")
_QUIET = ("goodput", "memory")
"""Events that have a place of their own in the report."""
_EVERY = 60.0
"""Seconds between two reports of a run that goes on."""

logger = logging.getLogger(__name__)


def report(runs: Sequence[Path], out: Path | None = None, ending: bool = False) -> Path:
    """Write the report of one run or the comparison of several; returns its path.

    Args:
        out: default: report.html in the run folder, or of several runs in the current one.
        ending: see `status`.

    Raises:
        ConfigError: not a run folder, or the file cannot be written.
        MachineError: plotly is not installed.
    """
    if out is None:
        out = runs[0] / run_folder.REPORT if len(runs) == 1 else Path(run_folder.REPORT)
    script = _plotly()
    for run in runs:
        run_folder.check(run)
    names = _names(runs)
    data = {
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "chatgot": __version__,
        "parts": PARTS,
        "runs": [{"name": name, **collect(run, ending)} for name, run in zip(names, runs)],
    }
    page = importlib.resources.files("chatgot.observe").joinpath("report.html").read_text(encoding="utf-8")
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")  # no text of a run ends the element it is in
    filled = {"TITLE": html.escape(", ".join(names)), "DATA": text, "PLOTLY": script}
    page = re.sub(r"/\*(TITLE|DATA|PLOTLY)\*/", lambda place: filled[place[1]], page)
    try:
        write_atomically(out, page)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror}") from error
    return out


def report_or_show(runs: Sequence[Path], out: Path | None, terminal: bool, follow: bool) -> None:
    """`chatgot report`: write the file, or show one run here.

    Raises:
        ConfigError: what is asked for does not go together; see `report` and `show`.
    """
    if not (terminal or follow):
        print(f"report: {report(runs, out)}")
    elif out is not None or len(runs) > 1:
        raise ConfigError("chatgot report --terminal: shows one run and writes no file; leave out --out and other runs")
    else:
        show(runs[0], follow)


def _plotly() -> str:
    """The JavaScript that plotly's Python package carries; importing the package takes a second and is not needed."""
    found = importlib.util.find_spec("plotly")
    if found is None or found.origin is None:
        raise MachineError("the report needs plotly, which is not installed: pip install plotly")
    return (Path(found.origin).parent / "package_data" / "plotly.min.js").read_text(encoding="utf-8")


def _names(runs: Sequence[Path]) -> list[str]:
    """Short names of run folders, no two of them the same."""
    names = [run.resolve().name for run in runs]
    return [name if names.count(name) == 1 else str(run) for name, run in zip(names, runs)]


def collect(run: Path, ending: bool = False) -> dict[str, Any]:
    """Everything that the report says of one run, as JSON can hold it.

    Raises:
        ConfigError: a file of the run folder cannot be read.
    """
    events = [event for event in read_lines(run / run_folder.EVENTS) if event is not None and "event" in event]
    tables = read_curves(run / run_folder.METRICS)
    curves = {kind: drawn(table) for kind, table in tables.items()}
    train = tables.get("train")
    shown = _shown(events)
    for curve in (*curves.values(), shown):
        last = [span[-1] for span in curve["steps"]]
        for axis, metric in (("tokens", "data/tokens"), ("wall", "goodput/wall_seconds")):
            curve[axis] = at_steps(train, metric, last) if train else [None] * len(last)
    said, code = status(run, ending)
    settings = run_folder.flattened(run_folder.read(run, run_folder.RUN))
    settings |= run_folder.flattened(run_folder.read(run, run_folder.DS_CONFIG), "ds.")
    told = [event for event in events if event["event"] == "goodput"]
    memory = [event for event in events if event["event"] == "memory"]
    return {
        "folder": str(run),
        "state": said,
        "exit_code": code,
        "numbers": last_numbers(tables),
        "curves": curves,
        "events": shown,
        "goodput": told[-1] if told else None,
        "memory": memory[-1] if memory else None,
        "starts": _starts(events),
        "samples": _samples(run / run_folder.SAMPLES),
        "settings": {key: json.dumps(value, ensure_ascii=False) for key, value in settings.items()},
        "environment": run_folder.flattened(run_folder.read(run, run_folder.ENVIRONMENT)),
        "tokenizer": _tokenizer(run / run_folder.TOKENIZER),
    }


def _shown(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The events of the time line. Where there are too many, saves are thinned first, and then the oldest go."""
    told = [event for event in events if event["event"] not in _QUIET and step_of(event) is not None]
    left_out = 0
    if len(told) > EVENTS:
        saves = [event for event in told if event["event"] == "saved"]
        others = len(told) - len(saves)
        every = max(1, -(-len(saves) // max(1, EVENTS - others)))
        kept = {id(event) for event in saves[::-every]}
        thinned = [event for event in told if event["event"] != "saved" or id(event) in kept][-EVENTS:]
        left_out, told = len(told) - len(thinned), thinned
    own = ("event", "step", "time", "seconds_since_start", "setup", "adapted", "changes")
    return {
        "steps": [[step_of(event)] for event in told],
        "kinds": [event["event"] for event in told],
        "times": [event.get("time") for event in told],
        "texts": ["; ".join(_field(*pair) for pair in event.items() if pair[0] not in own) for event in told],
        "left_out": left_out,
    }


def _field(name: str, value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"{name}: {text if len(text) <= LONGEST_FIELD else text[:LONGEST_FIELD] + '...'}"


def _starts(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every start of the run: when, from which step, on what, how long it is known to have lived, what had changed,
    and whether it was proved to be the same run.
    """
    starts: list[dict[str, Any]] = []
    for event in events:
        kind = event["event"]
        if kind in STARTS:
            topology = (event.get("setup") or {}).get("topology", {})
            kept = {name: event.get(name) for name in ("time", "step", "world_size", "zero_stage", "precision", "from")}
            starts.append(
                {
                    **kept,
                    "kind": kind,
                    "device": topology.get("device"),
                    "changes": event.get("changes") or [],
                    "adapted": event.get("adapted") or [],
                    "end": "no word: killed, or still running",
                    "proof": "",
                }
            )
        if not starts:
            continue
        starts[-1]["last"] = event.get("time")
        if kind in ("resume_verified", "resume_differs", "resume_not_compared"):
            said = kind.removeprefix("resume_").replace("_", " ")
            if kind == "resume_verified":
                said += f" {event.get('steps')}/{event.get('of')} steps, {event.get('compares')}"
            starts[-1]["proof"] = said
        elif kind in ("finished", "preempted", "failed", "out_of_memory"):
            why = event.get("signal") or event.get("error") or event.get("doing") or ""
            starts[-1]["end"] = f"{kind.replace('_', ' ')} at step {event.get('step')}{': ' if why else ''}{why}"
    for start in starts:
        try:
            lived = datetime.fromisoformat(start["last"]) - datetime.fromisoformat(start["time"])
            start["device_hours"] = lived.total_seconds() / 3600 * int(start["world_size"] or 1)
        except (TypeError, ValueError):
            start["device_hours"] = None
    return starts


def _samples(folder: Path) -> list[dict[str, Any]]:
    """The samples of a run, evenly chosen where there are many, and the last one always."""
    paths = sorted(folder.glob("step-*.txt"))
    every = max(1, -(-len(paths) // SAMPLES))
    samples = []
    for path in reversed(paths[::-every]):
        try:
            text = run_folder.read_bytes(path, SAMPLE_BYTES).decode("utf-8", "replace")
        except OSError as error:
            text = f"({error})"
        samples.append({"name": path.stem, "step": int("0" + "".join(filter(str.isdigit, path.stem))), "text": text})
    return samples


def _tokenizer(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(run_folder.read_bytes(path, 1 << 26))
        return {name: tree[name] for name in ("kind", "vocab_size") if name in tree}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        return {"cannot be read": str(error)}


class ReportWriter:
    """Rank 0 writes the report of its run in a process of its own, at the lowest priority. No failure of it reaches
    the run: it is logged.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self._process: subprocess.Popen[bytes] | None = None
        self._began = float("-inf")

    def begin(self, waited: bool = False) -> None:
        """Begin to write, unless the last one is not done yet, or, where it is not `waited` for as the run ends, was a
        moment ago.
        """
        if os.environ.get("CHATGOT_REPORT", "").lower() == "off" or (
            not waited and time.monotonic() - self._began < _EVERY
        ):
            return
        if self._process is not None and self._process.poll() is None:
            return
        self._began = time.monotonic()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "chatgot.observe.report", str(self.run), *(["ending"] if waited else [])],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": python_path()},
                start_new_session=True,  # a Ctrl-C on the terminal is for the training
            )
        except OSError as error:
            logger.warning(f"the report could not be begun: {error}; write it with: chatgot report {self.run}")

    def end(self, seconds: float) -> Path | None:
        """Write it once more and wait for it, at most so long; returns its path, None: it was not written."""
        deadline = time.monotonic() + seconds
        self._wait(seconds)
        self.begin(waited=True)
        seconds = deadline - time.monotonic()
        return self.run / run_folder.REPORT if self._wait(seconds) else None

    def _wait(self, seconds: float) -> bool:
        process, self._process = self._process, None
        if process is None:
            return False
        try:
            _, errors = process.communicate(timeout=seconds)
            why = errors.decode("utf-8", "replace").strip().rsplit("\n", 1)[-1]
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            why = f"it took more than {seconds:g} s"
        if process.returncode:
            logger.warning(f"the report was not written: {why}; write it with: chatgot report {self.run}")
        return process.returncode == 0


if __name__ == "__main__":
    os.nice(19)
    try:
        report([Path(sys.argv[1])], ending="ending" in sys.argv[2:])
    except (ConfigError, MachineError) as refused:
        sys.exit(str(refused))
