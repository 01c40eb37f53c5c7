"""A rank that hangs: both end with 6, and the report names the rank and the place."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import chatgot.run_folder as run_folder
from chatgot.observe.status import status
from chatgot.training.watchdog import Watchdog
from tests.support import (
    ROOT,
    engine_json,
    environment,
    free_port,
    place_of,
    warm_python,
    write_json,
    write_run_yaml,
)
from tests.training.in_process import argv, events

PROGRAM = ROOT / "tests" / "distributed" / "programs" / "hang.py"
WHERE = {
    "sleeps": ("is in ", "in hang, from "),
    "stopped": ("does not answer", ""),
    "holds_the_gil": ("holds Python's lock (GIL) in ", "in match, from "),
}


def start(how: str, ranks: str, folder: Path, text: Path, seconds: float, **more: str) -> list[subprocess.Popen[str]]:
    """Ranks of hang.py, of two."""
    folder.mkdir(exist_ok=True)
    engine, port = write_json(folder / "engine.json", engine_json(1, micro=2)), free_port()
    words = argv(engine, folder / "out", write_run_yaml(folder / "run.yaml", max_steps=3), text)
    started = []
    for rank in ranks:
        place = place_of(int(rank), 2, port)
        command = [warm_python(), str(PROGRAM), how, *words, "--hang_timeout", str(seconds)]
        out = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=environment(**place, **more), **out))  # pyright: ignore
    return started


def ended(ranks: list[subprocess.Popen[str]], codes: tuple[int, ...]) -> list[str]:
    """Wait for the first ranks, which end with `codes`, and kill the rest; what these said."""
    try:
        said = []
        for rank, code in zip(ranks, codes):
            said.append(rank.communicate(timeout=240)[1])
            assert rank.returncode == code, said
        return said
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
            assert rank.stderr is not None
            rank.stderr.close()


def report_in(said: str) -> list[str]:
    """The lines of the ranks."""
    assert "where the ranks are:" in said, said
    return said[said.index("the run hangs; where the ranks are:") :].splitlines()[1:3]


@pytest.mark.parametrize("how", WHERE)
def test_a_rank_that_hangs_is_named_with_its_place(how: str, tmp_path: Path, text_file: Path) -> None:
    ranks = start(how, "01", tmp_path, text_file, 4)
    said = ended(ranks, (6, 6) if how == "sleeps" else (6,))[0]
    first, second = report_in(said)
    assert "rank 0 on " in first
    assert "waits for the others in " in first
    verdict, place = WHERE[how]
    assert verdict in second
    assert place in second
    out = tmp_path / "out"
    assert events(out, "failed")[0]["exit_code"] == status(out)[1] == 6
    assert (out / run_folder.STACKS / "rank-00000.txt").read_text().startswith("rank 0 on ")


@pytest.mark.parametrize(
    ("where", "doing", "place"),
    [
        ("data", "preparing the data: ", "in prepare_data"),
        ("engine", "building the engine: ", "in hang, from "),
        ("save", "saving at step 3: ", "in hang, from "),
    ],
)
def test_a_rank_that_hangs_elsewhere_is_named_too(
    where: str, doing: str, place: str, tmp_path: Path, text_file: Path
) -> None:
    """The bound is six times as long there, 12 s; after the timeout itself the rank is named for the first time."""
    ranks = start(f"sleeps@{where}", "01", tmp_path, text_file, 2, CHATGOT_CACHE=str(tmp_path / "cache"))
    said = "".join(ended(ranks, (6, 6)))
    lines = report_in(said)
    hung = 0 if where == "data" else 1
    warned = [line for line in said.splitlines() if doing in line and "; here that counts as a hang after 12 s" in line]
    assert any(line.startswith(f"chatgot: rank {hung} on ") and place in line for line in warned), said
    assert doing in lines[hung]
    assert "is in " in lines[hung]
    assert place in lines[hung]
    assert "waits for the others in " in lines[1 - hung]
    prefix, written = ("" if where == "save" else "start-"), tmp_path / "out" / run_folder.STACKS
    assert "in hang" in (written / f"{prefix}rank-0000{hung}.txt").read_text()


@pytest.mark.parametrize(("takes", "timeout"), [(12, 3), pytest.param(120, 300, marks=pytest.mark.slow)])
def test_a_first_step_that_compiles_is_no_hang(takes: float, timeout: float, tmp_path: Path, text_file: Path) -> None:
    ended(start(f"{takes}@first", "01", tmp_path, text_file, timeout), (0, 0))


@pytest.mark.slow
def test_a_rank_that_never_starts_is_named(tmp_path: Path, text_file: Path) -> None:
    [said] = ended(start("sleeps", "0", tmp_path, text_file, 2), (6,))
    assert "rank 0 on " in report_in(said)[0]
    assert "joining the process group" in report_in(said)[0]
    assert "rank 1: does not answer; it never started" in report_in(said)[1]


PATIENT = """
import sys, time
from pathlib import Path
from chatgot.training.watchdog import Watchdog
with Watchdog(Path(sys.argv[1]), 0, 1, 2.0, doing="a test", patience=1) as dog:
    for _ in range(8):
        time.sleep(0.4)
        dog.beat()
    dog.beat(6)
    time.sleep(3)
    for item in dog.beating("a"):
        time.sleep(3)
    print("slow", flush=True)
    dog.beat()
    time.sleep(1.4)
    dog.beat()
    time.sleep(60)
"""


def test_what_is_slow_is_no_hang_and_a_stopped_process_goes_on(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PATIENT, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    time.sleep(1.5)
    process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    process.send_signal(signal.SIGCONT)
    said, errors = process.communicate(timeout=120)
    assert said == b"slow\n", errors
    assert process.returncode == 6
    named = rb"a test: is in <string>:17 in <module>: no sign of life for . s; here that counts as a hang after [4-9] s"
    assert re.search(named, errors), "three times the longest pause"
    assert b"no progress for" in errors


def test_nothing_is_left_after_a_run_that_did_not_hang(tmp_path: Path) -> None:
    with Watchdog(tmp_path, 0, 1, 100.0):
        assert (tmp_path / run_folder.STACKS / "rank-00000.txt").exists()
    with Watchdog(tmp_path, 0, 1, 0.0):
        assert not (tmp_path / run_folder.STACKS).exists()
    assert not any(tmp_path.iterdir())
