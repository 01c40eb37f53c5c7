"""Ranks, or launch/run of other machines, as processes: start them, pass signals on, see all to their end, and whether
they are started again then.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

import chatgot.run_folder as run_folder
from chatgot.errors import (
    EXIT_CHECKPOINT,
    EXIT_CONFIG,
    EXIT_DATA,
    EXIT_DONE,
    EXIT_ENVIRONMENT,
    EXIT_INTERRUPTED,
    EXIT_NUMERICS,
    EXIT_SECOND_INTERRUPT,
    MachineError,
)

PEERS_END_SECONDS = 5.0
"""After one rank ended badly, the others often end by themselves with the same code: wait so long, then end them."""
PEERS_SAVE_NOTHING_SECONDS = 10.0
"""How long they may take then, at most, where that one was killed, hung or lost another: nothing can be saved."""
NODE_ENDS_SECONDS = 5.0
"""How long a node that is to kill its ranks may take."""
SSH_FAILED = 255
PR_SET_PDEATHSIG = 1  # linux/prctl.h
REFUSALS = (EXIT_CONFIG, EXIT_DATA, EXIT_CHECKPOINT, EXIT_NUMERICS)
FINAL = (EXIT_DONE, *REFUSALS, EXIT_INTERRUPTED, EXIT_SECOND_INTERRUPT)
"""A refusal would refuse again, and an interruption was asked for."""


@dataclass(eq=False)
class Rank:
    """One rank or node, to be started once."""

    name: str
    """'rank 0', or 'host worker-1'."""
    command: Sequence[str]
    environment: Mapping[str, str]
    order: bytes | None = None
    """The first line of its stdin, for a node: signals then go there too, because ssh passes none on."""
    process: subprocess.Popen[bytes] = field(init=False)
    exit_code: int | None = None
    """None until it has ended, -N if signal N ended it."""
    told_to_end: bool = False
    """The launcher, not the user, sent it SIGTERM or SIGKILL: what it ends with says nothing about the cause."""

    def start(self, unblock: set[signal.Signals]) -> None:
        """Start it as a session of its own, with `unblock` unblocked. Raises MachineError."""
        before_exec, stdin = dies_with_this_process(unblock), subprocess.DEVNULL
        if self.order is not None:  # it notices by itself, from the end of its stdin, and lets its ranks save
            before_exec, stdin = functools.partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, unblock), subprocess.PIPE
        try:
            self.process = subprocess.Popen(
                self.command, env=self.environment, stdin=stdin, start_new_session=True, preexec_fn=before_exec
            )
        except OSError as error:
            raise MachineError(f"{self.command[0]}: {self.name} cannot be started: {error.strerror}") from error
        if self.order is not None:
            self._tell(self.order)

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        if self.process.stdin is None:
            self.process.send_signal(number)
            return
        self._tell(f"{number.name}\n".encode())

    def _tell(self, line: bytes) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is ending, and is collected with its exit code
            self.process.stdin.write(line)
            self.process.stdin.flush()

    def kill(self) -> None:
        """Kill it; a node first kills its ranks."""
        if self.process.stdin is not None:
            self.send(signal.SIGINT)
            self.send(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(NODE_ENDS_SECONDS)
        self.process.kill()


def say(message: str) -> None:
    """Print one line on stderr, at once."""
    with contextlib.suppress(OSError):  # the connection to the first launch/run is broken
        print(f"launch/run: {message}", file=sys.stderr, flush=True)


class Supervisor:
    """Starts the ranks once and sees them to their end. The process has one thread, and `stops` and SIGCHLD blocked."""

    def __init__(self, stops: set[signal.Signals], grace: float, out_of_memory: Callable[[], bool]) -> None:
        """`out_of_memory`: whether a rank of these has stored a smaller micro-batch, asked when one ends with 75."""
        self.stops = stops
        self.grace = grace
        self.ran_out = False
        """A rank ran out of memory and has stored a smaller micro-batch; the others were killed."""
        self._out_of_memory = out_of_memory
        self.stopping = False
        """The user sent a stop signal."""
        self.lost: list[str] = []
        """Names of the nodes that ssh did not reach, or lost."""
        self.ranks: list[Rank] = []
        self._ended: list[Rank] = []
        self._end_peers_at: float | None = None
        self._kill_at: float | None = None

    def run(self, ranks: Sequence[Rank]) -> int:
        """Run all ranks; returns the exit code. Each is a session of its own: Ctrl-C reaches it through us, once."""
        try:
            for rank in ranks:
                rank.start(self.stops | {signal.SIGCHLD})
                self.ranks.append(rank)
            interrupts = 0
            while self._alive():
                received = self._next_signal()
                if received == signal.SIGINT:
                    interrupts += 1
                    if interrupts == 2:
                        say("second SIGINT: ranks are killed, nothing is saved")
                        return EXIT_SECOND_INTERRUPT
                if received is not None and received in self.stops:
                    self._forward(received)
                self._collect()
        finally:
            self._kill()
        return self._exit_code()

    def _alive(self) -> list[Rank]:
        return [rank for rank in self.ranks if rank.exit_code is None]

    def _next_signal(self) -> signal.Signals | None:
        """Wait for a signal or the next deadline; deadlines are acted on here."""
        deadline = self._kill_at if self._kill_at is not None else self._end_peers_at
        waited_for = self.stops | {signal.SIGCHLD}
        if deadline is None:
            return signal.Signals(signal.sigwaitinfo(waited_for).si_signo)
        info = signal.sigtimedwait(waited_for, max(0.0, deadline - time.monotonic()))
        if info is not None:
            return signal.Signals(info.si_signo)
        alive = self._alive()
        names = ", ".join(rank.name for rank in alive)
        if self._kill_at is not None:
            say(f"still running though they were told to end, killed now: {names}")
            self._kill()
        else:
            first = next(rank.exit_code for rank in self._ended if rank.exit_code)
            lost = not 0 < first < 128 or first == EXIT_ENVIRONMENT  # a node ends with 128 + the signal
            seconds = min(PEERS_SAVE_NOTHING_SECONDS, self.grace) if lost else self.grace
            say(f"SIGTERM to the rest, and SIGKILL in {seconds:g} s: {names}")
            self._kill_at = time.monotonic() + seconds
            for rank in alive:
                rank.told_to_end = True
                rank.send(signal.SIGTERM)
        return None

    def _forward(self, received: signal.Signals) -> None:
        """To all ranks before any of them has ended, because they agree together on the step to stop at."""
        passed_on = signal.SIGTERM if received == signal.SIGHUP else received
        for rank in self._alive():
            rank.send(passed_on)
        if not self.stopping:
            self.stopping = True
            say(f"{received.name}: {passed_on.name} sent to all ranks, which have {self.grace:g} s to save and end")
        if self._kill_at is None:
            self._kill_at = time.monotonic() + self.grace

    def _collect(self) -> None:
        """Note the ranks that ended. Of several at once, one ended by a signal is the likelier cause and goes first."""
        ended: list[tuple[bool, Rank]] = []
        for rank in self._alive():
            rank.exit_code = rank.process.poll()
            if rank.exit_code is not None:
                if rank.exit_code == SSH_FAILED and rank.process.stdin is not None:
                    works = f"`ssh {rank.name.removeprefix('host ')} true` has to work without a question"
                    say(f"{rank.name} cannot be reached, or the connection broke; ssh says why, {works}")
                    rank.exit_code = EXIT_ENVIRONMENT
                    self.lost.append(rank.name)
                ended.append((rank.exit_code >= 0, rank))
        for _, rank in sorted(ended, key=lambda pair: pair[0]):
            first = rank.exit_code != 0 and not any(earlier.exit_code != 0 for earlier in self._ended)
            self._ended.append(rank)
            if not self.ran_out and rank.exit_code == EXIT_INTERRUPTED and self._out_of_memory():
                self.ran_out = True
                say(f"{rank.name} ran out of memory and has stored a smaller micro-batch; the others are ended")
                self._kill()  # they wait for it in a collective, and have nothing to save
            elif first and not self.ran_out:
                say(f"{rank.name} {_how_it_ended(rank)}")
                if self._kill_at is None:
                    self._end_peers_at = time.monotonic() + min(PEERS_END_SECONDS, self.grace)

    def _kill(self) -> None:
        """Kill every rank that still runs, and only it: a wandb worker ends by itself, with its work handed over."""
        alive = self._alive()
        for rank in alive:
            rank.told_to_end = True
            rank.kill()
        for rank in alive:
            rank.exit_code = rank.process.wait()
            self._ended.append(rank)

    def _interrupted(self, rank: Rank) -> bool:
        """Whether a rank was asked to stop, and has saved, or did not listen yet and had nothing to save."""
        code = rank.exit_code
        return code == EXIT_INTERRUPTED or (code is not None and -code in self.stops)

    def _exit_code(self) -> int:
        if self.ran_out:
            return EXIT_INTERRUPTED
        bad = [rank for rank in self._ended if rank.exit_code != 0]
        if not bad:
            return EXIT_DONE
        own = [rank for rank in bad if not rank.told_to_end] or bad
        if self._interrupted(own[0]) and all(
            rank.exit_code == EXIT_ENVIRONMENT or self._interrupted(rank) for rank in own
        ):
            return EXIT_INTERRUPTED  # by a signal to all, or to one that starts, and is lost to the others
        cause = next((rank for rank in own if not self._interrupted(rank)), own[0])
        others = [f"{rank.name} {_how_it_ended(rank)}" for rank in bad if rank.exit_code != cause.exit_code]
        if others:
            say(f"the cause: {cause.name} {_how_it_ended(cause)}; then: {', '.join(others)}")
        assert cause.exit_code is not None
        return cause.exit_code if cause.exit_code >= 0 else 128 - cause.exit_code


def _how_it_ended(rank: Rank) -> str:
    code = rank.exit_code
    assert code is not None
    if code == -signal.SIGKILL and not rank.told_to_end:
        return "was ended by SIGKILL: if nobody killed it, the machine ran out of memory (dmesg says so)"
    if code < 0:
        return f"was ended by {signal.Signals(-code).name if -code in set(signal.Signals) else f'signal {-code}'}"
    return f"ended with exit code {code}" + (" (interrupted, state saved)" if code == EXIT_INTERRUPTED else "")


def dies_with_this_process(unblock: Set[signal.Signals] = frozenset()) -> Callable[[], None]:
    """Make a preexec_fn: the child is killed when this process ends, however that is, and has `unblock` unblocked."""
    parent, libc = os.getpid(), ctypes.CDLL(None)

    def before_exec() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, unblock)

    return before_exec


class Restarts:
    """Counts restarts, up to a number, and up to two in a row that made no checkpoint."""

    def __init__(self, allowed: int, out_dir: Path | None) -> None:
        self.allowed = allowed
        self._out_dir = out_dir
        self._made = self._idle = 0
        self._newest = _newest_checkpoint(out_dir)

    def another(self, code: int) -> bool:
        """Whether to start again after this exit code; says why not, where it would be allowed."""
        if code in FINAL or self._made == self.allowed:
            return False
        before, self._newest = self._newest, _newest_checkpoint(self._out_dir)
        nothing_new = self._made and self._newest == before and self._out_dir is not None
        self._idle = self._idle + 1 if nothing_new else 0
        if self._idle == 2:
            say("two restarts in a row have made no checkpoint: it is not started again")
            return False
        self._made += 1
        return True

    def announce(self) -> None:
        """Say which one begins."""
        say(f"restart {self._made} of {self.allowed}: all ranks start again")


def _newest_checkpoint(out_dir: Path | None) -> str | None:
    """Read which checkpoint of a run folder is the newest."""
    try:
        return None if out_dir is None else (out_dir / run_folder.CHECKPOINTS / run_folder.LATEST).read_text()[:1000]
    except (OSError, ValueError):
        return None
