"""Notice that this rank makes no progress, write where it stands into the run folder, and end it with exit code 6.

A rank that hangs is silent, and so are the others, who wait for it in a collective. Every rank watches itself; what all
of them wrote into `stacks/` then tells which one is not where the others are.
"""

from __future__ import annotations

import contextlib
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
from chatgot.errors import EXIT_ENVIRONMENT

logger = logging.getLogger(__name__)
T = TypeVar("T")
PATIENCE = 6
"""How many times longer than the timeout a first step, which may compile, a save and a rollback may take."""
LONGEST = 10
"""Nothing is a hang that takes less than this times the longest pause between two signs of life so far."""
OTHERS_SECONDS = 3.0
"""After its own alarm, how long a rank waits for what the others write."""
_FRAME = re.compile(r'  File "(.*?)", line (\d+) in (\S+)')
_WAITING = ("distributed_c10d.py", "torch/distributed", "deepspeed/comm")
"""Files of which the innermost frame says that a rank waits for the others."""


@dataclass
class Watchdog:
    """Within `with`, ends this process when `beat` is not called for `seconds`; 0: never.

    A thread of ours looks on. faulthandler's, which needs no GIL, writes the stacks of a rank that holds the GIL; that
    rank cannot end itself, and is ended by its launcher when the others have ended.
    """

    out_dir: Path
    rank: int
    world_size: int
    seconds: float
    doing: Callable[[], str]
    """What is running, for the report."""
    tell: Callable[[str], object] = lambda report: None
    """Records the report of all ranks; called on the rank that prints it."""
    patience: int = PATIENCE
    """How many times longer than `seconds` the next sign of life may take."""
    _beats: int = 0
    _left: threading.Event = field(default_factory=threading.Event)
    _file: IO[Any] | None = None
    _thread: threading.Thread = field(init=False)

    def beat(self, patience: int = 1) -> None:
        """Give a sign of life; the next one may take `patience` times longer than usual."""
        self._beats, self.patience = self._beats + 1, patience

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
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._left.set()
        if self._file is not None:
            self._thread.join()  # does not come back from an alarm, during which the others may be gone already
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            with contextlib.suppress(OSError):  # the folder may be gone, or not empty
                self._path(self.rank).unlink()
                self._path(self.rank).parent.rmdir()

    @property
    def _others_alarm(self) -> Path:
        """A file that the first rank in alarm makes: the others then write at once where they stand."""
        return self.out_dir / run_folder.STACKS / "hung"

    def _path(self, rank: int) -> Path:
        return self.out_dir / run_folder.STACKS / f"rank-{rank:05d}.txt"

    def _watch(self) -> None:
        assert self._file is not None
        seen, patience, allowed, quiet, longest, before = -1, 0, 0.0, 0.0, 0.0, time.monotonic()
        tick = min(1.0, self.seconds / 5)
        while not self._left.wait(tick):
            now = time.monotonic()
            quiet += min(now - before, 2 * tick)  # a process that was stopped as a whole (Ctrl-Z) has not hung
            before = now
            if self._beats != seen:
                if quiet > self.seconds * patience:  # faulthandler's thread may have written
                    self._file.truncate(0)
                longest = max(longest, quiet if patience == 1 else 0.0)
                seen, patience, quiet = self._beats, self.patience, 0.0
                allowed = max(self.seconds * patience, LONGEST * longest)
                faulthandler.dump_traceback_later(self.seconds * patience + tick / 2, file=self._file)
            elif quiet > allowed or (quiet > self.seconds / 2 and self._others_alarm.exists()):
                try:
                    self._alarm(quiet)
                finally:  # also where the folder cannot be written to
                    os._exit(EXIT_ENVIRONMENT)

    def _alarm(self, quiet: float) -> None:
        """Write this rank's stacks, and report all ranks' if it is the first one that can."""
        assert self._file is not None
        self._others_alarm.touch()
        faulthandler.cancel_dump_traceback_later()
        self._file.truncate(0)
        host, doing = socket.gethostname(), self.doing()
        print(f"rank {self.rank} on {host}, pid {os.getpid()}: {doing}", file=self._file, flush=True)
        faulthandler.dump_traceback(self._file)
        own = f"chatgot: rank {self.rank} on {host}: no progress for {quiet:.0f} s in {doing}"
        print(f"{own}; its stacks are in {self._path(self.rank)}", file=sys.stderr, flush=True)
        time.sleep(OTHERS_SECONDS)
        rows = [_described(rank, self._read(rank)) for rank in range(self.world_size)]
        if self.rank == next(rank for rank, (_, answers) in enumerate(rows) if answers or rank == self.rank):
            report = "\n".join(["the run hangs; where the ranks are:", *(f"  {row}" for row, _ in rows)])
            print(f"chatgot: {report}", file=sys.stderr, flush=True)
            self.tell(report)

    def _read(self, rank: int) -> str:
        try:
            return run_folder.read_bytes(self._path(rank)).decode("utf-8", "replace")
        except OSError:
            return ""


def _described(rank: int, text: str) -> tuple[str, bool]:
    """A line of the report, and whether the rank could write its first line itself."""
    if not text:
        return f"rank {rank}: does not answer; it is stopped, dead, or its machine is gone", False
    head = text.partition("\n")[0]
    answers = head.startswith(f"rank {rank} ")
    frames = _FRAME.findall(text[text.rfind("hread 0x") :])  # the main thread comes last
    if not frames:
        return f"{head if answers else f'rank {rank}'}: no stack", answers
    file, line, function = frames[0]
    ours = next((frame for frame in frames if "/chatgot/" in frame[0]), frames[0])
    where = f"{file}:{line} in {function}" + (f", from {ours[0]}:{ours[1]} in {ours[2]}" if ours != frames[0] else "")
    waits = any(name in frame[0] for name in _WAITING for frame in frames[:3])
    verdict = "waits for the others in" if waits else "is in" if answers else "holds Python's lock (GIL) in"
    return f"{head if answers else f'rank {rank}'}: {verdict} {where}", answers
