"""Several machines: the hostfile, and the launch/run that is started on each of them over ssh.

launch/run on the first machine starts `launch/run --node` on every host and supervises these as it does ranks. What
the node shall run stands in the first line of its stdin, signals follow, a line each; the end of stdin means that the
first launch/run is gone, which stops the node as SIGHUP does.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import chatgot.run_folder as run_folder
from chatgot.deepspeed_json.findings import shortened
from chatgot.distributed import own_address
from chatgot.errors import ConfigError, MachineError
from chatgot.launcher.supervisor import say

PORT = 29500
"""Of the rendezvous between machines, unless --master_port says another."""
_SSH = ("BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=10", "ServerAliveCountMax=3")
"""Never asks, notices a host that does not answer within 10 s, and one that is cut off within 30."""
_SHARED = ("NCCL_", "GLOO_", "CHATGOT_", "DS_", "OMP_", "GOMP_", "MKL_", "TORCH", "WANDB_", "PYTHONPATH", "SLURM_JOB")
"""Prefixes of the environment variables that every host gets."""


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots of each host; ConfigError with the line number. DeepSpeed's own expression takes `slots=4x` for 4."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--hostfile {path}: cannot be read as text: {error}") from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = re.fullmatch(r"([^\s-]\S*)\s+slots=(\d{1,9})", text)  # what begins with - is an option of ssh
        if match is None or int(match[2]) == 0:
            form = "`host slots=N` with N from 1 on, as in `worker-1 slots=8`"
            raise ConfigError(f"{path}:{number}: {shortened(text)!r} is not of the form {form}")
        if match[1] in hosts:
            raise ConfigError(
                f"{path}:{number}: host {shortened(match[1])!r} is listed twice; give its slots on one line"
            )
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise ConfigError(f"{path}: no hosts in it; write one `host slots=N` per line")
    return hosts


def check_options(arguments: argparse.Namespace) -> None:
    """Refuse options of several machines that do not go together, or that nothing would read; ConfigError."""
    given = [name for name in ("nproc", "nnodes", "node_rank", "master_addr") if getattr(arguments, name) is not None]
    if arguments.hostfile is not None:
        if wrong := [name for name in given if name != "master_addr"]:
            raise ConfigError(f"--{wrong[0]} does not go with --hostfile, whose slots say how many ranks a host has")
    elif arguments.nnodes is None:
        if wrong := [name for name in given if name != "nproc"]:
            raise ConfigError(f"--{wrong[0]} is for several machines: give --nnodes, or --hostfile, too")
    elif arguments.node_rank is None or arguments.master_addr is None:
        raise ConfigError("--nnodes needs --node_rank and --master_addr, the address of the node whose rank is 0")
    elif arguments.node_rank >= arguments.nnodes:
        raise ConfigError(f"--node_rank {arguments.node_rank}: of {arguments.nnodes} nodes, from 0 on; give 0 to M-1")


def is_here(host: str) -> bool:
    """Whether a name or address of the hostfile is this machine's, which needs no ssh."""
    return host in ("localhost", "127.0.0.1", socket.gethostname()) or own_address(host)


def master_address(hosts: Mapping[str, int], given: str | None) -> str:
    """The address under which all hosts reach the first one.

    Raises:
        ConfigError: its name in the file means another machine on every host.
    """
    first = next(iter(hosts))
    if given is not None or len(hosts) == 1:
        return given or ("127.0.0.1" if is_here(first) else first)
    if first in ("localhost", "127.0.0.1"):
        raise ConfigError(
            f"the hostfile's first host is {first}, which means another machine on every host; write its name or "
            f"address, or give --master_addr"
        )
    return first


def node_command(host: str, python: str) -> list[str]:
    """The command that starts `launch/run --node` on a host, at the same path as here."""
    run = str(Path(__file__).resolve().parent.parent.parent / "launch" / "run")
    if is_here(host):
        return [python, run, "--node"]
    if shutil.which("ssh") is None:
        raise MachineError(f"--hostfile: host {host}: there is no ssh on this machine, which reaches it; install it")
    return _ssh(host, f"exec {shlex.quote(python)} {shlex.quote(run)} --node")


def _ssh(host: str, command: str) -> list[str]:
    return ["ssh", "-T", *(word for option in _SSH for word in ("-o", option)), "--", host, command]


def order(arguments: Mapping[str, Any], command: Sequence[str], more: Mapping[str, str]) -> bytes:
    """The first line of a node's stdin. In there and not on a command line, which everybody can read: it has keys."""
    passed = {name: value for name, value in os.environ.items() if name.startswith(_SHARED)}
    given = {"arguments": arguments, "command": command, "cwd": os.getcwd(), "environ": {**passed, **more}}
    return json.dumps(given).encode() + b"\n"


def take_order(stream: FileIO) -> tuple[argparse.Namespace, list[str]]:
    """Read the first line of stdin, go to its folder and take its environment; returns launch/run's arguments there
    and the ranks' command.

    Raises:
        MachineError: there is no such folder on this host.
    """
    given: dict[str, Any] = json.loads(stream.readline())
    try:
        os.chdir(given["cwd"])
    except OSError as error:
        raise MachineError(
            f"host {socket.gethostname()}: {given['cwd']}: {error.strerror}; all hosts need it"
        ) from error
    os.environ.update(given["environ"])
    return argparse.Namespace(**given["arguments"]), given["command"]


def obey(stream: FileIO) -> None:
    """Send this process every signal that stdin names, and SIGHUP at its end, from a thread that has them blocked."""

    def listen() -> None:
        for line in stream:
            os.kill(os.getpid(), signal.Signals[line.decode().strip()])
        say(f"host {socket.gethostname()}: the first launch/run is gone")
        os.kill(os.getpid(), signal.SIGHUP)

    threading.Thread(target=listen, name="orders", daemon=True).start()


def without_lost(hosts: Mapping[str, int], lost: Sequence[str], minutes: float, out_dir: Path | None) -> dict[str, int]:
    """Wait for the lost hosts to answer again, and leave out those that do not.

    The others go on with the largest number of ranks of which the run's global batch can be made.

    Raises:
        MachineError: no host is left, or no such number.
    """
    deadline, missing = time.monotonic() + 60 * minutes, list(lost)
    while missing := [host for host in missing if not _answers(host)]:
        if time.monotonic() > deadline or signal.sigpending():
            break
        time.sleep(5)
    if not missing:
        return dict(hosts)
    return used_of({host: slots for host, slots in hosts.items() if host not in missing}, missing, minutes, out_dir)


def used_of(left: Mapping[str, int], missing: Sequence[str], minutes: float, out_dir: Path | None) -> dict[str, int]:
    """Slots of the hosts that are left, so many that the run's global batch can be made of their ranks.

    Raises:
        MachineError: no host is left, or no such number.
    """
    batch, micro = _batch(out_dir)
    ranks = next((n for n in range(sum(left.values()), 0, -1) if batch % (micro * n) == 0), 0)
    if not ranks:
        raise MachineError(
            f"{', '.join(missing)} did not come back, and train_batch_size {batch} fits no ranks of the rest"
        )
    used = dict[str, int]()
    for host, slots in left.items():
        if (free := ranks - sum(used.values())) > 0:
            used[host] = min(slots, free)
    say(
        f"{', '.join(missing)} did not come back within {minutes:g} minutes: {ranks} rank(s) on {', '.join(used)} go on"
    )
    return used


def _batch(out_dir: Path | None) -> tuple[int, int]:
    """Global batch and micro-batch of a run, from its folder; where it has none, what any number of ranks can make."""
    if out_dir is None:
        return 0, 1
    from chatgot.deepspeed_json.schema import MICRO, TOTAL  # two thirds of launch/run's start, for nodes that are gone

    try:
        stored = json.loads(run_folder.read_bytes(out_dir / run_folder.DS_CONFIG))
        return int(stored[TOTAL]), int(stored[MICRO])
    except (OSError, ValueError, KeyError, TypeError):
        return 0, 1


def _answers(host: str) -> bool:
    """Whether ssh reaches a host."""
    probe = _ssh(host, "true")
    return is_here(host) or subprocess.run(probe, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0
