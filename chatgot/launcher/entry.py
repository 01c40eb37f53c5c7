"""What every program does before it imports torch, settle its environment and refuse what is wrong already, and how a
refusal ends it.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from io import TextIOWrapper
from pathlib import Path

import chatgot.run_folder as run_folder
from chatgot.devices import assumed_device
from chatgot.distributed import find_place, tells_of_lost_rank
from chatgot.errors import EXIT_DONE, EXIT_ENVIRONMENT, ChatGoTError, MachineError
from chatgot.launcher.arguments import on_rank_0

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""Signals that ask a run to stop."""


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


def settle_environment(start_again: bool = False) -> None:
    """Set what `launch/run` sets for its ranks, threads, spinning and the allocator, unless the user has set it.

    Args:
        start_again: replace this process by the same command, because the allocator reads its variables at its start.
    """
    if "torch" in sys.modules:
        return  # too late: its threads have been made
    here = next((os.environ[name] for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if os.environ.get(name)), "1")
    ranks = int(here) if here.isdecimal() else 1
    defaults = thread_defaults(os.environ, max(1, ranks), assumed_device("auto").kind == "cuda")
    missing = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(missing)
    if start_again and sys.executable and any(name.startswith("MALLOC_") for name in missing):
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # the program that begins anew lets them in when it listens
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def escape_unwritable() -> None:
    """Write names that are no UTF-8 with escapes; Python would fail at them on stdout."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def refuse_wrong_settings(
    config: str,
    deepspeed_config: str | os.PathLike[str] | None,
    overrides: Sequence[str],
    data: str,
    out_dir: Path,
    local_rank: int | None = None,
    strict: bool = False,
    init_from: str | None = None,
) -> str | None:
    """Check the arguments of train.py as far as that goes without torch, on every rank alike; the run checks them again
    with the device known.

    Returns:
        The path of the JSON, where one was named.

    Raises:
        ChatGoTError: what training would refuse before its first step.
    """
    from chatgot.config.overrides import parse_overrides
    from chatgot.config.run import load_run_config
    from chatgot.data import corpus
    from chatgot.data.reading import check_encoding
    from chatgot.deepspeed_json.read import default_json, find_json, read_document
    from chatgot.deepspeed_json.resolve import resolve

    run_overrides, ds_overrides = parse_overrides(overrides)
    if init_from is not None:  # the model is that folder's; see training.initial
        run_overrides = {key: value for key, value in run_overrides.items() if not key.startswith("model.")}
    run = load_run_config(config, run_overrides)
    place, facts = find_place(local_rank, dict(os.environ)), assumed_device("auto")
    named = None if deepspeed_config is None else find_json(deepspeed_config)
    document = read_document(named or default_json(facts, place.world_size))
    resolved = resolve(document, ds_overrides, world_size=place.world_size, facts=facts, strict=strict)
    resolved.complete(max_steps=run.train.max_steps).findings.refuse()
    check_encoding(run.data.encoding)
    if place.world_size == 1:  # with several ranks rank 0 looks, and tells the others
        run_folder.check_writable(out_dir)
        corpus.resolve(data)
    return None if named is None else str(named)


def _raised_alone(error: ChatGoTError) -> bool:
    """Whether rank 0, which speaks for all, may not know of it: the ranks have joined, and it was not shared since."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_initialized() and not error.shared


def guarded(program: Callable[[], int | None], debug: bool) -> int:
    """Run `program`, which returns its exit code or nothing; a refusal becomes one message on rank 0 and its code."""
    try:
        return program() or EXIT_DONE
    except ChatGoTError as error:
        if debug:
            traceback.print_exc()
        elif on_rank_0() or isinstance(error, MachineError) or _raised_alone(error):
            print(f"chatgot: {error}", file=sys.stderr)
        return error.exit_code
    except RuntimeError as error:
        if debug or not tells_of_lost_rank(error):
            raise
        rank, (reason, *_) = os.environ.get("RANK", "0"), str(error).splitlines()
        print(
            f"chatgot: rank {rank}: another rank is gone or does not answer ({reason}); the first rank that failed "
            f"says why. The run goes on from its last checkpoint when the same command is run again",
            file=sys.stderr,
        )
        return EXIT_ENVIRONMENT
    except BrokenPipeError:  # the reader of our output went away (`chatgot sample ... | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except KeyboardInterrupt:
        return 130
