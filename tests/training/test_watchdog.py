"""A rank that hangs: both end with 6, and the report names the rank and the place."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import chatgot.run_folder as run_folder
from chatgot.observe.status import status
from chatgot.training.watchdog import Watchdog
from tests.support import ROOT, engine_json, environment, free_port, write_json, write_run_yaml
from tests.training.in_process import argv, events

PROGRAM = ROOT / "tests" / "distributed" / "programs" / "hang.py"
WHERE = {
    "sleeps": ("is in ", "in hang, from "),
    "stopped": ("does not answer", ""),
    "holds_the_gil": ("holds Python's lock (GIL) in ", "in match, from "),
}


@pytest.mark.parametrize("how", WHERE)
def test_a_rank_that_hangs_is_named_with_its_place(how: str, tmp_path: Path, text_file: Path) -> None:
    engine = write_json(tmp_path / "engine.json", engine_json(1, micro=2))
    words = argv(engine, tmp_path / "out", write_run_yaml(tmp_path / "run.yaml", max_steps=50), text_file)
    port, ranks = str(free_port()), []
    for rank in "01":
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, str(PROGRAM), how, *words, "--hang_timeout", "4"]
        ranks.append(
            subprocess.Popen(
                command, env=environment(**place), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
        )
    try:
        said = ranks[0].communicate(timeout=240)[1]
        assert ranks[0].returncode == 6, said
        if how == "sleeps":
            assert ranks[1].wait(60) == 6
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    out = tmp_path / "out"
    assert "where the ranks are:" in said, said
    report = said[said.index("the run hangs; where the ranks are:") :]
    assert "rank 0 on " in report
    assert "waits for the others in " in report.splitlines()[1]
    verdict, place = WHERE[how]
    assert verdict in report.splitlines()[2], report
    assert place in report.splitlines()[2], report
    assert events(out, "failed")[0]["exit_code"] == status(out)[1] == 6
    assert (out / run_folder.STACKS / "rank-00000.txt").read_text().startswith("rank 0 on ")


PATIENT = """
import sys, time
from pathlib import Path
from chatgot.training.watchdog import Watchdog
with Watchdog(Path(sys.argv[1]), 0, 1, 1.0, doing=lambda: "a test", patience=1) as dog:
    for _ in range(8):
        time.sleep(0.4)
        dog.beat()
    dog.beat(6)
    time.sleep(3)
    for item in dog.beating("ab"):
        time.sleep(1.5)  # 10 times the longest pause is no hang
    print("slow", flush=True)
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
    assert b"rank 0 on " in errors
    assert b"no progress for" in errors


def test_nothing_is_left_after_a_run_that_did_not_hang(tmp_path: Path) -> None:
    with Watchdog(tmp_path, 0, 1, 100.0, doing=str):
        assert (tmp_path / run_folder.STACKS / "rank-00000.txt").exists()
    with Watchdog(tmp_path, 0, 1, 0.0, doing=str):
        assert not (tmp_path / run_folder.STACKS).exists()
    assert not any(tmp_path.iterdir())
