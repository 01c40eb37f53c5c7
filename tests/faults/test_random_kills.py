"""SIGKILL at random times, of one rank or of all: the same command again goes on from the newest whole checkpoint,
every time.
"""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from chatgot.checkpoint.load import find
from tests.support import (
    ROOT,
    engine_json,
    environment,
    free_port,
    place_of,
    warm_python,
    write_json,
    write_run_yaml,
)
from tests.training import in_process

GRACE_S = 5.0
"""How long a rank whose peer is gone may take to end before it is killed too, as a launcher does: it may wait for the
peer to join.
"""


class Ranks:
    """Two ranks of train.py as a launcher would start them."""

    def __init__(self, words: list[str], log: Path) -> None:
        port = free_port()
        self.processes = []
        for rank in range(2):
            with open(log.with_suffix(f".{rank}"), "w") as file:
                command = [warm_python(), str(ROOT / "launch" / "train.py"), *words]
                place = environment(**place_of(rank, 2, port))
                self.processes.append(subprocess.Popen(command, env=place, cwd=ROOT, stdout=file, stderr=file))

    def alive(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def kill(self, who: tuple[int, ...]) -> None:
        for rank in who:
            self.processes[rank].send_signal(signal.SIGKILL)
        until = time.monotonic() + GRACE_S
        while any(process.poll() is None for process in self.processes) and time.monotonic() < until:
            time.sleep(0.02)
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    ("kills", "stage", "background"),
    [
        (3, 1, True),
        pytest.param(50, 1, False, marks=pytest.mark.slow),
        pytest.param(50, 3, True, marks=pytest.mark.slow),
    ],
)
def test_killed_at_random_times(kills, stage, background, tmp_path, text_file):
    draw = random.Random(1000 * stage + kills)
    out = tmp_path / "out"
    saving = {
        "checkpoint": {"every_steps": 2, "every_minutes": None, "keep_best": 1, "keep_last": 2, "async": background}
    }
    engine = write_json(tmp_path / "engine.json", engine_json(stage, micro=2, chatgot=saving))
    config = write_run_yaml(tmp_path / "run.yaml", model={"dropout": 0.1}, max_steps=1_000_000, eval_every=7)
    words = in_process.argv(engine, out, config, text_file)
    for number in range(kills):
        before = find(out / "checkpoints") if out.exists() else None
        ranks = Ranks(words, tmp_path / "log")
        started = len(in_process.events(out))
        if number == 0 or draw.random() < 0.8:  # else: while it starts
            while ranks.alive() and (len(in_process.events(out)) == started or not in_process.tags(out)):
                time.sleep(0.05)
            time.sleep(draw.uniform(0.0, 1.5))
        else:
            time.sleep(draw.uniform(0.0, 2.0))
        who = draw.choice([(0,), (1,), (0, 1)])
        still_alive = ranks.alive()
        ranks.kill(who)
        context = f"kill {number} of ranks {who}\n" + "\n".join(
            tmp_path.joinpath(f"log.{rank}").read_text()[-3000:] for rank in range(2)
        )
        assert still_alive, context
        starts = [event for event in in_process.events(out)[started:] if event["event"] in ("started", "resumed")]
        for event in starts:
            assert event["step"] == (before.manifest["step"] if before else 0), context
        after = find(out / "checkpoints")
        assert not after or not [note for note in after.notes if "damaged" in note], context
        assert (after.manifest["step"] if after else 0) >= (before.manifest["step"] if before else 0), context
    last = find(out / "checkpoints")
    assert last is not None
    assert not in_process.events(out, "resume_differs"), (
        "every resume repeated, bit for bit, what had been journaled behind its checkpoint"
    )
    if kills > 10:
        assert sum(event["steps"] for event in in_process.events(out, "resume_verified")) >= kills // 3
    assert (
        in_process.train(
            [*words, f"train.max_steps={last.manifest['step'] + 2}", "ds.train_micro_batch_size_per_gpu=4"]
        )
        == 0
    )
