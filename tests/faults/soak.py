"""One run, started again and again in random layouts and killed at random moments, until all its steps are done.

    python -m tests.faults.soak --folder /tmp/soak [--starts 200] [--steps 2000] [--seed 0]

A start draws 1 or 2 ranks, a ZeRO stage, a micro-batch with the accumulation that follows, saving in the background or
not, recomputation or not; then SIGKILL for one of its processes or all, or SIGTERM for one of them, while it starts,
trains or saves. The last start is left alone. Then the run must be the one that was never interrupted: equal batches in
every step, losses within BOUND of it; and no start was refused, no process and no temporary file is left, and
`chatgot verify` finds nothing. Prints a line per start; exit 1 and what was wrong, if anything was.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from chatgot.proof import digest
from chatgot.run_folder import UNFINISHED
from tests.support import ROOT, engine_json, environment, write_json, write_run_yaml, write_text
from tests.training.in_process import events

BOUND = 1e-3
"""Relative, of each step's loss against the run that was never interrupted. Two layouts that are never interrupted part
by as much as 2.3e-4 in 2,000 steps (measured: stage 0, micro-batch 8, and stage 2, micro-batch 1)."""
BATCH, BYTES_PER_STEP = 8, 230
ENDS_WITHIN_S = 120.0
REFUSALS = (2, 3, 4, 5)
"""Exit codes that no kill explains."""
MARK = "CHATGOT_SOAK"


class Soak:
    def __init__(self, folder: Path, steps: int, seed: int) -> None:
        self.folder, self.steps, self.draw = folder, steps, random.Random(seed)
        shutil.rmtree(folder, ignore_errors=True)
        self.temporary = folder / "tmp"
        self.temporary.mkdir(parents=True)
        self.out, self.text = folder / "out", write_text(folder / "text.txt", 60_000)
        self.config = write_run_yaml(folder / "run.yaml", max_steps=steps, log_every=50, eval_every=100)
        self.wrong: list[str] = []
        self.ended: Counter[str] = Counter()

    def start(self, out: Path, ranks: int, **engine: object) -> subprocess.Popen[bytes]:
        """Start the run as a user would, with an environment by which all its processes are found."""
        background = engine.pop("background", False)
        saving = {"every_steps": 5, "every_minutes": None, "keep_last": 2, "keep_best": 1, "async": background}
        tree = engine_json(batch=BATCH, chatgot={"checkpoint": saving}, **engine)  # type: ignore[arg-type]
        tree["optimizer"]["params"]["lr"] = 1e-3
        path = write_json(self.folder / "engine.json", tree)
        words = ["--deepspeed_config", path, "--config", self.config, "--data", self.text, "--out_dir", out]
        command = [sys.executable, ROOT / "launch" / "run", "--nproc", str(ranks), "--", *words]
        variables = environment(**{MARK: str(self.folder)}, TMPDIR=str(self.temporary))
        with open(self.folder / "log.txt", "ab") as log:
            return subprocess.Popen(list(map(str, command)), env=variables, cwd=ROOT, stdout=log, stderr=log)

    def processes(self) -> list[int]:
        """Everything that a start has started and that is still there."""
        found, mark = [], f"{MARK}={self.folder}".encode()
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (path / "environ").read_bytes().split(b"\0") and b") Z " not in (path / "stat").read_bytes():
                    found.append(int(path.name))
            except OSError:  # gone, or somebody else's
                continue
        return sorted(found)

    def ends(self, started: subprocess.Popen[bytes], context: str, within_s: float = ENDS_WITHIN_S) -> int:
        """The exit code; complains of what is still there after a while, and ends it."""
        try:
            code = started.wait(within_s)
        except subprocess.TimeoutExpired:
            self.wrong.append(f"{context}: not ended after {within_s:.0f} s")
            started.kill()
            code = started.wait()
        until = time.monotonic() + ENDS_WITHIN_S
        while (left := self.processes()) and time.monotonic() < until:
            time.sleep(0.2)
        if left:
            self.wrong.append(f"{context}: processes are left: {left}")
            for process in left:
                os.kill(process, signal.SIGKILL)
        return code

    def disturbed(self, number: int, remaining: int) -> None:
        """One start in a random layout, and one kill."""
        draw, journal = self.draw, self.out / "metrics.jsonl"
        ranks = draw.choice([1, 2])
        engine: dict[str, object] = {
            "stage": draw.choice([0, 1, 2, 3]),
            "micro": draw.choice([1, 2, 4] if ranks == 2 else [1, 2, 4, 8]),
            "background": draw.random() < 0.5,
            "activation_checkpointing": draw.choice([None, {}]),
        }
        at = max(digest.history(self.out).digests, default=0) if journal.exists() else 0
        wanted = draw.uniform(0, 2.0) * (self.steps - at) / remaining  # so that all starts together make all steps
        size = journal.stat().st_size if journal.exists() else 0
        before = len(events(self.out))
        started = self.start(self.out, ranks, **engine)
        if draw.random() < 0.15:
            moment, until, alive = "starting", time.monotonic() + draw.uniform(0, 10), []
            while time.monotonic() < until and started.poll() is None:
                time.sleep(0.02)
        else:
            moment, until, alive = "training", time.monotonic() + 300, []
            while started.poll() is None and time.monotonic() < until:
                grown = journal.stat().st_size - size if journal.exists() else 0
                if grown > 0 and not alive:  # looking for them takes longer than a step
                    alive = self.processes()
                if grown >= BYTES_PER_STEP * (1 + wanted):
                    break
                time.sleep(0.005)
            time.sleep(draw.uniform(0, 0.01))
        how = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        alive = alive or self.processes()
        whom = alive if how == signal.SIGKILL and draw.random() < 0.3 else draw.sample(alive, min(1, len(alive)))
        for process in whom:
            try:
                os.kill(process, how)
            except ProcessLookupError:
                continue
        layout = f"{ranks} rank(s), {', '.join(f'{key} {value}' for key, value in engine.items())}"
        context = f"start {number} ({layout}; {how.name} to {len(whom)} of {len(alive)} while {moment})"
        code = self.ends(started, context)
        self.ended[f"{how.name} {code}"] += 1
        if code in REFUSALS:
            self.wrong.append(f"{context}: exit {code}")
        resumed = [f"{e['event']} at {e['step']}" for e in events(self.out)[before:] if "setup" in e]
        print(f"{context}: exit {code}; {', '.join(resumed) or 'never came to train'}; was at step {at}", flush=True)

    def finish(self) -> None:
        """The start that is left alone, and all that must hold afterwards."""
        undisturbed = ENDS_WITHIN_S + self.steps  # a second for each step, on a machine that has other work
        code = self.ends(self.start(self.out, 1, stage=0, micro=8), "the last start", undisturbed)
        if code:
            self.wrong.append(f"the last start ended with {code}")
        reference = self.folder / "reference"
        self.ends(self.start(reference, 1, stage=0, micro=8), "the reference", undisturbed)
        ours, theirs = digest.history(self.out).digests, digest.history(reference).digests
        if not list(ours) == list(theirs) == list(range(1, self.steps + 1)):
            self.wrong.append(f"{len(ours)} steps have a digest, the reference has {len(theirs)}")
        steps = sorted(ours.keys() & theirs.keys())
        if other := [step for step in steps if ours[step].batch != theirs[step].batch]:
            self.wrong.append(f"{len(other)} steps had other batches, the first is {other[0]}")
        parted = {step: abs(ours[step].loss / theirs[step].loss - 1) for step in steps}
        worst = max(parted, key=lambda step: parted[step])
        if parted[worst] > BOUND:
            self.wrong.append(f"the loss of step {worst} is {parted[worst]:.1e} from the reference")
        if differs := events(self.out, "resume_differs"):
            self.wrong.append(f"{len(differs)} resumes differ: {json.dumps(differs[:3])}")
        verify = [sys.executable, "-c", "from chatgot.cli import main; main()", "verify", str(self.out)]
        done = subprocess.run(verify, env=environment(), capture_output=True, text=True, check=False)
        if done.returncode:
            self.wrong.append(f"verify ended with {done.returncode}:\n{done.stdout}")
        left = [*self.temporary.iterdir(), *self.out.rglob(f"{UNFINISHED}*"), *self.out.rglob("*.tmp*")]
        left += [path for path in self.out.rglob(".*") if path not in left]
        if left:
            self.wrong.append(f"temporary files are left: {', '.join(map(str, left[:10]))}")
        compared = sum(event["steps"] for event in events(self.out, "resume_verified"))
        print(done.stdout)
        print(f"steps {len(ours)}; largest relative difference of a loss {parted[worst]:.1e} (step {worst})")
        print(f"resumes {len(events(self.out, 'resumed'))}; steps trained again and compared {compared}")
        print(f"ends: {dict(self.ended)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="is made anew")
    parser.add_argument("--starts", type=int, default=200)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    began, soak = time.monotonic(), Soak(arguments.folder.resolve(), arguments.steps, arguments.seed)
    for number in range(1, arguments.starts):
        if len(digest.history(soak.out).digests) < arguments.steps:
            soak.disturbed(number, arguments.starts - number)
    soak.finish()
    print(f"{arguments.starts} starts in {(time.monotonic() - began) / 60:.0f} minutes: ", end="")
    print("as it must be" if not soak.wrong else f"{len(soak.wrong)} thing(s) wrong")
    for wrong in soak.wrong:
        print(f"WRONG: {wrong}")
    return 1 if soak.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
