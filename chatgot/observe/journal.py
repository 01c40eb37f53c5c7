"""The run folder's two append-only records: metrics.jsonl (the truth every plot is drawn from) and events.jsonl.

One JSON object a line, ASCII: the metrics of a logged step or of an evaluation, or the digest of a step
(observe/digest.py), of which every step has one. A number is written with repr, which gives back the same bits when it
is read. JSON knows no NaN or infinity, so a non-finite metric is written as the string "nan", "inf" or "-inf", and
`read_journal` turns it back into a float. A kill leaves at most one broken line, the last: every line is a single
O_APPEND write.
"""

from __future__ import annotations

import json
import math
import numbers
import os
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, SupportsFloat

METRICS = (
    "train/loss",
    "val/loss",
    "val/bits_per_char",
    "optim/lr",
    "optim/grad_norm",
    "optim/loss_scale",
    "optim/skipped_steps",
    "perf/tokens_per_sec",
    "perf/step_ms",
    "perf/mfu",
    "mem/peak_gib",
    "data/tokens",
)
"""Every metric name there is. Losses in nats per token; tokens_per_sec over all ranks; peak_gib the maximum over
ranks.
"""

NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
"""How JSON, which has no words for them, is given numbers that are not finite."""


class Patient:
    """Writing that outlives a disk that is full or ill: training goes on, and what could not be written is counted and
    said.

    It speaks once when writing begins to fail, and once when it works again.
    """

    def __init__(self, what: str, say: Callable[[str], None]) -> None:
        """`what` is counted: 'lines of metrics.jsonl'."""
        self.what = what
        self.lost = 0
        """Since writing began to fail; 0 while it works."""
        self._say = say

    def attempt(self, write: Callable[[], Any]) -> bool:
        """Call `write`; whether it worked. An OSError is kept here; anything else is raised."""
        try:
            write()
        except OSError as error:
            if not self.lost:
                self._say(
                    f"WARNING: {self.what} cannot be written: {error}; training goes on without them, every further "
                    f"one is tried"
                )
            self.lost += 1
            return False
        if self.lost:
            self._say(f"{self.what} can be written again; {self.lost} were lost")
            self.lost = 0
        return True


class LineFile:
    """An append-only file of JSON lines.

    `note` is None, or says that the file ended in a broken line when it was opened. That line is left as it is and only
    terminated, so that the lines that follow can be read; `read_lines` then counts it.
    """

    def __init__(self, path: str | os.PathLike, say: Callable[[str], None] | None = None) -> None:
        """With `say`, a line that the file system refuses is lost with a warning (`Patient`); without, `append`
        raises.
        """
        self.path = Path(path)
        self._patient = None if say is None else Patient(f"lines of {self.path}", say)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fd: int | None = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._torn = False
        self.note: str | None = None
        size = os.fstat(self._fd).st_size
        if size and os.pread(self._fd, 1, size - 1) != b"\n":
            self._attempt(b"\n")
            self.note = f"{self.path}: the last line was cut off (the run was killed while it was written); it stays, and new lines follow it"

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line.

        Raises:
            ValueError: closed, or a value that JSON cannot hold.
            OSError: there is no `say`, and the file system refused (full, read-only). The next append starts on a fresh
                line.
        """
        self._attempt(json.dumps(_finite(record), allow_nan=False).encode("ascii") + b"\n")

    def _attempt(self, line: bytes) -> None:
        if self._patient is None:
            self._write(line)
        else:
            self._patient.attempt(lambda: self._write(line))

    def _write(self, line: bytes) -> None:
        if self._fd is None:
            raise ValueError(f"{self.path} is closed")
        rest = memoryview(b"\n" + line if self._torn else line)
        self._torn = True
        while rest:  # one write, unless the file system takes less than it was given
            rest = rest[os.write(self._fd, rest) :]
        self._torn = False

    def close(self) -> None:
        """Idempotent. Lines are in the kernel's hands when `append` returns; close only gives back the descriptor."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class Journal:
    """metrics.jsonl. Rank 0 owns it."""

    def __init__(self, path: str | os.PathLike, say: Callable[[str], None] | None = None) -> None:
        """With `say`, an ill disk costs lines and not the run; see `LineFile`."""
        self._lines = LineFile(path, say)
        self.note = self._lines.note
        """None, or the report of a broken last line found on opening."""

    def append(self, record: Mapping[str, SupportsFloat | None]) -> None:
        """Write the metrics of one optimizer step: {"step": 250, "train/loss": 1.48, ...}. A metric that is None is
        left out.

        Raises:
            ValueError: "step" is missing or not a whole number >= 0, a name that is not in METRICS, a value that is not
                a number.
        """
        step = record.get("step")
        if not isinstance(step, numbers.Integral) or isinstance(step, bool) or int(step) < 0:
            raise ValueError(f"a journal record needs 'step', a whole number >= 0; got {step!r}")
        line: dict[str, float | int] = {"step": int(step)}
        for name, value in record.items():
            if name == "step" or value is None:
                continue
            if name not in METRICS:
                raise ValueError(f"unknown metric {name!r} (known: {', '.join(METRICS)})")
            if not isinstance(value, numbers.Real) or isinstance(value, bool):
                raise ValueError(f"metric {name} = {value!r}: expected a number")
            line[name] = int(value) if isinstance(value, numbers.Integral) else float(value)
        self._lines.append(line)

    def digest(self, step: int, digest: Mapping[str, Any]) -> None:
        """Write the digest of one optimizer step (observe.digest.Digest.to_json), on a line of its own."""
        self._lines.append({"step": int(step), "digest": digest})

    def close(self) -> None:
        """Idempotent."""
        self._lines.close()


class Events:
    """events.jsonl: started, resumed, saved, skipped step, preempted, finished, ... Rank 0 owns it.

    `time` is UTC for people; `seconds_since_start` counts from this object's construction on the monotonic clock,
    because the wall clock may jump.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        clock: Callable[[], float] = time.monotonic,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """With `say`, an ill disk costs lines and not the run; see `LineFile`."""
        self._clock = clock
        self._start = clock()
        self._lines = LineFile(path, say)
        self.note = self._lines.note
        """None, or the report of a broken last line found on opening."""

    def event(self, kind: str, **fields: Any) -> None:
        """Write one event. Fields are JSON values (a Path is written as text).

        Raises:
            ValueError: a field named like one of the three that every event has; TypeError: a value that JSON cannot
                hold.
        """
        own = {
            "event": kind,
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "seconds_since_start": round(self._clock() - self._start, 3),
        }
        if clash := own.keys() & fields.keys():
            raise ValueError(f"event {kind!r}: the fields {sorted(clash)} are every event's own")
        self._lines.append({**own, **fields})

    def close(self) -> None:
        """Idempotent."""
        self._lines.close()


def lines(path: str | os.PathLike) -> Iterator[dict[str, Any] | None]:
    """The records of a metrics.jsonl or events.jsonl one by one, in the order of writing; None for a broken line.

    A broken line is one that a kill cut off (or that a power cut filled with zeros). A file that does not exist has no
    lines.
    """
    if not Path(path).exists():
        return
    with open(path, "rb") as file:
        for line in file:
            if line == b"\n":
                continue
            try:
                record = json.loads(line)
            except ValueError:  # includes UnicodeDecodeError
                record = None
            yield record if isinstance(record, dict) else None


def read_journal(path: str | os.PathLike) -> tuple[list[dict[str, Any]], int]:
    """All records of a metrics.jsonl or events.jsonl in the order of writing, and the number of broken lines, which are
    left out.
    """
    records, broken = [], 0
    for record in lines(path):
        if record is None:
            broken += 1
            continue
        for name in METRICS:
            value = record.get(name)
            if isinstance(value, str) and value in NON_FINITE:
                record[name] = NON_FINITE[value]
        records.append(record)
    return records, broken


def live_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The history of the run as it stands: one record per logged step, sorted by step; digests are left out.

    Records of the same step are merged, the later value winning. A step lower than the one before it means that the run
    was resumed from an older checkpoint: what had been written from that step on belongs to a past that was given up,
    and is dropped.
    """
    live: dict[int, dict[str, Any]] = {}
    last = -1
    for record in read_journal(path)[0]:
        step = record["step"]
        if step < last:
            live = {s: r for s, r in live.items() if s < step}
        last = step
        if record.pop("digest", None) is None:
            live[step] = {**live.get(step, {}), **record}
    return [live[step] for step in sorted(live)]


def newest_step(path: str | os.PathLike) -> int | None:
    """The highest step ever logged, given-up pasts included: what a dashboard that cannot forget has already seen.
    None: no step.

    Steps with a digest alone are no dashboard's.
    """
    return max(
        (record["step"] for record in lines(path) if record is not None and "digest" not in record), default=None
    )


def _finite(value: Any) -> Any:
    """`value` with non-finite floats as strings and paths as text, all the way down."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, Path) else value
