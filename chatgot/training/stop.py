"""How a run is asked to stop: once politely, twice at once, and by the end of its launcher. Works before torch is
imported.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from chatgot.distributed import tells_of_lost_rank
from chatgot.errors import EXIT_INTERRUPTED, EXIT_SECOND_INTERRUPT, ChatGoTError, RunAgainError
from chatgot.launcher.arguments import on_rank_0
from chatgot.launcher.command import ATTEMPT
from chatgot.launcher.entry import STOPS
from chatgot.launcher.supervisor import PR_SET_PDEATHSIG
from chatgot.observe.status import forget_start, note_refused_start, note_start

STUCK_SECONDS = 2.0
"""After a signal, how long a start may take to come back to Python before its process is ended."""
BEFORE_JOB_ENDS_SECONDS = 120
"""How long before Slurm's job ends a run is saved and ended."""
ORPHAN_SECONDS = 25.0
"""How long a rank whose launcher is gone may take to save and end, before it is killed."""
_GIVES_UP = signal.SIGVTALRM
"""Signal 26, sent by the kernel when the parent is gone; its handler calls alarm(26)."""
_LAUNCHED = (ATTEMPT, "TORCHELASTIC_RUN_ID", "CROSS_RANK", "SLURM_STEP_ID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
"""Variables that tell of a launcher as parent: launch/run, torchrun, DeepSpeed's, srun, mpirun."""


class StopSignals:
    """Within `with`, SIGTERM, SIGINT, SIGUSR1, SIGHUP and the end of the launcher that started this rank raise a flag
    for the loop; a second SIGINT exits 130 at once.

    While the run is `starting` they end it, since nothing can be lost yet; also where the process waits for another
    rank in a call out of Python, which would notice a signal only when the other comes.
    """

    def __init__(self, starting: bool = False, out_dir: Path | None = None) -> None:
        """`out_dir`: of the run, of which `chatgot status` is to know how its start ended, if it came to no step."""
        self.starting = starting
        self.began = time.monotonic()
        """When this start of the run began."""
        self._loops = False
        self.received: str | None = None
        self._out_dir = out_dir
        self._ends_at, self._limit = _end_of_job()
        self._previous: dict[signal.Signals, Any] = {}
        self._writing: int | None = None
        self._left = threading.Event()

    def __enter__(self) -> StopSignals:
        if self._out_dir is not None and on_rank_0():
            note_start(self._out_dir)
        for number in STOPS:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # under nohup, a closed terminal stops nothing
            self._previous[number] = signal.signal(number, self._handle)
        if any(name in os.environ for name in _LAUNCHED):
            ancestors = _ancestors(2 if "CROSS_RANK" in os.environ else 1)  # DeepSpeed's runner is above its launch.py
            threading.Thread(target=self._end_with_launcher, args=(ancestors,), name="launcher", daemon=True).start()
            _end_by_alarm_without_parent()
        if self.starting:
            reading, self._writing = os.pipe()
            os.set_blocking(self._writing, False)
            signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)  # written to at once, wherever Python is
            threading.Thread(target=self._end_if_stuck, args=(reading,), name="stop", daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)  # train.py, or whoever started this process, has blocked them
        return self

    def limit(self, minutes: float | None) -> None:
        """Ask the run to stop so many minutes from now; None: do not."""
        if minutes is not None and time.time() + 60 * minutes < self._ends_at:
            self._ends_at, self._limit = time.time() + 60 * minutes, f"--max_minutes {minutes:g}"

    @property
    def asked_by(self) -> str | None:
        """What asks the run to stop, a signal or the time limit; None: nothing does."""
        return self.received or (self._limit if time.time() > self._ends_at else None)

    def started(self) -> None:
        """From now on something can be lost: signals are left to the loop."""
        self._loops = True  # the loop writes how the run ends
        self._listen_no_more()
        if self._out_dir is not None and on_rank_0():
            forget_start(self._out_dir)

    def _listen_no_more(self) -> None:
        self.starting = False
        if self._writing is not None:
            signal.set_wakeup_fd(-1)
            os.close(self._writing)  # ends the thread
            self._writing = None

    def _end_if_stuck(self, reading: int) -> None:
        while number := os.read(reading, 1):
            time.sleep(STUCK_SECONDS)
            if self.starting and number[0] in STOPS:  # else the handler has been called
                error = _before_the_first_step(signal.Signals(number[0]).name)
                print(f"chatgot: {error}", file=sys.stderr, flush=True)
                if self._out_dir is not None:
                    note_refused_start(self._out_dir, str(error), error.exit_code)
                os._exit(EXIT_INTERRUPTED)
        os.close(reading)

    def _end_with_launcher(self, ancestors: list[int]) -> None:
        """Ask this process to save and end when one of them is gone, and kill it if it does not."""
        while not self._left.wait(0.5):
            if _ancestors(len(ancestors)) != ancestors or _is_orphan(ancestors):
                break
            signal.alarm(0)  # it was but a thread of the parent that ended
        else:
            return
        signal.alarm(_GIVES_UP)
        print("chatgot: the launcher of this rank is gone: saving, as after SIGTERM", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        if not self._left.wait(ORPHAN_SECONDS):
            os.kill(os.getpid(), signal.SIGKILL)

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if self._out_dir is not None and not self._loops and error is not None and self._speaks(error):
            code = error.exit_code if isinstance(error, ChatGoTError) else 1
            note_refused_start(self._out_dir, str(error) or type(error).__name__, code)
        self._listen_no_more()
        self._left.set()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @staticmethod
    def _speaks(error: BaseException) -> bool:
        """Whether it is for this rank to note an error: rank 0 notes what all have met, and a lost one its own."""
        alone = isinstance(error, ChatGoTError) and not error.shared
        return (on_rank_0() and not tells_of_lost_rank(error)) or alone or isinstance(error, RunAgainError)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == "SIGINT":
            os._exit(EXIT_SECOND_INTERRUPT)
        self.received = signal.Signals(number).name
        if self.starting:
            self.starting = False  # once: what ends the run may be cut short by no second one
            raise _before_the_first_step(self.received)


def _end_by_alarm_without_parent() -> None:
    """Let the kernel end this process by SIGALRM, 26 s after its parent is gone: `_end_with_launcher` needs the GIL,
    which another thread may never give back. The signal's handler is C's alarm(), called with the signal's number.

    It takes the place of the SIGKILL that launch/run asks the kernel for, which would lose what is not saved.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(_GIVES_UP, ctypes.cast(libc.alarm, ctypes.c_void_p))
    libc.prctl(PR_SET_PDEATHSIG, _GIVES_UP, 0, 0, 0)


def _end_of_job() -> tuple[float, str]:
    """When to stop because Slurm's job ends (Unix time, before that), and its name; never outside of a job."""
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    return (int(end) - BEFORE_JOB_ENDS_SECONDS if end.isdecimal() else math.inf), "the end of Slurm's job"


def _ancestors(generations: int) -> list[int]:
    """Process ids of the parent, its parent and so on; a process that is gone has none above it."""
    found = [os.getppid()]
    while len(found) < generations:
        try:
            status = Path(f"/proc/{found[-1]}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            break
        found.append(int(status.rpartition(")")[2].split()[1]))  # the name before it may hold anything
    return found


def _is_orphan(ancestors: list[int]) -> bool:
    """Whether DeepSpeed's launch.py or the runner above it was gone before this rank looked for them: the parent is
    another one, or launch.py is init's, in a session neither of init's own, as in a container, nor of systemd's making.
    """
    if "CROSS_RANK" not in os.environ:
        return False
    try:
        if b"deepspeed" not in Path(f"/proc/{ancestors[0]}/cmdline").read_bytes():
            return True
        by_init = ancestors[1:] == [1] and "INVOCATION_ID" not in os.environ
        return by_init and os.getsid(ancestors[0]) != os.getsid(1)
    except OSError:  # launch.py is gone too
        return True


def _before_the_first_step(received: str) -> RunAgainError:
    what = f"stopped by {received} before the first step: nothing is lost"
    error = RunAgainError(f"{what}. Run the same command again to go on")
    error.shared = True  # a launcher sends it to every rank
    return error
