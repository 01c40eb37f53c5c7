"""The command line of launch/run, and what it execs or supervises."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from io import FileIO
from pathlib import Path
from typing import NoReturn

import chatgot.run_folder as run_folder
from chatgot.devices import visible_gpus
from chatgot.errors import EXIT_CONFIG, ChatGoTError, ConfigError, MachineError
from chatgot.launcher.arguments import Parser, count, duration, whole
from chatgot.launcher.entry import rank_environment, rendezvous_port
from chatgot.launcher.hosts import (
    PORT,
    check_options,
    is_here,
    master_address,
    node_command,
    obey,
    order,
    read_hostfile,
    take_order,
    without_lost,
)
from chatgot.launcher.nodes import Nodes
from chatgot.launcher.supervisor import Rank, Restarts, Supervisor, say

GRACE_SECONDS = 60.0
REJOIN_MINUTES = 5.0
ATTEMPT = "CHATGOT_ATTEMPT"
"""Environment variable that names this start of the ranks, so that one that runs out of memory can ask for another."""

EPILOG = """With one process and no restarts, the program replaces launch/run: nothing stands between you and it.
With --hostfile, it starts itself on every host over ssh, at the same path and with the same Python, and supervises
them; with --nnodes, somebody starts it on every node, with the same arguments but for --node_rank.

exit code: that of the first rank that failed, 128 + N if signal N ended it; 75 interrupted and saved; 130 second
Ctrl-C; 2 or 6 when launch/run itself refuses the command line or the machine"""


def main(argv: Sequence[str]) -> int:
    """Run `argv` (without the program's name); returns the exit code. Does not return where it execs."""
    try:
        if list(argv) == ["--node"]:
            orders = FileIO(os.dup(0))  # a thread that waits in a buffered stdin aborts the interpreter at its end
            return _run(*take_order(orders), orders)
        os.environ.pop(ATTEMPT, None)  # of a launcher around this one
        split = argv.index("--") if "--" in argv else len(argv)
        parser = _parser()
        arguments, unknown = parser.parse_known_args(argv[:split])
        if unknown:
            parser.error(f"{' '.join(unknown)}: not an option of launch/run; the arguments of train.py come after --")
        if split == len(argv) and arguments.script is None:
            parser.print_help(sys.stderr)
            parser.exit(EXIT_CONFIG, "launch/run: the arguments of train.py are missing; they come after --\n")
        command = [_interpreter(arguments.python), _script(arguments.script), *argv[split + 1 :]]
        if arguments.max_minutes is not None:
            command += ["--max_minutes", f"{arguments.max_minutes:g}"]
        check_options(arguments)
        return _run(arguments, command, None)
    except ChatGoTError as error:
        say(str(error))
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="launch/run",
        usage="launch/run [options] -- <train.py arguments>",
        description="Start train.py once per GPU of this machine, or once on the CPU.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    processes = "processes (default: auto: one per visible GPU, or one)"
    add("--nproc", type=whole(1, auto=True), metavar="N|auto", help=processes)
    add("--hostfile", type=Path, metavar="H", help="several machines: lines of `host slots=N`")
    add("--nnodes", type=count, metavar="M", help="nodes of --nproc ranks")
    add("--node_rank", type=whole(0), metavar="R", help="of this node: 0 to M-1")
    add("--master_addr", metavar="A", help="address of node 0 (default: the hostfile's first host)")
    rendezvous = f"port of the rendezvous (default: a free one, or {PORT} between machines)"
    add("--master_port", type=whole(1, 65535), metavar="P", help=rendezvous)
    restarts = "start again after a crash, K times at most (default: 0)"
    add("--max_restarts", type=whole(0), default=0, metavar="K", help=restarts)
    add("--max_minutes", type=duration, metavar="T", help="passed on to train.py: save and end after so many minutes")
    rejoin = f"minutes to wait for a host that was lost, before the others go on alone (default: {REJOIN_MINUTES:g})"
    add("--rejoin_minutes", type=duration, default=REJOIN_MINUTES, metavar="T", help=rejoin)
    grace = f"seconds that ranks have to save and end after a signal (default: {GRACE_SECONDS:g})"
    add("--grace", type=duration, default=GRACE_SECONDS, metavar="S", help=grace)
    add("--python", metavar="PATH", help="the Python that runs the ranks (default: the one that runs launch/run)")
    add("--script", metavar="PATH", help="another program to start instead of launch/train.py")
    parser.set_defaults(ranks=None)  # of a node: the first one here, and how many there are
    return parser


def _interpreter(given: str | None) -> str:
    path = shutil.which(sys.executable if given is None else given)
    if path is None:
        raise ConfigError(
            f"--python {given}: no such program, or it is not executable; name a Python that has ChatGoT's dependencies"
        )
    return path


def _script(given: str | None) -> str:
    path = Path(given) if given is not None else Path(__file__).resolve().parent.parent.parent / "launch" / "train.py"
    if not path.is_file():
        raise ConfigError(
            f"{path}: no such program to start; run launch/run from a checkout, or name one with --script PATH"
        )
    return str(path)


def _run(arguments: argparse.Namespace, command: Sequence[str], orders: FileIO | None) -> int:
    """Start the ranks of this machine, or the launch/run of all hosts, again after a crash where that is allowed.

    Args:
        orders: this is the launch/run of one host, which obeys another one.
    """
    gpus = visible_gpus(os.environ)
    hosts = None if arguments.hostfile is None else read_hostfile(arguments.hostfile)
    nproc = arguments.nproc or max(1, len(gpus))
    if hosts is None and gpus and nproc > len(gpus):
        raise MachineError(
            f"--nproc {nproc}: more processes than the {len(gpus)} visible GPUs; give {len(gpus)} or fewer, or set "
            f"DS_ACCELERATOR=cpu"
        )
    restarts = arguments.max_restarts
    if hosts is None and orders is None and nproc == 1 and restarts == 0:
        [start] = _starts_here(arguments, command, 1, gpus, os.environ)
        _exec(command, start.environment)

    stops = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}
    if orders is not None or signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        stops.add(signal.SIGHUP)  # under nohup, a closed terminal stops nothing
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # inherited as ignored, it would hide the ranks' exit codes
    # blocked until this process ends: the supervisor waits for them
    signal.pthread_sigmask(signal.SIG_BLOCK, stops | {signal.SIGCHLD})
    if orders is not None:
        obey(orders)
    out_dir = _out_dir(command)
    again, nodes = Restarts(restarts, out_dir), None
    if arguments.nnodes not in (None, 1) and restarts:
        nodes = Nodes(arguments, nproc, again, out_dir)
    while True:
        attempt = os.environ[ATTEMPT] if orders is not None else uuid.uuid4().hex
        if nodes is not None:
            attempt, arguments.ranks, nproc = nodes.plan.attempt, nodes.first_of_all, nodes.ranks_here
        if hosts is not None:
            starts = _starts_of_hosts(arguments, command, hosts, attempt)
        else:
            starts = _starts_here(arguments, command, nproc, gpus, {**os.environ, ATTEMPT: attempt})
            first, where = starts[0].environment, f"{nproc} of {len(gpus)} GPUs" if gpus else "the CPU"
            ranks, threads = "ranks" if nproc > 1 else "rank", first["OMP_NUM_THREADS"]
            say(f"{nproc} {ranks} on {where}, OMP_NUM_THREADS={threads}, port {first['MASTER_PORT']}")
        supervisor = Supervisor(stops, arguments.grace, partial(_stored_by, attempt, out_dir))
        code = supervisor.run(starts)
        if nodes is not None:
            code = nodes.agree(code, supervisor.ran_out, supervisor.stopping)
            if not nodes.go_on:
                return code
            continue
        if supervisor.stopping or signal.sigpending() & stops:
            return code
        if supervisor.ran_out and orders is None:
            # no restart of --max_restarts; it ends, because every one halves the micro-batch
            say("all ranks start again with the smaller micro-batch")
        elif not again.another(code):
            return code
        else:
            if hosts is not None and supervisor.lost:
                lost = [name.removeprefix("host ") for name in supervisor.lost]
                master, hosts = next(iter(hosts)), without_lost(hosts, lost, arguments.rejoin_minutes, out_dir)
                if master not in hosts:
                    arguments.master_addr = None  # it was that one's
                if signal.sigpending() & stops:
                    return code
            again.announce()


def _starts_here(
    arguments: argparse.Namespace, command: Sequence[str], nproc: int, gpus: Sequence[str], environ: Mapping[str, str]
) -> list[Rank]:
    """The ranks of this machine, which is all there is, or one of --nnodes, or one of a hostfile."""
    first, total, address = 0, nproc, "127.0.0.1"
    if arguments.ranks is not None:
        (first, total), address = arguments.ranks, arguments.master_addr
    elif arguments.nnodes is not None:
        first, total, address = arguments.node_rank * nproc, arguments.nnodes * nproc, arguments.master_addr
    wanted = arguments.master_port or (None if total == nproc else PORT)
    port = rendezvous_port(wanted) if first == 0 else wanted
    assert port is not None  # several machines have agreed on one
    alike = [rank_environment(environ, rank, nproc, port, bool(gpus), first, total, address) for rank in range(nproc)]
    return [Rank(f"rank {first + rank}", command, environment) for rank, environment in enumerate(alike)]


def _starts_of_hosts(
    arguments: argparse.Namespace, command: Sequence[str], hosts: Mapping[str, int], attempt: str
) -> list[Rank]:
    """The launch/run of every host."""
    address = master_address(hosts, arguments.master_addr)
    total, first, starts = sum(hosts.values()), 0, list[Rank]()
    port = arguments.master_port or (rendezvous_port(None) if all(map(is_here, hosts)) else PORT)
    shared = {**vars(arguments), "hostfile": None, "max_restarts": 0, "master_addr": address, "master_port": port}
    for host, slots in hosts.items():
        its = order({**shared, "nproc": slots, "ranks": (first, total)}, command, {ATTEMPT: attempt})
        starts.append(Rank(f"host {host}", node_command(host, command[0]), os.environ, its))
        first += slots
    say(f"{total} ranks on {len(hosts)} host(s): {', '.join(hosts)}; rendezvous at {address}:{port}")
    return starts


def _out_dir(command: Sequence[str]) -> Path | None:
    """Find the run folder that train.py's arguments name, as its own parser does."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--out_dir", type=Path)
    return parser.parse_known_args(command[2:])[0].out_dir


def _stored_by(attempt: str, out_dir: Path | None) -> bool:
    """Tell whether a rank of this attempt has stored a smaller micro-batch in the run folder."""
    if out_dir is None:
        return False
    try:
        return json.loads(run_folder.read_bytes(out_dir / run_folder.MICRO_BATCH))["attempt"] == attempt
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _exec(command: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(command[0], list(command), environment)
    except OSError as error:
        raise MachineError(
            f"{command[0]}: cannot be started: {error.strerror}; name a working Python with --python PATH"
        ) from error
