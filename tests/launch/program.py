"""A program for launch/run to start in place of train.py: it leaves marks of what reached it, and ends as it is told.

usage: program.py MARKS ACTION...     ACTION is RANK:VERB or *:VERB; the ranks that no action names end with 0
VERB: exit=N, signal=NAME (of itself), wait (until killed), save (SIGTERM, SIGINT, SIGUSR1: leave a mark, end with 75
    when all ranks have
one), memory=K (of its first K attempts, each stores a micro_batch.json and ends with 75), wait_if_memory=K (killed with it), deaf (leave the mark, go on), crash_once (exit 9 the first time), linger=N (wait for SIGTERM, then exit N)
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

marks, *actions = sys.argv[1:]
marks = Path(marks)
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
verbs = dict(action.split(":") for action in actions if ":" in action)
verb, _, value = verbs.get(str(rank), verbs.get("*", "exit=0")).partition("=")


def mark(name: str, text: str = "") -> None:
    unfinished = marks / f".{name}.{rank}"
    unfinished.write_text(text)
    unfinished.rename(marks / f"{name}.{rank}")


def marked(name: str, by: int) -> None:
    deadline = time.monotonic() + 60
    while len(list(marks.glob(f"{name}.*"))) < by:
        if time.monotonic() > deadline:
            sys.exit(f"rank {rank}: no {name} from all ranks")
        time.sleep(0.01)


def on_signal(number: int, frame: object) -> None:
    name = signal.Signals(number).name
    mark(name)
    if verb == "save":
        marked(name, world)
        os._exit(75)
    if verb == "linger":
        os._exit(int(value))


if verb in ("save", "deaf", "linger"):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, on_signal)
mark(
    "start",
    json.dumps(
        {"pid": os.getpid(), "argv": sys.argv, "env": dict(os.environ), "blocked": len(signal.pthread_sigmask(0, []))}
    ),
)
with (marks / f"starts.{rank}").open("a") as starts:
    starts.write(os.environ["MASTER_PORT"] + "\n")
if verb == "exit":
    sys.exit(int(value))
marked("start", world)
if verb == "memory" and (marks / f"starts.{rank}").read_text().count("\n") <= int(value):
    out_dir = Path(next(action for action in actions if action.startswith("--out_dir=")).partition("=")[2])
    (out_dir / "micro_batch.json").write_text(json.dumps({"attempt": os.environ.get("CHATGOT_ATTEMPT")}))
    sys.exit(75)
if verb in ("memory", "wait_if_memory") and (marks / f"starts.{rank}").read_text().count("\n") > int(value):
    sys.exit(0)
if verb == "crash_once":
    sys.exit(9 if (marks / f"starts.{rank}").read_text().count("\n") == 1 else 0)
if verb == "signal":
    os.kill(os.getpid(), signal.Signals[value])
deadline = time.monotonic() + 120
while time.monotonic() < deadline:
    time.sleep(0.05)
sys.exit("nobody ended me")
