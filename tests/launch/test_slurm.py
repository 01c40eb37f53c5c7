"""srun and launch/slurm.sbatch under a Slurm of one node, started here where Debian's slurm-wlm is installed."""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from chatgot.observe.journal import newest_step
from chatgot.observe.status import status
from tests.launch.test_run import wait_until
from tests.support import ROOT, engine_json, environment, free_port, write_json, write_run_yaml
from tests.training.in_process import argv, events, tags

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "sinfo", "scancel", "scontrol", "squeue")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}
SlurmdSpoolDir={folder}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
KillWait=5
ReturnToService=2
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(30)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    """The environment in which `srun` reaches it."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}{os.pathsep}/usr/sbin"
    if missing := [program for program in PROGRAMS if shutil.which(program, path=path) is None]:
        pytest.skip(f"no {', '.join(missing)} here (Debian: slurm-wlm, munge)")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))  # a socket's path has to be short
        (folder / "key").write_bytes(os.urandom(128))
        (folder / "key").chmod(0o400)
        values = {"host": socket.gethostname(), "user": getpass.getuser(), "folder": folder}
        text = CONFIGURATION.format(**values, ports=(free_port(), free_port()))
        (folder / "slurm.conf").write_text(text)
        variables = environment(PATH=path, SLURM_CONF=str(folder / "slurm.conf"))
        munge = ["munged", "--force", "--foreground", f"--key-file={folder / 'key'}"]
        munge += [f"--{name}-file={folder / name}" for name in ("pid", "log", "seed")]
        for words in (
            [*munge, f"--socket={folder / 'munge.socket'}"],
            ["slurmctld", "-D"],
            ["slurmd", "-D", "-N", socket.gethostname()],
        ):
            log = stack.enter_context((folder / words[0]).open("w"))
            daemon = subprocess.Popen(words, env=variables, stdout=log, stderr=log)
            stack.callback(end, daemon)
            if words[0] == "munged":
                wait_until((folder / "munge.socket").exists)
        deadline, said = time.monotonic() + 60, ""
        while "idle" not in said:
            if time.monotonic() > deadline:
                pytest.skip(f"Slurm does not start here: {said.strip()}")
            time.sleep(0.5)
            asked = subprocess.run(["sinfo", "-h"], env=variables, capture_output=True, text=True)
            said = asked.stdout + asked.stderr
        yield variables
        subprocess.run(["scancel", "--user", getpass.getuser()], env=variables)  # what a failed test has left
        wait_until(lambda: not subprocess.check_output(["squeue", "-h"], env=variables))


@pytest.fixture
def words(tmp_path: Path, text_file: Path) -> list[str]:
    """Arguments of train.py for a run in tmp_path / "out" that only a signal ends."""
    engine = write_json(tmp_path / "engine.json", engine_json(1, micro=2))
    return argv(engine, tmp_path / "out", write_run_yaml(tmp_path / "run.yaml", max_steps=1_000_000), text_file)


def signalled(slurm: dict[str, str], name: str, out: Path) -> None:
    """Wait for a step, and send a signal to the tasks of the job."""
    wait_until(lambda: newest_step(out / "metrics.jsonl") is not None)
    job = subprocess.check_output(["squeue", "-h", "-o", "%A"], env=slurm, text=True).split()[0]
    subprocess.run(["scancel", f"--signal={name}", job], env=slurm, check=True)


def test_tasks_of_srun_are_the_ranks_and_75_is_sruns_exit_code(
    slurm: dict[str, str], words: list[str], tmp_path: Path
) -> None:
    command = ["srun", "--ntasks-per-node", "2", "--kill-on-bad-exit=0", "python", "launch/train.py", *words]
    run = subprocess.Popen(command, cwd=ROOT, env=slurm)
    try:
        signalled(slurm, "TERM", tmp_path / "out")
        assert run.wait(300) == 75
    finally:
        run.terminate()
        run.wait()
    [event] = events(tmp_path / "out", "preempted")
    assert [event["step"]] == tags(tmp_path / "out") == [newest_step(tmp_path / "out" / "metrics.jsonl")]
    assert events(tmp_path / "out", "started")[0]["world_size"] == 2
    assert status(tmp_path / "out")[1] == 75


@pytest.mark.slow
def test_a_job_that_slurm_preempts_is_saved_and_goes_back_into_the_queue(
    slurm: dict[str, str], words: list[str], tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    more = ["--ntasks-per-node", "2", "--output", str(log), "launch/slurm.sbatch", *words]
    said = subprocess.check_output(["sbatch", *more], cwd=ROOT, env=slurm, text=True)
    job = re.findall(r"\d+", said)[0]
    try:
        signalled(slurm, "USR1", out)
        wait_until(lambda: bool(events(out, "preempted")))
        [stopped] = events(out, "preempted")
        write_run_yaml(tmp_path / "run.yaml", max_steps=stopped["step"] + 2)  # the job starts again in some seconds
        wait_until(lambda: not subprocess.check_output(["squeue", "-h"], env=slurm))
    finally:
        subprocess.run(["scancel", job], env=slurm)
    assert stopped["signal"] == "SIGUSR1", log.read_text()
    assert tags(out)[0] == events(out, "resumed")[0]["step"] == stopped["step"]
    assert events(out, "finished")[0]["step"] == stopped["step"] + 2
    assert status(out)[1] == 0
