"""--hostfile and --nnodes: what is refused, and ranks on several hosts over a real ssh server here: the first
host is `localhost`, which needs no ssh; the second, 127.0.0.2, is reached by it.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from chatgot.errors import ConfigError
from chatgot.launcher import main
from chatgot.launcher.hosts import read_hostfile
from chatgot.observe.journal import newest_step
from tests.launch.test_run import PROGRAM, ROOT, Launch, running, wait_until
from tests.support import engine_json, environment, free_port, warm_python, write_json, write_run_yaml
from tests.training.in_process import argv, events, series, tags

SSHD, SSH = shutil.which("sshd") or "/usr/sbin/sshd", shutil.which("ssh")
HOSTS = "localhost slots=1\n127.0.0.2 slots=1\n"


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
        ("-oProxyCommand=x slots=1\n", ":1: '-oProxyCommand=x slots=1'"),
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--hostfile", "absent"), "absent"),
        (("--hostfile", "hosts", "--nproc", "2"), "--nproc does not go with --hostfile"),
        (("--hostfile", "hosts"), "first host is localhost, which means another machine on every host"),
        (("--node_rank", "1"), "--node_rank is for several machines"),
        (("--master_addr", "a"), "--master_addr is for several machines"),
        (("--hostfile", "hosts", "--node_rank", "1"), "--node_rank does not go with --hostfile"),
        (("--nnodes", "2", "--node_rank", "2", "--master_addr", "a"), "--node_rank 2: of 2 nodes"),
        (("--nnodes", "2", "--node_rank", "0"), "--nnodes needs --node_rank and --master_addr"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    hostfile(tmp_path, HOSTS)
    words = [str(tmp_path / word) if word in ("hosts", "absent") else word for word in options]
    assert main([*words, "--script", str(PROGRAM), "--"]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def reached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment in which `ssh 127.0.0.2` reaches this machine without asking."""
    with ssh_server(tmp_path_factory.mktemp("ssh")) as (path, _):
        yield path


@contextlib.contextmanager
def ssh_server(
    folder: Path, addresses: Mapping[str, Sequence[str]] = {"127.0.0.2": ()}, client: Sequence[str] = ()
) -> Iterator[tuple[dict[str, str], subprocess.Popen[bytes]]]:
    """Servers on some addresses, and the environment whose `ssh` reaches them; the last one's process.

    Args:
        addresses: of the servers, with the command that starts each where its address is.
        client: the same for `ssh`.
    """
    if not os.access(SSHD, os.X_OK) or SSH is None:
        pytest.skip("needs ssh and sshd")
    port = free_port()
    for name in ("host", "user"):
        key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(key, check=True, stdin=subprocess.DEVNULL)
    shutil.copy(folder / "user.pub", folder / "authorized")
    known = (folder / "host.pub").read_text().split()[:2]
    lines = [f"[{address}]:{port} {' '.join(known)}\n" for address in addresses]
    (folder / "known").write_text("".join(lines))
    server = {"Port": port, "HostKey": folder / "host", "StrictModes": "no"}
    server |= {"AuthorizedKeysFile": folder / "authorized", "PidFile": "none", "UsePAM": "no"}
    (folder / "sshd_config").write_text("".join(f"{name} {value}\n" for name, value in server.items()))
    identity = f"-p {port} -l {getpass.getuser()} -i {folder}/user -o UserKnownHostsFile={folder}/known"
    script = f'#!/bin/sh\nexec {SSH} {identity} "$@"\n'
    (folder / "bin").mkdir()
    (folder / "bin" / "ssh").write_text(script)
    (folder / "bin" / "ssh").chmod(0o755)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    log = (folder / "log").open("w")
    path = {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    processes = []
    try:
        for address, there in addresses.items():
            listen = ["-D", "-e", "-f", str(folder / "sshd_config"), "-o", f"ListenAddress={address}"]
            processes.append(subprocess.Popen([*there, SSHD, *listen], stderr=log))
        deadline = time.monotonic() + 30
        for address in addresses:
            reaches = [*client, "ssh", "-o", "BatchMode=yes", address, "true"]
            while subprocess.run(reaches, env={**os.environ, **path}).returncode:
                if processes[-1].poll() is not None or time.monotonic() > deadline:
                    pytest.skip(f"no ssh server can be started here: {(folder / 'log').read_text()[-300:]}")
                time.sleep(0.2)
        yield path, processes[-1]
    finally:
        for process in processes:
            process.kill()
            process.wait()


class Hosts(Launch):
    """launch/run on localhost and 127.0.0.2, one rank each."""

    environment: dict[str, str]

    def start(
        self, *actions: str, options: tuple[str, ...] = (), env: dict[str, str] | None = None, **popen: Any
    ) -> None:
        known = hostfile(self.marks.parent, HOSTS)
        where = ("--hostfile", str(known), "--master_addr", "127.0.0.1", "--master_port", str(free_port()))
        super().start(*actions, options=(*where, *options), env={**self.environment, **(env or {})}, **popen)


@pytest.fixture
def hosts(tmp_path: Path, reached: dict[str, str]) -> Iterator[Hosts]:
    (tmp_path / "marks").mkdir()
    launch = Hosts(tmp_path / "marks")
    launch.environment = reached
    yield launch
    if launch.process is not None:
        launch.process.kill()
        launch.process.communicate()


def test_every_host_gets_its_ranks_and_no_key_is_on_a_command_line(hosts: Hosts) -> None:
    code, errors = hosts.run(env={"WANDB_API_KEY": "secret", "MINE": "stays"})
    assert code == 0, errors
    first, second = (hosts.started(rank)["env"] for rank in range(2))
    for rank, given in enumerate((first, second)):
        assert (given["RANK"], given["LOCAL_RANK"]) == (str(rank), "0")
        assert (given["WORLD_SIZE"], given["LOCAL_WORLD_SIZE"], given["MASTER_ADDR"]) == ("2", "1", "127.0.0.1")
        assert given["WANDB_API_KEY"] == "secret"
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    assert "SSH_CONNECTION" in second
    assert "SSH_CONNECTION" not in first
    assert "MINE" not in second
    assert {hosts.started(rank)["cwd"] for rank in range(2)} == {os.getcwd()}
    assert "2 ranks on 2 host(s): localhost, 127.0.0.2" in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_reaches_the_ranks_of_all_hosts(hosts: Hosts, number: signal.Signals) -> None:
    hosts.start("*:save")
    hosts.wait_for("start")
    hosts.send(number)
    code, errors = hosts.end()
    assert code == 75, errors
    assert len(list(hosts.marks.glob(f"{number.name}.*"))) == 2


def test_a_crash_on_one_host_starts_all_of_them_again(hosts: Hosts) -> None:
    code, errors = hosts.run("*:crash_once", options=("--max_restarts", "2"))
    assert code == 0, errors
    assert "restart 1 of 2" in errors
    assert [len(hosts.ports(rank)) for rank in range(2)] == [2, 2]


def test_the_first_failing_host_decides_and_the_others_are_ended(hosts: Hosts) -> None:
    code, errors = hosts.run("1:exit=9", "0:linger=75")
    assert code == 9, errors
    assert "host 127.0.0.2 ended with exit code 9" in errors
    assert not running(hosts.started(0)["pid"])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=lambda number: number.name)
def test_no_rank_of_any_host_survives(hosts: Hosts, number: signal.Signals) -> None:
    """A killed launch/run asks the nodes to save, and a second Ctrl-C kills their ranks."""
    hosts.start("*:deaf", options=("--grace", "2"))
    hosts.wait_for("start")
    pids = [hosts.started(rank)["pid"] for rank in range(2)]
    hosts.send(number)
    if number == signal.SIGINT:
        hosts.wait_for("SIGINT")
        hosts.send(number)
        assert hosts.end()[0] == 130
    else:
        hosts.wait_for("SIGTERM")
    wait_until(lambda: not any(map(running, pids)))


@pytest.mark.parametrize("host", ["no-such-host.invalid", "127.0.0.3"])
def test_a_host_that_cannot_be_reached_is_named(hosts: Hosts, host: str) -> None:
    """A name that does not resolve, and an address where nobody listens."""
    known = hostfile(hosts.marks.parent, f"localhost slots=1\n{host} slots=1\n")
    Launch.start(
        hosts, "0:linger=75", options=("--hostfile", str(known), "--master_addr", "127.0.0.1"), env=hosts.environment
    )
    code, errors = hosts.end()
    assert code == 6, errors
    assert f"host {host} cannot be reached, or the connection broke" in errors


def test_a_host_whose_key_is_unknown_is_named_and_nobody_is_asked(hosts: Hosts, tmp_path: Path) -> None:
    ssh = Path(hosts.environment["PATH"].partition(os.pathsep)[0]) / "ssh"
    known = re.sub(r"UserKnownHostsFile=\S+", f"UserKnownHostsFile={tmp_path / 'nobody'}", ssh.read_text())
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text(known)
    (tmp_path / "bin" / "ssh").chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{hosts.environment['PATH']}"
    code, errors = hosts.run("0:linger=75", env={"PATH": path})
    assert code == 6, errors
    assert "Host key verification failed" in errors
    assert "host 127.0.0.2 cannot be reached, or the connection broke; ssh says why, `ssh 127.0.0.2 true` has" in errors


def test_a_node_with_other_code_is_named_before_it_trains(tmp_path: Path, text_file: Path) -> None:
    for folder in ("chatgot", "launch"):
        shutil.copytree(ROOT / folder, tmp_path / "there" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "there" / "chatgot" / "model" / "gpt.py").open("a") as module:
        module.write("# tried something\n")
    engine = write_json(tmp_path / "engine.json", engine_json(1, micro=2))
    config = write_run_yaml(tmp_path / "run.yaml")
    port, nodes = str(free_port()), list[subprocess.Popen[str]]()
    for node, checkout in enumerate((ROOT, tmp_path / "there")):
        options = ["--nproc", "1", "--nnodes", "2", "--node_rank", str(node), "--master_addr", "127.0.0.1"]
        python = warm_python() if checkout == ROOT else sys.executable
        command = [python, str(checkout / "launch" / "run"), *options, "--master_port", port, "--"]
        command += argv(engine, tmp_path / "out", config, text_file)
        variables = environment(PYTHONPATH="")
        nodes.append(subprocess.Popen(command, env=variables, cwd=tmp_path, stderr=subprocess.PIPE, text=True))
    try:
        said = [node.communicate(timeout=300)[1] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [6, 6], said
    host = socket.gethostname()
    assert re.search(rf"version of code is .* on rank 0 \({host}\), .* on rank 1 \({host}\); install the same", said[0])
    assert not (tmp_path / "out").exists()


def test_a_run_on_two_hosts_is_saved_by_a_signal_and_goes_on_alone(
    tmp_path: Path, reached: dict[str, str], text_file: Path
) -> None:
    saving = {"checkpoint": {"every_steps": 1000, "every_minutes": None, "keep_best": 0}}
    engine = write_json(tmp_path / "engine.json", engine_json(2, micro=2, chatgot=saving))
    out, config = tmp_path / "out", write_run_yaml(tmp_path / "run.yaml", max_steps=1_000_000)
    where = [
        "--hostfile",
        str(hostfile(tmp_path, HOSTS)),
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        str(free_port()),
    ]
    command = [warm_python(), str(ROOT / "launch" / "run"), *where, "--", *argv(engine, out, config, text_file)]
    process = subprocess.Popen(command, env=environment(**reached), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while newest_step(out / "metrics.jsonl") is None and process.poll() is None:
        assert time.monotonic() < deadline, "no step was made"
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 75, errors
    [step] = tags(out)
    assert events(out, "preempted")[0]["step"] == step
    assert json.loads((out / "environment.json").read_text())["world_size"] == 2
    train = [warm_python(), str(ROOT / "launch" / "train.py"), *argv(engine, out, config, text_file)]
    more = subprocess.run([*train, f"train.max_steps={step + 1}"], env=environment(), capture_output=True, text=True)
    assert more.returncode == 0, more.stderr
    assert step + 1 in series(out, "train/loss")


def test_nodes_that_somebody_else_starts_find_each_other(tmp_path: Path) -> None:
    marks, port = tmp_path / "marks", str(free_port())
    marks.mkdir()
    nodes = []
    for node in "01":
        options = ["--nproc", "2", "--nnodes", "2", "--node_rank", node, "--master_addr", socket.gethostname()]
        command = [sys.executable, str(ROOT / "launch" / "run"), *options, "--master_port", port]
        command += ["--script", str(PROGRAM), "--", str(marks), "*:exit=0"]
        nodes.append(subprocess.Popen(command, env={**os.environ, "DS_ACCELERATOR": "cpu"}))
    assert [node.wait(300) for node in nodes] == [0, 0]
    places = [json.loads((marks / f"start.{rank}").read_text())["env"] for rank in range(4)]
    assert [(p["RANK"], p["LOCAL_RANK"], p["WORLD_SIZE"]) for p in places] == [
        (str(r), str(r % 2), "4") for r in range(4)
    ]
    assert {(place["MASTER_ADDR"], place["MASTER_PORT"]) for place in places} == {(socket.gethostname(), port)}


def descendants(pid: int) -> list[int]:
    """The processes below one."""
    found = [pid]
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid:
                found += descendants(int(folder.name))
    return found


def test_a_host_that_does_not_come_back_is_left_out(tmp_path: Path) -> None:
    """The folder's global batch of 6 in micro-batches of 2 is for 3 or 1 of the 2 ranks that localhost has."""
    out, marks = tmp_path / "out", tmp_path / "marks"
    out.mkdir()
    marks.mkdir()
    (tmp_path / "ssh").mkdir()
    write_json(out / "ds_config.json", {"train_batch_size": 6, "train_micro_batch_size_per_gpu": 2})
    known = hostfile(tmp_path, "localhost slots=2\n127.0.0.2 slots=1\n")
    with ssh_server(tmp_path / "ssh") as (path, server):
        options = [
            "--hostfile",
            str(known),
            "--master_addr",
            "127.0.0.1",
            "--max_restarts",
            "3",
            "--rejoin_minutes",
            "0",
        ]
        program = ["--script", str(PROGRAM), "--", str(marks), "*:wait_first", f"--out_dir={out}"]
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "launch" / "run"), *options, *program],
            env={**os.environ, "DS_ACCELERATOR": "cpu", **path},
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_until(lambda: len(list(marks.glob("start.*"))) == 3)
        for pid in descendants(server.pid):
            if Path(f"/proc/{pid}/comm").read_text().startswith("sshd"):
                os.kill(pid, signal.SIGKILL)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "host 127.0.0.2 cannot be reached, or the connection broke" in errors
    assert "127.0.0.2 did not come back within 0 minutes: 1 rank(s) on localhost go on" in errors
    last = json.loads((marks / "start.0").read_text())["env"]
    assert (last["RANK"], last["WORLD_SIZE"]) == ("0", "1")
    wait_until(lambda: not running(json.loads((marks / "start.2").read_text())["pid"]))  # nobody reads what it says
