"""Send every signal to every process of a run under every launcher, and print what came of it as a table.

python -m tests.faults.signals [--launchers launch/run torchrun] [--signals TERM KILL] [--phases step saving]

A cell: exit code of the launcher, seconds until no process of the run was left, the step of the last checkpoint and the
last step of the journal ("saved" where they are equal), and the exit code of `chatgot status`. Each phase is the real
one, made long by its size: imports, a vocabulary from much text, an evaluation and samples of minutes; only a save is
held up by CHATGOT_FAULT, 8 s.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from chatgot.errors import ChatGoTError
from chatgot.observe.journal import newest_step
from chatgot.observe.status import status
from tests.distributed.test_launchers import BIN, LAUNCHERS, processes
from tests.support import engine_json, environment, free_port, write_json, write_run_yaml, write_text
from tests.training.in_process import argv, tags

SIGNALS = ("TERM", "INT", "HUP", "USR1", "KILL")
PHASES = ("start", "data", "step", "evaluation", "sampling", "saving")
BOUND = 120


def names(out: Path) -> dict[str, int]:
    """The processes of the run by what they are; some may be ending."""
    found = {}
    for pid in processes(out):
        with contextlib.suppress(OSError):
            found[named(pid)] = pid
    return found


def named(pid: int) -> str:
    """What a process of the run is: launcher, node (DeepSpeed's launch.py), or its rank."""
    environ = dict(pair.split("=", 1) for pair in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in pair)
    words = Path(f"/proc/{pid}/cmdline").read_text()
    if any(word.endswith("train.py") for word in words.split("\0")[1:3]) and "RANK" in environ:
        return f"rank {environ['RANK']}"
    return "node" if "deepspeed.launcher.launch" in words else "launcher"


def phase_settings(phase: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any], list[str], dict[str, str]]:
    """What makes a phase long: of the YAML's `train`, of the JSON's `checkpoint`, overrides, environment."""
    never = {"every_steps": 100_000, "every_minutes": None, "keep_best": 0}
    cache = {"CHATGOT_CACHE": str(folder / "cache"), "CHATGOT_FAULT": ""}
    if phase == "data":
        return {}, never, ["data.tokenizer=bpe", "data.bpe_vocab_size=8000", "model.max_seq_length=16"], cache
    if phase == "evaluation":
        return {"eval_every": 2}, never, ["data.val_fraction=0.5"], cache
    if phase == "sampling":
        return {"sample_every": 2, "sample_max_new_tokens": 1_000_000}, never, [], cache
    if phase == "saving":
        return {}, {**never, "every_steps": 2}, [], {**cache, "CHATGOT_FAULT": "save:1:delay=8"}
    return {}, never, [], cache


def reached(phase: str, out: Path, folder: Path) -> bool:
    """Whether the run is in the phase."""
    if phase == "start":
        return {"rank 0", "rank 1"} <= set(names(out))
    if phase == "data":
        return any((folder / "cache" / "prepared").glob(".*.tmp-*"))
    if phase == "saving":
        return any((out / "checkpoints").glob(".unfinished-*"))
    return (newest_step(out / "metrics.jsonl") or 0) >= (10 if phase == "step" else 2)


def cell(launcher: str, target: str, number: signal.Signals, folder: Path, phase: str = "step") -> str:
    """One run, one signal to one of its processes in a phase."""
    train, saving, overrides, more = phase_settings(phase, folder)
    text = write_text(folder / "text.txt", {"data": 30_000_000, "evaluation": 2_000_000}.get(phase, 20_000))
    engine = write_json(folder / "engine.json", engine_json(1, micro=2, chatgot={"checkpoint": saving}))
    out, config = folder / "out", write_run_yaml(folder / "run.yaml", max_steps=1_000_000, **train)
    os.environ |= more  # `status` looks there too
    words = [word.format(port=free_port()) for word in LAUNCHERS[launcher]]
    words += argv(engine, out, config, text, *overrides)
    hears = lambda: [signal.signal(one, signal.SIG_DFL) for one in (signal.SIGHUP, signal.SIGINT)]  # noqa: E731
    process = subprocess.Popen(
        words,
        env=environment(PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}"),
        stdout=subprocess.DEVNULL,
        stderr=(folder / "stderr").open("w"),
        start_new_session=True,
        preexec_fn=hears,
    )
    try:
        begin = time.monotonic()
        while not reached(phase, out, folder):
            if process.poll() is not None or time.monotonic() > begin + BOUND:
                return "did not start"
            time.sleep(0.1)
        time.sleep(0 if phase == "step" else 1.0)
        found = names(out)
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
        try:
            said: int | str = status(out)[1]
        except ChatGoTError as error:
            said = f"none ({error})"
        return f"{code}, {took:.0f} s, {saved}, status {said}" + (f", LEFT {len(left)}" if left else "")
    finally:
        for pid in processes(out):
            os.kill(pid, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launchers", nargs="+", default=["launch/run", "torchrun", "deepspeed"])
    parser.add_argument("--signals", nargs="+", default=SIGNALS)
    parser.add_argument("--phases", nargs="+", default=PHASES, choices=PHASES)
    arguments = parser.parse_args()
    head = ("phase", "launcher", "to", *arguments.signals)
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for phase, launcher in itertools.product(arguments.phases, arguments.launchers):
        for target in ("launcher", *(["node"] if launcher == "deepspeed" else []), "rank 0", "rank 1"):
            row = []
            for name in arguments.signals:
                with tempfile.TemporaryDirectory() as folder:
                    row.append(cell(launcher, target, signal.Signals[f"SIG{name}"], Path(folder), phase))
            print(f"| {phase} | {launcher} | {target} | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
