"""Notice that this rank makes no progress, write where it stands into the run folder, and end it with exit code 6.

A rank that hangs is silent, and so are the others, who wait for it in a collective. Every rank watches itself; what all
of them wrote into `stacks/` then tells which one is not where the others are.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

import chatgot.run_folder as run_folder
from chatgot.distributed import COLLECTIVES
from chatgot.errors import EXIT_ENVIRONMENT

logger = logging.getLogger(__name__)
T = TypeVar("T")
PATIENCE = 6
"""How many times longer than the timeout a part of the start, a first step, which may compile, a save and a rollback
may take.
"""
JOINING, JOINING_SECONDS = 2, 60.0
"""The same, for the ranks to find each other, and how long that may take at least."""
LONGEST = 3
"""Nothing is a hang that takes less than this times the longest pause between two signs of life so far."""
TICK_SECONDS = 0.2
OTHERS_SECONDS = 1.2
"""After its own alarm, how long a rank waits at most for what the others write."""
WARN_SECONDS = 2.0
"""How long a rank is looked at that has been quiet for the timeout: at first it may just wait for a sign of life."""
WORK_SECONDS = 0.5
"""CPU time that a process uses for itself between two signs of life, where it works without giving any."""
_WAITS = "waits for the others in"
_FRAME = re.compile(r'  File "(.*?)", line (\d+) in (\S+)')
_WAITING = ("distributed_c10d.py", "torch/distributed", "deepspeed/comm")
"""Files of which the innermost frame says that a rank waits for the others."""
_STDERR = 2


class Work:
    """Notices whether this process has worked since the last call, by the CPU time of all threads but the caller's."""

    def __init__(self) -> None:
        self._seen = self._used()

    def __call__(self) -> bool:
        if self._used() - self._seen < WORK_SECONDS:
            return False
        self._seen = self._used()
        return True

    @staticmethod
    def _used() -> float:
        return time.process_time() - time.thread_time()


@dataclass
class Watchdog:
    """Within `with`, ends this process when `beat` is not called for `seconds`; 0: never. `starting` is the same for
    the time before the run folder is this run's: something is written there after an alarm only.

    A part of the run that may take longer, and a step after long pauses, is named after `seconds` too, with the time
    that it has. A thread of ours looks on. faulthandler's, which needs no GIL, writes the stacks of a rank that holds
    the GIL; that rank cannot end itself, and is ended by its launcher when the others have ended.
    """

    out_dir: Path
    rank: int
    world_size: int
    seconds: float
    doing: str = "the start"
    """What is running: 'step 7', for messages."""
    tell: Callable[[str], object] = lambda report: None
    """Records the report of all ranks; called on the rank that prints it."""
    patience: float = PATIENCE
    """How many times longer than `seconds` the next sign of life may take."""
    _works: bool = False
    _beats: int = 0
    _left: threading.Event = field(default_factory=threading.Event)
    _file: IO[Any] | None = None
    _prefix: str = ""
    _thread: threading.Thread | None = None

    def beat(self, patience: float = 1, doing: str | None = None, works: bool = False) -> None:
        """Give a sign of life; the next one may take `patience` times longer than usual.

        Args:
            doing: what begins now.
            works: it gives no sign of life, and does not hang as long as it uses the CPU.
        """
        if doing is not None:
            self.doing = doing
        self._beats, self.patience, self._works = self._beats + 1, patience, works

    @property
    def collectives(self) -> datetime.timedelta:
        """How long a collective may wait for another rank: beyond the longest patience, since the watchdog names it."""
        seconds = max((PATIENCE + 1) * self.seconds, JOINING_SECONDS)
        return datetime.timedelta(seconds=seconds) if self.seconds else COLLECTIVES

    def joins(self) -> None:
        """Give a sign of life, and to the ranks the time to find each other."""
        self.beat(max(JOINING, JOINING_SECONDS / (self.seconds or 1)), "joining the process group")

    def beating(self, items: Iterable[T]) -> Iterator[T]:
        """Give a sign of life before every item is used; the first keeps the patience of before."""
        for item in items:
            self.beat(self.patience)
            yield item

    def __enter__(self) -> Watchdog:
        if not self.seconds:
            return self
        path = self._path(self.rank)
        try:
            path.parent.mkdir(exist_ok=True)
            if path.exists() and path.stat().st_size:  # of a start that hung: somebody may still want to read it
                path.replace(path.with_name(f"{path.stem}.before.txt"))
            if self.rank == 0:
                self._others_alarm.unlink(missing_ok=True)
            self._file = os.fdopen(
                run_folder.open_file(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "w", encoding="utf-8"
            )
        except OSError as error:
            logger.warning(f"{path}: {error.strerror}: this run is not watched for hangs")
        else:
            self._begin()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end()
        if self._file is not None:
            self._file.close()
            self._file = None
            with contextlib.suppress(OSError):  # the folder may be gone, or not empty
                self._path(self.rank).unlink()
                self._path(self.rank).parent.rmdir()

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Watch the start; a rank that holds the GIL then writes its stacks to stderr."""
        self._prefix = "start-"
        if self.seconds:
            if self.rank == 0:
                with contextlib.suppress(OSError):  # of an earlier start; mostly there is none, nor a folder
                    self._others_alarm.unlink()
            self._begin()
        try:
            yield
        finally:
            self._end()
            self._prefix = ""

    def _begin(self) -> None:
        self._left.clear()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def _end(self) -> None:
        self._left.set()
        if self._thread is not None:
            self._thread.join()  # does not come back from an alarm, during which the others may be gone already
            faulthandler.cancel_dump_traceback_later()
            self._thread = None

    @property
    def _others_alarm(self) -> Path:
        """A file that the first rank in alarm makes: the others then write at once where they stand."""
        return self.out_dir / run_folder.STACKS / f"{self._prefix}hung"

    def _path(self, rank: int) -> Path:
        return self.out_dir / run_folder.STACKS / f"{self._prefix}rank-{rank:05d}.txt"

    def _watch(self) -> None:
        seen, patience, allowed, quiet, longest, before = -1, 0, 0.0, 0.0, 0.0, time.monotonic()
        tick, worked, told = min(TICK_SECONDS, self.seconds / 5), Work(), False
        while not self._left.wait(tick):
            now = time.monotonic()
            # a process that was stopped as a whole (Ctrl-Z) has not hung
            quiet += min(now - before, tick + min(1.0, self.seconds / 5))
            before = now
            if self._works and worked():
                self._beats += 1
            if self._beats != seen:
                if quiet > self.seconds * patience and self._file is not None:  # faulthandler's thread may have written
                    self._file.truncate(0)
                longest = max(longest, quiet if patience == 1 else 0.0)
                seen, patience, quiet, told = self._beats, self.patience, 0.0, False
                allowed = max(self.seconds * patience, LONGEST * longest)
                faulthandler.dump_traceback_later(self.seconds * patience + tick / 2, file=self._file or _STDERR)
            elif quiet > allowed or (quiet > self.seconds / 2 and self._others_alarm.exists()):
                try:
                    self._alarm(quiet)
                finally:  # also where the folder cannot be written to
                    os._exit(EXIT_ENVIRONMENT)
            elif quiet > self.seconds and not told:
                told = self._warn(quiet, allowed) or quiet > self.seconds + WARN_SECONDS

    def _alarm(self, quiet: float) -> None:
        """Write this rank's stacks, and report all ranks' if it is the first one that can."""
        faulthandler.cancel_dump_traceback_later()
        host, path = socket.gethostname(), self._path(self.rank)
        own = f"chatgot: rank {self.rank} on {host}: no progress for {quiet:.0f} s in {self.doing}"
        print(f"{own}; its stacks are in {path}", file=sys.stderr, flush=True)
        if self._prefix:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._others_alarm.touch()
        if self._file is None:
            self._file = os.fdopen(run_folder.open_file(path, os.O_WRONLY | os.O_CREAT), "w", encoding="utf-8")
        self._file.truncate(0)
        self._write(self._file)
        deadline, before, rows = time.monotonic() + OTHERS_SECONDS, None, self._rows()
        while time.monotonic() < deadline and (rows != before or not all(answers for _, answers in rows)):
            time.sleep(0.1)
            before, rows = rows, self._rows()
        if self.rank != next(rank for rank, (_, answers) in enumerate(rows) if answers or rank == self.rank):
            time.sleep(OTHERS_SECONDS)  # a launcher that ends the others when one ends shall not cut the report short
        else:
            report = "\n".join(["the run hangs; where the ranks are:", *(f"  {row}" for row, _ in rows)])
            print(f"chatgot: {report}", file=sys.stderr, flush=True)
            if self._prefix:
                self._others_alarm.unlink()
            self.tell(report)

    def _warn(self, quiet: float, allowed: float) -> bool:
        """Say where this rank is that is not yet taken to hang, unless it waits for the others; whether it does not."""
        # in memory: a disk may be what it hangs on
        with os.fdopen(os.memfd_create("stacks"), "w+", encoding="utf-8", errors="replace") as file:
            self._write(file)
            file.seek(0)
            row, _ = _described(self.rank, file.read())
        if _WAITS in row:
            return False
        why = f"no sign of life for {quiet:.0f} s; here that counts as a hang after {allowed:.0f} s"
        with contextlib.suppress(OSError):  # nobody reads stderr any more
            print(f"chatgot: {row}: {why}", file=sys.stderr, flush=True)
        return True

    def _write(self, file: IO[str]) -> None:
        """Write what this rank does, and the stacks of its threads."""
        head = f"rank {self.rank} on {socket.gethostname()}, pid {os.getpid()}: {self.doing}"
        print(head, file=file, flush=True)
        faulthandler.dump_traceback(file)

    def _rows(self) -> list[tuple[str, bool]]:
        return [_described(rank, self._read(rank)) for rank in range(self.world_size)]

    def _read(self, rank: int) -> str:
        path = self._path(rank)
        try:
            if self._prefix and path.stat().st_mtime < self._path(self.rank).stat().st_mtime - self.seconds:
                return ""  # of an earlier start that hung
            return run_folder.read_bytes(path).decode("utf-8", "replace")
        except OSError:
            return ""


def _described(rank: int, text: str) -> tuple[str, bool]:
    """A line of the report, and whether the rank could write its first line itself."""
    if not text:
        return f"rank {rank}: does not answer; it never started, is stopped, dead, or its machine is gone", False
    head = text.partition("\n")[0]
    answers = head.startswith(f"rank {rank} ")
    frames = _FRAME.findall(text[text.rfind("hread 0x") :])  # the main thread comes last
    if not frames:
        return f"{head if answers else f'rank {rank}'}: no stack", answers
    file, line, function = frames[0]
    ours = next((frame for frame in frames if "/chatgot/" in frame[0]), frames[0])
    where = f"{file}:{line} in {function}" + (f", from {ours[0]}:{ours[1]} in {ours[2]}" if ours != frames[0] else "")
    waits = any(name in frame[0] for name in _WAITING for frame in frames[:3])
    verdict = _WAITS if waits else "is in" if answers else "holds Python's lock (GIL) in"
    return f"{head if answers else f'rank {rank}'}: {verdict} {where}", answers
