"""A program for launch/run to start in place of train.py: it leaves marks of what reached it, and ends as it is told.

usage: program.py MARKS ACTION...     ACTION is RANK:VERB or *:VERB; the ranks that no action names end with 0
VERB: exit=N, signal=NAME (of itself), wait (until killed), deaf (leave a mark at a signal, go on),
    save (SIGTERM, SIGINT, SIGUSR1: leave a mark, end with 75 when all ranks have one),
    memory=K (in the first K starts: store a micro_batch.json, end with 75), wait_if_memory=K (meanwhile: wait),
    crash_once (exit 9 the first time), wait_first (the first time until killed, then exit 0),
    linger=N (wait for SIGTERM, then exit N),
    linger_once=N and memory_late (in the first start: wait for SIGTERM, then exit N, or as memory)
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

folder, *actions = sys.argv[1:]
marks = Path(folder)
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
verbs = dict(action.split(":") for action in actions if ":" in action)
verb, _, value = verbs.get(str(rank), verbs.get("*", "exit=0")).partition("=")


def mark(name: str, text: str = "") -> None:
    unfinished = marks / f".{name}.{rank}"
    unfinished.write_text(text)
    unfinished.rename(marks / f"{name}.{rank}")


def marked(name: str, by: int) -> None:
    deadline = time.monotonic() + 300
    while len(list(marks.glob(f"{name}.*"))) < by:
        if time.monotonic() > deadline:
            sys.exit(f"rank {rank}: no {name} from all ranks")
        time.sleep(0.01)


def starts(of: int = rank) -> int:
    """How often a rank, by default this one, has been started."""
    counted = marks / f"starts.{of}"
    return counted.read_text().count("\n") if counted.exists() else 0


def started_together() -> None:
    """Wait until every rank has counted this start: one that is killed before it has done so would count too few."""
    deadline = time.monotonic() + 300
    while min(map(starts, range(world))) < starts():
        if time.monotonic() > deadline:
            sys.exit(f"rank {rank}: not all ranks have started")
        time.sleep(0.01)


def run_out_of_memory() -> None:
    out_dir = Path(next(action for action in actions if action.startswith("--out_dir=")).partition("=")[2])
    (out_dir / "micro_batch.json").write_text(json.dumps({"attempt": os.environ.get("CHATGOT_ATTEMPT")}))
    os._exit(75)


def on_signal(number: int, frame: object) -> None:
    name = signal.Signals(number).name
    mark(name)
    if verb == "save":
        marked(name, world)
        os._exit(75)
    if verb in ("linger", "linger_once"):
        os._exit(int(value))
    if verb == "memory_late":
        run_out_of_memory()


if verb in ("save", "deaf", "linger", "linger_once", "memory_late"):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, on_signal)
with (marks / f"starts.{rank}").open("a") as ports:
    ports.write(os.environ["MASTER_PORT"] + "\n")
mark(
    "start",
    json.dumps(
        {
            "pid": os.getpid(),
            "argv": sys.argv,
            "cwd": os.getcwd(),
            "env": dict(os.environ),
            "blocked": len(signal.pthread_sigmask(0, [])),
        }
    ),
)
if verb == "exit":
    sys.exit(int(value))
started_together()
if verb == "memory" and starts() <= int(value):
    run_out_of_memory()
if verb in ("memory", "wait_if_memory") and starts() > int(value):
    sys.exit(0)
if verb in ("linger_once", "memory_late") and starts() > 1:
    sys.exit(0)
if verb == "wait_first" and starts() > 1:
    sys.exit(0)
if verb == "crash_once":
    sys.exit(9 if starts() == 1 else 0)
if verb == "signal":
    os.kill(os.getpid(), signal.Signals[value])
deadline = time.monotonic() + 400
while time.monotonic() < deadline:
    time.sleep(0.05)
sys.exit("nobody ended me")
