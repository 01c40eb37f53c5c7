"""Send every signal to every process of a run under every launcher, and print what came of it as a table.

python -m tests.faults.signals [--launchers launch/run torchrun] [--signals TERM KILL]

A cell: exit code of the launcher, seconds until no process of the run was left, the step of the last checkpoint and the
last step of the journal ("saved" where they are equal), and the exit code of `chatgot status`.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from chatgot.observe.journal import newest_step
from chatgot.observe.status import status
from tests.distributed.test_launchers import BIN, LAUNCHERS, processes
from tests.support import engine_json, environment, free_port, write_json, write_run_yaml, write_text
from tests.training.in_process import argv, tags

SIGNALS = ("TERM", "INT", "HUP", "USR1", "KILL")
BOUND = 120


def named(pid: int) -> str:
    """What a process of the run is: launcher, node (DeepSpeed's launch.py), or its rank."""
    environ = dict(pair.split("=", 1) for pair in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in pair)
    words = Path(f"/proc/{pid}/cmdline").read_text()
    if any(word.endswith("train.py") for word in words.split("\0")[1:3]) and "RANK" in environ:
        return f"rank {environ['RANK']}"
    return "node" if "deepspeed.launcher.launch" in words else "launcher"


def cell(launcher: str, target: str, number: signal.Signals, folder: Path) -> str:
    """One run, one signal to one of its processes."""
    text = write_text(folder / "text.txt")
    saving = {"checkpoint": {"every_steps": 100_000, "every_minutes": None, "keep_best": 0}}
    engine = write_json(folder / "engine.json", engine_json(1, micro=2, chatgot=saving))
    out, config = folder / "out", write_run_yaml(folder / "run.yaml", max_steps=1_000_000)
    words = [word.format(port=free_port()) for word in LAUNCHERS[launcher]] + argv(engine, out, config, text)
    hears = lambda: [signal.signal(one, signal.SIG_DFL) for one in (signal.SIGHUP, signal.SIGINT)]  # noqa: E731
    process = subprocess.Popen(
        words,
        env=environment(PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=hears,
    )
    try:
        begin = time.monotonic()
        while (newest_step(out / "metrics.jsonl") or 0) < 10:
            if process.poll() is not None or time.monotonic() > begin + BOUND:
                return "did not start"
            time.sleep(0.1)
        found = {named(pid): pid for pid in processes(out)}
        if target not in found:
            return "-"
        os.kill(found[target], number)
        sent = time.monotonic()
        while (left := processes(out)) and time.monotonic() < sent + BOUND:
            time.sleep(0.1)
            process.poll()
        took = time.monotonic() - sent
        code, steps, last = process.wait(10) if not left else None, tags(out), newest_step(out / "metrics.jsonl")
        saved = "saved" if steps and steps[-1] == last else f"{steps[-1:] or 'nothing'} saved of {last}"
        return f"{code}, {took:.0f} s, {saved}, status {status(out)[1]}" + (f", LEFT {len(left)}" if left else "")
    finally:
        for pid in processes(out):
            os.kill(pid, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launchers", nargs="+", default=["launch/run", "torchrun", "deepspeed"])
    parser.add_argument("--signals", nargs="+", default=SIGNALS)
    arguments = parser.parse_args()
    print("| launcher | to | " + " | ".join(arguments.signals) + " |\n|" + "---|" * (2 + len(arguments.signals)))
    for launcher in arguments.launchers:
        for target in ("launcher", *(["node"] if launcher == "deepspeed" else []), "rank 0", "rank 1"):
            row = []
            for name in arguments.signals:
                with tempfile.TemporaryDirectory() as folder:
                    row.append(cell(launcher, target, signal.Signals[f"SIG{name}"], Path(folder)))
            print(f"| {launcher} | {target} | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
