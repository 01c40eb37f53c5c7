"""The run folder's two append-only records: metrics.jsonl (the truth every plot is drawn from) and events.jsonl.

One JSON object a line, ASCII: the metrics of a logged step or of an evaluation, or the digest of a step
(proof/digest.py), of which every step has one. A number is written with repr, which gives back the same bits when it
is read. JSON knows no NaN or infinity, so a non-finite metric is written as the string "nan", "inf" or "-inf", and
`read_journal` turns it back into a float. A kill leaves at most one broken line, the last: every line is a single
O_APPEND write.
"""

from __future__ import annotations

import json
import logging
import math
import numbers
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO, Generic, SupportsFloat, TypeVar

from chatgot.errors import ConfigError
from chatgot.run_folder import open_file

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
    "sample/copied_fraction",
    "sample/longest_copy",
    "goodput/wall_seconds",
)
"""Every metric name. Losses in nats per token; tokens_per_sec over all ranks; peak_gib the maximum over ranks;
copied_fraction of the characters drawn, in passages of 40 or more, longest_copy in characters, 0 where there is none;
wall_seconds since the run's first start, what lies between two starts included (observe/goodput.py)."""

NON_FINITE = ("nan", "inf", "-inf")
"""How JSON, which has no words for them, is given numbers that are not finite."""

LARGEST, LONGEST = 64 << 30, 1 << 20
"""Bytes of a file that is read, and of a line; a longer line is a broken one."""

_STEP = re.compile(rb'\{"step": (\d{1,18})[,}]')
"""How a line of the journal begins."""
_BLOCK = 1 << 20

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Tolerant:
    """Swallow OSError, warn once, count what is lost, and say when writing (or what else is done) works again."""

    def __init__(self, what: str, done: str = "written") -> None:
        """`what` is counted: 'lines of metrics.jsonl'."""
        self.what, self._done = what, done
        self.lost = 0
        """Since it began to fail; 0 while it works."""

    def attempt(self, write: Callable[[], object]) -> bool:
        """Call `write`; returns whether it worked. Raises whatever is no OSError."""
        try:
            write()
        except OSError as error:
            if not self.lost:
                more = "training goes on without them, every further one is tried"
                logger.warning(f"{self.what} cannot be {self._done}: {error}; {more}")
            self.lost += 1
            return False
        if self.lost:
            logger.info(f"{self.what} can be {self._done} again; {self.lost} were lost")
            self.lost = 0
        return True


class LineFile:
    """An append-only file of JSON lines. A line that the file system refuses is lost with a warning; the next one that
    is written follows a record of the gap: {"step": 8, "lost_lines": 3, "lost_from_step": 7}.

    A broken line at the end of the file that is opened is said, left as it is and only terminated, so that the lines
    that follow can be read; `read_journal` then counts it.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self._writer = Tolerant(f"lines of {self.path}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fd: int | None = open_file(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        self._torn = False
        self._lost: list[int] = []
        """Steps of the lines that were lost since one was written."""
        size = os.fstat(self._fd).st_size
        if size and os.pread(self._fd, 1, size - 1) != b"\n":
            self._writer.attempt(lambda: self._write(b"\n"))
            what = "the last line was cut off (the run was killed while it was written)"
            logger.info(f"{self.path}: {what}; it stays, and new lines follow it")

    def write_lines(self, *records: Mapping[str, Any]) -> None:
        """Write lines, fresh ones after one that was lost. Raises ValueError: closed, or not for JSON."""
        gap = []
        if self._lost:
            gap = [{"step": max(self._lost), "lost_lines": len(self._lost), "lost_from_step": min(self._lost)}]
        lines = [json.dumps(finite(record), allow_nan=False) for record in (*gap, *records)]
        if not self._writer.attempt(lambda: self._write("".join(f"{line}\n" for line in lines).encode("ascii"))):
            self._lost += [record.get("step", 0) for record in records]
        else:
            self._lost.clear()

    def flush(self) -> None:
        """Let what was written reach the disk."""
        if self._fd is not None:
            self._writer.attempt(lambda: os.fsync(self._fd or 0))

    def _write(self, line: bytes) -> None:
        if self._fd is None:
            raise ValueError(f"{self.path} is closed")
        rest = memoryview(b"\n" + line if self._torn else line)
        self._torn = True
        while rest:  # one write, unless the file system takes less than it was given
            rest = rest[os.write(self._fd, rest) :]
        self._torn = False

    def close(self) -> None:
        """Give back the descriptor; the lines are with the kernel when `append` returns. Idempotent."""
        if self._fd is not None:
            if self._lost:
                self.write_lines()
            os.close(self._fd)
            self._fd = None


class Journal(LineFile):
    """Writes metrics.jsonl. Rank 0 owns it."""

    def append(self, record: Mapping[str, SupportsFloat | None]) -> None:
        """Write one optimizer step's metrics: {"step": 250, "train/loss": 1.48, ...}; one that is None is left out.

        Raises:
            ValueError: "step" is not a whole number >= 0, a name is not in METRICS, a value is not a number.
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
        self.write_lines(line)

    def digest(self, step: int, digest: Mapping[str, Any]) -> None:
        """Write the digest of one optimizer step (proof.digest.Digest.to_json), on a line of its own."""
        self.write_lines({"step": int(step), "digest": digest})


class Events(LineFile):
    """Writes events.jsonl: started, resumed, saved, skipped step, preempted, finished, ... Rank 0 owns it.

    `time` is UTC for people; `seconds_since_start` counts from this object's construction on the monotonic clock,
    because the wall clock may jump.
    """

    def __init__(self, path: str | os.PathLike, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start = clock()
        super().__init__(path)

    def event(self, kind: str, **fields: Any) -> None:
        """Write one event; a Path is written as text. Raises ValueError for a field named like one that every event
        has, TypeError for a value that JSON cannot hold.
        """
        own = {
            "event": kind,
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "seconds_since_start": round(self._clock() - self._start, 3),
        }
        if clash := own.keys() & fields.keys():
            raise ValueError(f"event {kind!r}: the fields {sorted(clash)} are every event's own")
        self.write_lines({**own, **fields})


def read_lines(
    path: str | os.PathLike, after: int | None = None, without: bytes | None = None
) -> Iterator[dict[str, Any] | None]:
    """Read a metrics.jsonl or events.jsonl record by record, in the order of writing; a missing file has none. None
    stands for a broken line, which a kill cut off (or a power cut filled with zeros).

    Args:
        after: only what follows the last line of a step that is not above this one; found from the end.
        without: leave out lines that contain this, unparsed.
    """
    try:
        file = os.fdopen(open_file(Path(path)), "rb")
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    with file:
        if (size := os.fstat(file.fileno()).st_size) > LARGEST:
            raise ConfigError(f"{path}: has {size} bytes, and at most {LARGEST} are read; move it away")
        if after is not None:
            ends = (end for step, end, line in _steps_from_the_end(file, size) if step <= after and _parsed(line))
            file.seek(next(ends, 0))
        while line := file.readline(LONGEST):
            if line == b"\n" or (without is not None and without in line):
                continue
            whole = line
            while len(whole) == LONGEST and not whole.endswith(b"\n"):
                whole = file.readline(LONGEST)  # the rest of a line that is too long
            yield _parsed(line)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # includes UnicodeDecodeError
        return None
    return record if isinstance(record, dict) else None


def _steps_from_the_end(file: BinaryIO, size: int) -> Iterator[tuple[int, int, bytes]]:
    """Lines of a journal from the last one on, perhaps broken ones too: the step, where the line ends, and itself."""
    end, rest = size, b""
    while end > 0:
        begin = max(0, end - _BLOCK)
        file.seek(begin)
        lines = (file.read(end - begin) + rest).split(b"\n")
        offset = begin + sum(map(len, lines)) + len(lines) - 1
        for line in reversed(lines[1:] if begin else lines):
            if found := _STEP.match(line):
                yield int(found[1]), min(offset + 1, size), line
            offset -= len(line) + 1
        end, rest = begin, lines[0]
        if len(rest) > LONGEST:
            rest = b""  # of a line that is too long only the beginning counts


def read_journal(path: str | os.PathLike) -> tuple[list[dict[str, Any]], int]:
    """Read all records in the order of writing; returns them and the number of broken lines, which are left out as
    records of gaps are.
    """
    lines = [record for record in read_lines(path) if record is None or "lost_lines" not in record]
    records = [record for record in lines if record is not None]
    return [with_numbers(record) for record in records], len(lines) - len(records)


def with_numbers(record: dict[str, Any]) -> dict[str, Any]:
    """Return the record of a metrics.jsonl with numbers where non-finite ones are written as text."""
    return record | {name: float(record[name]) for name in METRICS if record.get(name) in NON_FINITE}


class Branch(Generic[T]):
    """Values by step of the run as it stands, filled in the order of writing.

    A step lower than the one before it means that the run was resumed from an older checkpoint: what had been written
    from that step on belongs to a past that was given up.
    """

    def __init__(self) -> None:
        self.by_step: dict[int, T] = {}
        self._last = -1

    def go_to(self, step: int, once: bool = False) -> dict[int, T] | None:
        """Follow the run to `step`; returns what is given up if it goes back there, None if it goes on. `once`: a step
        has one value, so that a second one means going back, too.
        """
        back = step < self._last or (once and step in self.by_step)
        self._last = step
        if not back:
            return None
        given_up = {}
        while self.by_step and (newest := next(reversed(self.by_step))) >= step:
            given_up[newest] = self.by_step.pop(newest)
        return given_up


def last_step(path: str | os.PathLike) -> int | None:
    """Find the step of the last whole line, where the run stands; None: there is none."""
    try:
        with os.fdopen(open_file(Path(path)), "rb") as file:
            lines = _steps_from_the_end(file, os.fstat(file.fileno()).st_size)
            return next((step for step, _, line in lines if _parsed(line)), None)
    except OSError:
        return None


def newest_step(path: str | os.PathLike) -> int | None:
    """Find the highest step whose metrics were ever logged, given-up pasts included; None: there is none."""
    records = read_lines(path, without=b'"digest"')
    steps = (record["step"] for record in records if record is not None and isinstance(record.get("step"), int))
    return max(steps, default=None)


def finite(value: Any) -> Any:
    """Write non-finite floats as strings and paths as text, all the way down."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return str(value) if isinstance(value, Path) else value
