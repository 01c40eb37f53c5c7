"""--hostfile: what is refused, and that the rest reaches DeepSpeed's own runner."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from chatgot.errors import ConfigError
from chatgot.launcher import main
from chatgot.launcher.command import read_hostfile, rendezvous_port

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAM = Path(__file__).resolve().parent / "program.py"


def hostfile(folder: Path, text: str) -> Path:
    path = folder / "hosts"
    path.write_text(text)
    return path


def test_hosts_and_slots_are_read(tmp_path: Path) -> None:
    path = hostfile(tmp_path, "# a comment\nworker-1 slots=8\n\n  10.0.0.2\tslots=4  \n")
    assert read_hostfile(path) == {"worker-1": 8, "10.0.0.2": 4}


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("a slots=2\nb slots=x\n", ":2: 'b slots=x'"),
        ("a slots=4x\n", ":1: 'a slots=4x'"),
        ("\n\na\n", ":3: 'a'"),
        ("a slots=0\n", ":1: 'a slots=0'"),
        ("a slots=1\na slots=2\n", ":2: host 'a' is listed twice"),
        ("# nobody\n", "no hosts"),
    ],
)
def test_a_bad_hostfile_is_refused_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, where: str
) -> None:
    path = hostfile(tmp_path, text)
    with pytest.raises(ConfigError, match="hosts") as refusal:
        read_hostfile(path)
    assert where in str(refusal.value)
    assert main(["--hostfile", str(path), "--script", str(PROGRAM), "--"]) == 2
    assert where in capsys.readouterr().err


def test_a_missing_hostfile_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--hostfile", str(tmp_path / "absent"), "--script", str(PROGRAM), "--"]) == 2
    assert str(tmp_path / "absent") in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", [("--nproc", "2"), ("--max_restarts", "1"), ("--grace", "5")], ids=lambda option: option[0]
)
def test_options_that_the_runner_decides_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: tuple[str, str]
) -> None:
    path = hostfile(tmp_path, "localhost slots=2\n")
    assert main(["--hostfile", str(path), *option, "--script", str(PROGRAM), "--"]) == 2
    assert f"{option[0]} does not go with --hostfile" in capsys.readouterr().err


def test_deepspeeds_runner_starts_the_ranks_of_the_hostfile(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    program = tmp_path / "program.py"  # DeepSpeed puts --local_rank before the arguments
    program.write_text(
        f"import sys\nsys.argv = [a for a in sys.argv if '--local_rank' not in "
        f"a]\nexec(open({str(PROGRAM)!r}).read())\n"
    )
    ssh = tmp_path / "ssh"  # the runner tries the first host; what it asks of that host, this machine answers
    ssh.write_text('#!/bin/sh\nwhile [ "$1" != localhost ]; do shift; done\nshift\nexec "$@"\n')
    ssh.chmod(0o755)
    path = hostfile(tmp_path, "localhost slots=2\n")
    port = str(rendezvous_port(None))
    command = [
        sys.executable,
        str(ROOT / "launch" / "run"),
        "--hostfile",
        str(path),
        "--master_port",
        port,
        "--script",
        str(program),
    ]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ended = subprocess.run([*command, "--", str(marks)], env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    started = [json.loads((marks / f"start.{rank}").read_text()) for rank in range(2)]
    assert {mark["env"]["MASTER_PORT"] for mark in started} == {port}
    assert all(mark["argv"][1:] == [str(marks)] for mark in started)
