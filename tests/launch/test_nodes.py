"""--nnodes with restarts: the launch/run of three nodes here agree through node 0's store."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.launch.test_run import PROGRAM, running, wait_until
from tests.support import free_port, warm_python, write_json

Start = Callable[..., subprocess.Popen[str]]
LAUNCHER = """
import sys
from chatgot.launcher import main, nodes
nodes.LEAVE_SECONDS = 15.0  # a node that does not come back is waited for so long at least
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts launch/run as a node of three, of two ranks each unless it is told."""
    (tmp_path / "marks").mkdir()
    port, started = str(free_port()), list[subprocess.Popen[str]]()

    def node(number: int, *actions: str, restarts: int = 2, minutes: float = 5.0, nproc: int = 1) -> subprocess.Popen:
        options = ["--nnodes", "3", "--node_rank", str(number), "--master_addr", "127.0.0.1", "--master_port", port]
        options += ["--nproc", str(nproc), "--max_restarts", str(restarts), "--rejoin_minutes", str(minutes)]
        command = [warm_python(), "-c", LAUNCHER, *options, "--grace", "2", "--script", str(PROGRAM)]
        environ = {**os.environ, "DS_ACCELERATOR": "cpu"}
        words = [*command, "--", str(tmp_path / "marks"), *actions]
        started.append(subprocess.Popen(words, env=environ, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield node
    for process in started:
        process.kill()
        process.communicate()


def ended(nodes: list[subprocess.Popen[str]]) -> tuple[list[int], list[str]]:
    said = [node.communicate(timeout=300)[1] for node in nodes]
    return [node.returncode for node in nodes], said


def starts_of(folder: Path, rank: int) -> int:
    return len((folder / "marks" / f"starts.{rank}").read_text().split())


def test_a_crash_on_one_node_starts_all_of_them_again(start: Start, tmp_path: Path) -> None:
    codes, said = ended([start(number, "*:crash_once") for number in range(3)])
    assert codes == [0, 0, 0], said
    assert "restart 1 of 2: all ranks start again" in said[0]
    assert [starts_of(tmp_path, rank) for rank in range(3)] == [2, 2, 2]
    given = [json.loads((tmp_path / "marks" / f"start.{rank}").read_text())["env"] for rank in range(3)]
    assert len({one["CHATGOT_ATTEMPT"] for one in given}) == 1


def test_restarts_of_all_nodes_are_counted_together(start: Start, tmp_path: Path) -> None:
    codes, said = ended([start(number, "*:exit=6", restarts=1) for number in range(3)])
    assert codes == [6, 6, 6], said
    assert [starts_of(tmp_path, rank) for rank in range(3)] == [2, 2, 2]


def test_a_refusal_on_one_node_ends_the_others_with_its_code(start: Start, tmp_path: Path) -> None:
    codes, said = ended([start(number, "1:exit=3", "*:exit=6") for number in range(3)])
    assert codes == [3, 3, 3], said
    assert starts_of(tmp_path, 0) == 1


def test_the_others_go_on_without_a_node_that_does_not_come_back(start: Start, tmp_path: Path) -> None:
    """The folder's global batch of 6 in micro-batches of 2 is for 3 or 1 of the 2 ranks that are left."""
    out = tmp_path / "out"
    out.mkdir()
    write_json(out / "ds_config.json", {"train_batch_size": 6, "train_micro_batch_size_per_gpu": 2})
    nodes = [start(number, "*:wait_first", f"--out_dir={out}", minutes=0.0) for number in range(3)]
    wait_until(lambda: len(list((tmp_path / "marks").glob("start.*"))) == 3)
    places = [json.loads((tmp_path / "marks" / f"start.{rank}").read_text()) for rank in range(3)]
    nodes[2].send_signal(signal.SIGKILL)
    wait_until(lambda: not running(places[2]["pid"]))
    for rank in range(2):
        os.kill(places[rank]["pid"], signal.SIGKILL)  # as a rank ends that has lost another one
    codes, said = ended(nodes[:2])
    assert codes == [0, 0], said
    assert "node 2 did not come back within 0 minutes: 1 rank(s) on node 0 go on" in said[0]
    assert "node 1 is not needed" in said[1]
    last = json.loads((tmp_path / "marks" / "start.0").read_text())["env"]
    assert (last["RANK"], last["WORLD_SIZE"]) == ("0", "1")
