"""This process among the others: its rank, read from whatever launched it, and the decisions that all ranks share.

torch is imported only when a ControlGroup is made.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import re
import socket
import zlib
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from chatgot.errors import ChatGoTError, MachineError

T = TypeVar("T")
COLLECTIVES = datetime.timedelta(minutes=35)
"""How long a collective may wait for another rank, unless the run says; the watchdog speaks earlier, and knows more."""


@dataclass(frozen=True)
class Place:
    """Rank of this process, globally and on its machine."""

    rank: int
    local_rank: int
    world_size: int
    launcher: str
    """deepspeed or torchrun (both set RANK), slurm, mpi, or python."""


_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SLURM_SIZES = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS")
_PMI = ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE")
"""Of MPICH and Intel MPI."""
_OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE")


def find_place(local_rank: int | None = None, environ: MutableMapping[str, str] = os.environ) -> Place:
    """Read the launcher's variables and fill in those that torch.distributed needs.

    Plain `python` sets none of them, and DeepSpeed would then ask for mpi4py (its comm.mpi_discovery). SLURM and Open
    MPI have their own names for them.

    Args:
        local_rank: the --local_rank argument, if the launcher passed one.

    Raises:
        MachineError: some of the variables are set and others are missing, or one is not a number.
    """
    for name in _VARIABLES:
        if environ.get(name) == "":
            del environ[name]  # set but empty is as if unset
    if "RANK" in environ or "WORLD_SIZE" in environ:
        if "LOCAL_RANK" not in environ and local_rank is not None and local_rank >= 0:
            environ["LOCAL_RANK"] = str(local_rank)
        if environ.get("WORLD_SIZE") == "1":
            environ.setdefault("MASTER_ADDR", "127.0.0.1")
            environ.setdefault("MASTER_PORT", str(free_port()))
        launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environ else "deepspeed"
    elif "SLURM_PROCID" in environ and (size := _slurm_size(environ))[1] != "1":
        if "SLURM_STEP_ID" not in environ:  # an sbatch script itself, which is no task of a step
            raise MachineError(
                f"environment: {size[0]} = {size[1]}, but srun did not start this process, and the other ranks would "
                f"never come; in an sbatch script write `srun python launch/train.py ...`, or `launch/run -- ...` for "
                f"the processes of one machine"
            )
        _copy(environ, ("SLURM_PROCID", "SLURM_LOCALID", size[0]))
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
        environ.setdefault("MASTER_ADDR", first_host(nodes))
        job, step = (environ.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        port = zlib.crc32(f"{job}.{step}".encode()) % 20000  # below the kernel's own range of free ports
        environ.setdefault("MASTER_PORT", str(10000 + port))
        launcher = "slurm"
    elif "OMPI_COMM_WORLD_RANK" in environ or "PMI_RANK" in environ:
        _copy(environ, _OPEN_MPI if "OMPI_COMM_WORLD_RANK" in environ else _PMI)
        launcher = "mpi"
    else:
        environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
        launcher = "python"
    missing = [name for name in _VARIABLES if not environ.get(name)]
    if missing:
        raise MachineError(
            f"environment: {', '.join(missing)} not set, although another launcher variable is; "
            f"set all of {', '.join(_VARIABLES)}, or none of them for a single process"
        )
    numbers = {}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        try:
            numbers[name] = int(environ[name])
        except ValueError:
            raise MachineError(f"environment: {name} = {environ[name]!r}: expected a whole number") from None
    if not 0 < numbers["MASTER_PORT"] < 65536:
        port = f"MASTER_PORT = {numbers['MASTER_PORT']}: expected 1..65535"
        raise MachineError(f"environment: {port}; the ranks would wait for each other for ever")
    place = Place(numbers["RANK"], numbers["LOCAL_RANK"], numbers["WORLD_SIZE"], launcher)
    if not 0 <= place.rank < place.world_size:
        raise MachineError(f"environment: RANK = {place.rank} is not below WORLD_SIZE = {place.world_size}")
    return place


def tells_of_lost_rank(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone, or does not answer: gloo's texts, NCCL's classes."""
    text = str(error)
    return (
        "gloo/transport" in text
        or "Timed out waiting" in text
        or any(kind.__name__ == "DistError" for kind in type(error).__mro__)
    )


def free_port() -> int:
    """A TCP port that is free on this machine now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def first_host(node_list: str) -> str:
    """First host of a SLURM node list: 'rack[2-3]gpu[003-007,9]-ib,cpu1' -> 'rack2gpu003-ib'."""
    first = re.match(r"(?:[^,\[]|\[[^]]*\])*", node_list)
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first[0] if first else "")


def _slurm_size(environ: Mapping[str, str]) -> tuple[str, str]:
    """Name and value of the variable that tells the number of tasks; empty texts where none does."""
    return next(((name, environ[name]) for name in _SLURM_SIZES if environ.get(name)), ("", "1"))


def gloo_interface(master: str) -> str | None:
    """Find the network interface by which other machines reach this one, where gloo would take the loopback: it binds
    to what the hostname resolves to, which many /etc/hosts say is 127.0.1.1, and takes the loopback where that is
    no address of this machine. None: gloo's own choice is right.

    Args:
        master: MASTER_ADDR.
    """
    with contextlib.suppress(OSError):
        if _is_loopback(socket.gethostbyname(master)) and master != socket.gethostname():
            return None  # all ranks are on this machine
    if own_address(socket.gethostname()):
        return None
    for target in (master, "192.0.2.1"):  # nothing is sent: the kernel says which address it would send from
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))
            if not _is_loopback(address := probe.getsockname()[0]):
                return _interfaces().get(address)
    return None


def own_address(host: str) -> bool:
    """Whether a name or address is this machine's, under which others may reach it, too."""
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(host)
        return not _is_loopback(address) and address in _interfaces()
    return False


def _interfaces() -> dict[str, str]:
    """The network interface of every address of this machine."""
    import psutil

    return {one.address: name for name, addresses in psutil.net_if_addrs().items() for one in addresses}


def _is_loopback(address: str) -> bool:
    return address.startswith("127.")


def python_path(environ: Mapping[str, str] = os.environ) -> str:
    """PYTHONPATH with which a child process imports this package, wherever it starts."""
    package = str(Path(__file__).resolve().parent.parent)
    return os.pathsep.join(filter(None, (package, environ.get("PYTHONPATH"))))


def _copy(environ: MutableMapping[str, str], names: Sequence[str]) -> None:
    """Take RANK, LOCAL_RANK and WORLD_SIZE from the launcher's variables, where they are not set."""
    for ours, theirs in zip(_VARIABLES, names):
        if theirs in environ:
            environ.setdefault(ours, environ[theirs])


class ControlGroup:
    """Small decisions shared by all ranks over gloo, so that no GPU is synchronised for them."""

    def __init__(self, timeout: datetime.timedelta = COLLECTIVES) -> None:
        import torch.distributed as dist

        self._dist = dist
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._group: Any = None
        if self.world_size > 1:
            gloo = dist.get_backend() == "gloo"
            self._group = dist.group.WORLD if gloo else dist.new_group(backend="gloo", timeout=timeout)

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether any rank raised it. Collective."""
        return self.exchange(flags, ())[0]

    def exchange(self, flags: Sequence[bool], sums: Sequence[float]) -> tuple[tuple[bool, ...], tuple[float, ...]]:
        """For each flag, whether any rank raised it; each number summed over ranks in fp64. One collective for both.

        Whole numbers below 2**32 are summed exactly for up to 2**20 ranks.
        """
        if self.world_size == 1:
            return tuple(flags), tuple(sums)
        import torch

        shared = torch.tensor([*map(float, flags), *sums], dtype=torch.float64)
        self._dist.all_reduce(shared, group=self._group)
        raised, totals = shared[: len(flags)] > 0, shared[len(flags) :]
        return tuple(raised.tolist()), tuple(totals.tolist())

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank. Collective."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        self._dist.all_gather_object(values, value, group=self._group)
        return values

    def from_rank_0(self, value: Any) -> Any:
        """Rank 0's value on every rank. Collective."""
        if self.world_size == 1:
            return value
        box = [value]
        self._dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def first_difference(self, facts: Mapping[str, Any]) -> tuple[str, str] | None:
        """Compare what is to be the same on all ranks, by its hash. Collective.

        Returns:
            The first name that another rank has with another value than rank 0, and both values and hosts; else None.
        """
        own = {name: json.dumps(value, sort_keys=True, default=str) for name, value in facts.items()}
        if len(set(self.gather(hashlib.sha256(json.dumps(own).encode()).hexdigest()))) == 1:
            return None
        (host, first), *others = self.gather((socket.gethostname(), own))
        for name in dict.fromkeys(name for facts in (first, *(theirs for _, theirs in others)) for name in facts):
            for rank, (elsewhere, theirs) in enumerate(others, 1):
                if (ours := first.get(name, "absent")) != (other := theirs.get(name, "absent")):
                    return name, f"{ours[:200]} on rank 0 ({host}), {other[:200]} on rank {rank} ({elsewhere})"
        return None

    def barrier(self) -> None:
        """Wait for every rank. Collective."""
        self.any(False)

    def on_rank_0(self, function: Callable[[], T]) -> T:
        """Rank 0 calls `function`; its value, or the ChatGoTError that it raised, reaches every rank. Collective."""
        return self.from_rank_0(self.on_every_rank(lambda: function() if self.rank == 0 else None))

    def on_every_rank(self, function: Callable[[], T]) -> T:
        """Every rank calls `function`; returns its own value. Collective.

        Raises:
            ChatGoTError: on all ranks, where any has raised one; see `agree`.
        """
        try:
            value = function()
        except ChatGoTError as error:
            self.agree(error)
            raise
        self.agree(None)
        return value

    def agree(self, error: ChatGoTError | None) -> None:
        """Raise on every rank if any rank met an error, so that nobody goes on alone or waits for the dead. Collective.

        Raises:
            ChatGoTError: the error of the lowest rank that had one, with its exit code.
        """
        errors = self.gather(None if error is None else (type(error), str(error)))
        for rank, refusal in enumerate(errors):
            if refusal is not None:
                kind, message = refusal
                raised = error if error is not None and rank == self.rank else kind(f"rank {rank}: {message}")
                raised.shared = True
                raise raised
