"""launch/run with real processes: what the ranks get, and how they and the launcher end. The program they run is
program.py.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAM = Path(__file__).resolve().parent / "program.py"
BOUND = 300  # seconds: a hang is a failure


def wait_until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + BOUND
    while not what():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.01)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Launch:
    """One launch/run with two ranks unless told otherwise, on the CPU."""

    def __init__(self, marks: Path) -> None:
        self.marks = marks
        self.process: subprocess.Popen[str] | None = None

    def start(
        self,
        *actions: str,
        options: tuple[str, ...] = ("--nproc", "2"),
        env: dict[str, str] | None = None,
        **popen: Any,
    ) -> None:
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", **(env or {})}
        command = [
            sys.executable,
            str(ROOT / "launch" / "run"),
            "--script",
            str(PROGRAM),
            *options,
            "--",
            str(self.marks),
            *actions,
        ]
        hears = lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)  # noqa: E731
        self.process = subprocess.Popen(
            command, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=hears, **popen
        )

    def end(self) -> tuple[int, str]:
        assert self.process is not None
        _, errors = self.process.communicate(timeout=BOUND)
        return self.process.returncode, errors

    def run(self, *actions: str, **how: Any) -> tuple[int, str]:
        self.start(*actions, **how)
        return self.end()

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def wait_for(self, mark: str, ranks: int = 2) -> None:
        wait_until(lambda: len(list(self.marks.glob(f"{mark}.*"))) == ranks)

    def started(self, rank: int) -> dict[str, Any]:
        return json.loads((self.marks / f"start.{rank}").read_text())

    def ports(self, rank: int) -> list[str]:
        """MASTER_PORT of every time the rank was started."""
        return (self.marks / f"starts.{rank}").read_text().split()


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    (tmp_path / "marks").mkdir()
    launch = Launch(tmp_path / "marks")
    yield launch
    if launch.process is not None:
        launch.process.kill()  # the ranks die with it
        launch.process.communicate(timeout=BOUND)


def test_every_rank_gets_its_place_and_the_same_rendezvous(launch: Launch) -> None:
    environment = {"OMP_NUM_THREADS": "3", "MASTER_ADDR": "elsewhere", "RANK": "7", "WORLD_SIZE": "8"}
    code, errors = launch.run(options=("--nproc", "3"), env=environment)
    assert code == 0, errors
    environments = [launch.started(rank)["env"] for rank in range(3)]
    for rank, given in enumerate(environments):
        assert (given["RANK"], given["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (given["WORLD_SIZE"], given["LOCAL_WORLD_SIZE"], given["MASTER_ADDR"]) == ("3", "3", "127.0.0.1")
        assert given["OMP_NUM_THREADS"] == "3", "the user's own value stays"
    assert len({given["MASTER_PORT"] for given in environments}) == 1
    assert all(launch.started(rank)["blocked"] == 0 for rank in range(3)), "ranks have to receive every signal"
    assert all(launch.started(rank)["argv"] == [str(PROGRAM), str(launch.marks)] for rank in range(3))


@pytest.mark.parametrize("nproc", [1, 2])
def test_the_cores_of_the_process_are_divided_and_the_allocator_keeps_memory_on_the_cpu(
    launch: Launch, nproc: int
) -> None:
    environment = {
        key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "MALLOC_TRIM_THRESHOLD_")
    }
    environment |= {"DS_ACCELERATOR": "cpu", "MALLOC_MMAP_THRESHOLD_": "123"}
    command = [
        sys.executable,
        str(ROOT / "launch" / "run"),
        "--script",
        str(PROGRAM),
        "--nproc",
        str(nproc),
        "--",
        str(launch.marks),
    ]
    subprocess.run(command, env=environment, timeout=BOUND, check=True, capture_output=True)
    given = launch.started(0)["env"]
    assert given["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // nproc))
    assert (given["MALLOC_TRIM_THRESHOLD_"], given["MALLOC_MMAP_THRESHOLD_"]) == ("10000000000", "123")
    assert given["GOMP_SPINCOUNT"] == "10000"


def test_one_process_replaces_the_launcher(launch: Launch) -> None:
    code, _ = launch.run("*:exit=7", options=())
    assert code == 7
    assert launch.process is not None
    assert launch.started(0)["pid"] == launch.process.pid


def test_first_failing_rank_decides_the_exit_code_and_the_others_are_ended(launch: Launch) -> None:
    code, errors = launch.run("0:linger=1", "1:exit=7", options=("--nproc", "2", "--grace", "2"))
    assert code == 7
    assert "rank 1 ended with exit code 7" in errors
    assert (launch.marks / "SIGTERM.0").exists(), "the peer is told before it is killed"


@pytest.mark.parametrize("grace", ["1", pytest.param("1000", marks=pytest.mark.slow)])
def test_a_rank_that_a_signal_ended_is_named_with_the_signal(launch: Launch, grace: str) -> None:
    """The grace is for saving; after that end nobody can."""
    code, errors = launch.run("0:deaf", "1:signal=SIGKILL", options=("--nproc", "2", "--grace", grace))
    assert code == 128 + signal.SIGKILL
    assert "rank 1 was ended by SIGKILL" in errors
    assert "killed now: rank 0" in errors
    assert not running(launch.started(0)["pid"])


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [(1, signal.SIGKILL, 128 + signal.SIGKILL), (75, signal.SIGTERM, 7)],
    ids=["killed-rank-before-its-peer-noticed", "failure-before-interruption"],
)
def test_the_cause_is_told_from_what_followed(launch: Launch, first: int, second: signal.Signals, code: int) -> None:
    launch.start(f"0:linger={first}", "1:linger=7")
    launch.wait_for("start")
    launch.send(signal.SIGSTOP)  # it then finds both ended at once
    pids = [launch.started(rank)["pid"] for rank in range(2)]
    os.kill(pids[0], signal.SIGTERM)
    wait_until(lambda: not running(pids[0]))
    os.kill(pids[1], second)
    wait_until(lambda: not running(pids[1]))
    launch.send(signal.SIGCONT)
    ended_with, errors = launch.end()
    assert ended_with == code, errors
    assert f"the cause: rank 1 {'was ended by SIGKILL' if code != 7 else 'ended with exit code 7'}" in errors


@pytest.mark.parametrize("verb", ["signal=SIGTERM", "exit=75"])
def test_a_rank_that_is_asked_to_stop_while_it_starts_is_the_cause_of_what_the_others_say(
    launch: Launch, verb: str
) -> None:
    """It did not listen yet, or ended alone, and the others have lost it."""
    code, errors = launch.run("0:linger=6", f"1:{verb}")
    assert code == 75, errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_reaches_all_ranks_before_any_has_ended(launch: Launch, number: signal.Signals) -> None:
    launch.start("*:save", options=("--nproc", "3"))
    launch.wait_for("start", 3)
    launch.send(number)
    code, errors = launch.end()
    assert code == 75, errors
    assert len(list(launch.marks.glob(f"{number.name}.*"))) == 3


def test_a_closed_terminal_asks_the_ranks_to_save(launch: Launch) -> None:
    launch.start("*:save")
    launch.wait_for("start")
    launch.send(signal.SIGHUP)
    assert launch.end()[0] == 75
    assert len(list(launch.marks.glob("SIGTERM.*"))) == 2


def test_ctrl_c_of_the_terminal_reaches_a_rank_once(launch: Launch) -> None:
    launch.start("*:wait", start_new_session=True)
    launch.wait_for("start")
    assert launch.process is not None
    groups = {os.getpgid(launch.started(rank)["pid"]) for rank in range(2)}
    assert launch.process.pid not in groups, (
        "a rank in the terminal's foreground group would get SIGINT from the terminal and from us"
    )


def test_ranks_that_do_not_end_are_killed_after_the_grace_period(launch: Launch) -> None:
    launch.start("0:save", "1:deaf", options=("--nproc", "2", "--grace", "1"))
    launch.wait_for("start")
    launch.send(signal.SIGTERM)
    code, errors = launch.end()
    assert code == 75, "rank 0 has saved; that rank 1 was killed by the launcher is not the cause of anything"
    assert "killed now: rank 1" in errors
    assert not running(launch.started(1)["pid"])


def test_a_second_sigint_kills_at_once(launch: Launch) -> None:
    launch.start("*:deaf", options=("--nproc", "2", "--grace", "1000"))
    launch.wait_for("start")
    launch.send(signal.SIGINT)
    launch.wait_for("SIGINT")
    launch.send(signal.SIGINT)
    assert launch.end()[0] == 130
    assert not any(running(launch.started(rank)["pid"]) for rank in range(2))


def test_no_rank_survives_a_killed_launcher(launch: Launch) -> None:
    launch.start("*:wait")
    launch.wait_for("start")
    pids = [launch.started(rank)["pid"] for rank in range(2)]
    assert all(running(pid) for pid in pids)
    launch.send(signal.SIGKILL)
    wait_until(lambda: not any(running(pid) for pid in pids))


def test_ranks_that_saved_on_their_own_keep_75(launch: Launch) -> None:
    code, _ = launch.run("*:exit=75", options=("--nproc", "2", "--max_restarts", "2"))
    assert code == 75
    assert len(launch.ports(0)) == 1


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_crash_is_restarted_on_a_new_port(launch: Launch, nproc: int) -> None:
    code, errors = launch.run("*:crash_once", options=("--nproc", str(nproc), "--max_restarts", "3"))
    assert code == 0, errors
    ports = launch.ports(0)
    assert len(ports) == 2
    assert ports[0] != ports[1]
    assert "restart 1 of 3" in errors


def test_a_rank_that_ran_out_of_memory_is_started_again_with_the_others(launch: Launch, tmp_path: Path) -> None:
    """The others wait in a collective and are killed; no restart of --max_restarts is used up."""
    code, errors = launch.run("1:memory=2", "0:wait_if_memory=2", f"--out_dir={tmp_path}")
    assert code == 0
    assert len(set(launch.ports(0))) == 3
    assert errors.count("rank 1 ran out of memory and has stored a smaller micro-batch") == 2
    assert errors.count("all ranks start again with the smaller micro-batch") == 2
    assert "SIGKILL" not in errors


def test_out_of_memory_counts_even_if_a_rank_that_lost_its_peer_is_noticed_first(
    launch: Launch, tmp_path: Path
) -> None:
    """Rank 0 fails because rank 1 is gone, and the launcher learns of both at once."""
    launch.start("0:linger_once=1", "1:memory_late", f"--out_dir={tmp_path}")
    launch.wait_for("start")
    launch.send(signal.SIGSTOP)
    pids = [launch.started(rank)["pid"] for rank in range(2)]
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not any(running(pid) for pid in pids))
    launch.send(signal.SIGCONT)
    code, errors = launch.end()
    assert code == 0, errors
    assert "rank 1 ran out of memory and has stored a smaller micro-batch" in errors
    assert errors.count("all ranks start again with the smaller micro-batch") == 1


def test_75_of_another_attempt_is_no_lack_of_memory(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "micro_batch.json").write_text(json.dumps({"attempt": "an earlier one", "micro_batch": 2}))
    code, errors = launch.run("*:exit=75", f"--out_dir={tmp_path}")
    assert code == 75
    assert "memory" not in errors
    assert len(launch.ports(0)) == 1


def test_restarts_come_to_an_end(launch: Launch) -> None:
    code, errors = launch.run("*:exit=6", options=("--nproc", "2", "--max_restarts", "2"))
    assert code == 6, errors
    assert len(launch.ports(0)) == 3


def test_restarts_that_make_no_checkpoint_come_to_an_end_earlier(launch: Launch, tmp_path: Path) -> None:
    code, errors = launch.run("*:exit=6", f"--out_dir={tmp_path}", options=("--nproc", "2", "--max_restarts", "9"))
    assert code == 6, errors
    assert len(launch.ports(0)) == 3
    assert "two restarts in a row have made no checkpoint" in errors


@pytest.mark.parametrize("refusal", [2, 3, 4, 5, 130])
def test_a_refusal_is_not_restarted(launch: Launch, refusal: int) -> None:
    code, _ = launch.run(f"*:exit={refusal}", options=("--nproc", "2", "--max_restarts", "3"))
    assert code == refusal
    assert len(launch.ports(0)) == 1


def test_a_stopped_run_is_not_restarted(launch: Launch) -> None:
    launch.start("*:linger=9", options=("--nproc", "2", "--max_restarts", "3"))
    launch.wait_for("start")
    launch.send(signal.SIGTERM)
    assert launch.end()[0] == 9
    assert len(launch.ports(0)) == 1


def test_a_chosen_port_is_used_and_a_busy_one_refused(launch: Launch) -> None:
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen()
        port = str(busy.getsockname()[1])
        code, errors = launch.run(options=("--nproc", "2", "--master_port", port))
        assert code == 6
        assert f"--master_port {port}" in errors
        assert not list(launch.marks.iterdir())
    assert launch.run(options=("--nproc", "2", "--master_port", port))[0] == 0
    assert launch.ports(0) == [port]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--nproc", "0"), "not a whole number from 1 on, nor auto"),
        (("--master_port", "70000"), "not a whole number from 1 to 65535"),
        (("--max_restarts", "-1"), "max_restarts"),
        (("--grace", "soon"), "not a number from 0 on"),
        (("--config", "tiny"), "come after --"),
        (("--script", "absent.py"), "absent.py"),
        (("--python", "absent"), "absent"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_wrong_command_line_is_refused(launch: Launch, options: tuple[str, ...], message: str) -> None:
    code, errors = launch.run(options=options)
    assert code == 2
    assert message in errors
    assert not list(launch.marks.iterdir())


def test_help_and_train_py_are_reached_without_importing_torch() -> None:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    run = [sys.executable, "-X", "importtime", str(ROOT / "launch" / "run"), "--help"]
    shown = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=BOUND, check=True)
    assert "--max_restarts" in shown.stdout
    assert not re.search(r"\| +(torch|numpy|yaml|deepspeed)\b", shown.stderr)
    train = subprocess.run(
        [str(ROOT / "launch" / "run"), "--", "--help"], env=environment, capture_output=True, text=True, timeout=BOUND
    )
    assert train.returncode == 0, train.stderr
    assert "--deepspeed_config" in train.stdout


def test_a_given_python_runs_the_ranks(launch: Launch, tmp_path: Path) -> None:
    other = tmp_path / "other_python"
    other.write_text(f'#!/bin/sh\nFROM_OTHER_PYTHON=1 exec {sys.executable} "$@"\n')
    other.chmod(0o755)
    code, errors = launch.run(options=("--nproc", "2", "--python", str(other)))
    assert code == 0, errors
    assert launch.started(1)["env"]["FROM_OTHER_PYTHON"] == "1"


def test_alone_it_shows_its_own_usage() -> None:
    done = subprocess.run([sys.executable, "launch/run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: launch/run [options] -- <train.py arguments>")
    assert done.stderr.endswith("the arguments of train.py are missing; they come after --\n")
