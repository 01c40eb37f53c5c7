"""What a rank finds in its environment: the rendezvous, and thread and allocator settings where the user has none."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

from chatgot.errors import MachineError


def thread_defaults(environ: Mapping[str, str], nproc: int, on_gpu: bool) -> dict[str, str]:
    """Choose thread and allocator settings of each of `nproc` ranks of this machine, for where the user has none.

    glibc's malloc gives large blocks back to the kernel after every step and faults them in again; kept, CPU steps are
    4 to 14 % faster. libgomp's threads spin for each other; where another program takes a core, spinning less makes a
    step half as long (BENCHMARKS.md).
    """
    defaults = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // nproc))}
    if not on_gpu:
        defaults |= {"MALLOC_TRIM_THRESHOLD_": "10000000000", "MALLOC_MMAP_THRESHOLD_": "10000000000"}
        if "OMP_WAIT_POLICY" not in environ:
            defaults["GOMP_SPINCOUNT"] = "10000"
    return defaults


def rank_environment(
    environ: Mapping[str, str],
    rank: int,
    nproc: int,
    port: int,
    on_gpu: bool,
    first: int = 0,
    total: int | None = None,
    address: str = "127.0.0.1",
) -> dict[str, str]:
    """Make the environment of one rank: the rendezvous, and thread and allocator settings where the user has none.

    Args:
        rank: on this machine, of `nproc`; `first` of `total` is the first one here.
        address: of the machine of rank 0.
    """
    ranks = {"RANK": first + rank, "LOCAL_RANK": rank, "WORLD_SIZE": total or nproc, "LOCAL_WORLD_SIZE": nproc}
    defaults, texts = thread_defaults(environ, nproc, on_gpu), {name: str(value) for name, value in ranks.items()}
    return {**defaults, **environ, "MASTER_ADDR": address, "MASTER_PORT": str(port), **texts}


def rendezvous_port(wanted: int | None) -> int:
    """Return `wanted` if it can be bound, else raise MachineError; find a free port for None."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # TIME_WAIT is free for torch's TCPStore, too
        try:
            probe.bind(("", wanted or 0))
        except OSError as error:
            hint = "name another, or leave it out for a free one"
            raise MachineError(f"--master_port {wanted}: {error.strerror}; {hint}") from error
        return probe.getsockname()[1]
