"""SIGKILL during a save, of one rank or of all: the same command again goes on from the newest whole checkpoint.

Every launch resumes what the one before it left, trains on, and is killed in its own save: one launch proves one resume
and makes one kill.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from chatgot.checkpoint.load import find
from chatgot.checkpoint.portable import fp32_weights
from tests.support import ROOT, engine_json, run_ranks, write_json, write_run_yaml
from tests.training import in_process

EVERY = 2
OPERATIONS = {1: {0: 17, 1: 4}, 3: {0: 17, 1: 6}}
"""By ZeRO stage: file operations of one save on each of two ranks, without retention."""
PUBLISH = 13
"""The operation of rank 0 that gives the checkpoint its name."""
SHORT = {
    (1, False): [(PUBLISH, "0"), (PUBLISH + 1, "0"), (6, "all")],
    (3, True): [(4, "1"), (PUBLISH, "0"), (16, "0")],
}


class Sweep:
    """One run folder that is launched, killed and launched again."""

    def __init__(self, folder: Path, stage: int, text: Path, background: bool) -> None:
        self.out, self.stage, self.rank_0_was_killed = folder / "out", stage, False
        saving = {
            "checkpoint": {
                "every_steps": EVERY,
                "every_minutes": None,
                "keep_best": 0,
                "keep_last": 99,
                "async": background,
            }
        }
        engine = write_json(folder / "engine.json", engine_json(stage, micro=2, chatgot=saving))
        config = write_run_yaml(folder / "run.yaml", max_steps=10_000)
        self.words = [str(ROOT / "launch" / "train.py"), *in_process.argv(engine, self.out, config, text)]

    def launch(self, *more: str, **env: str):
        return run_ranks([*self.words, *more], 2, check=False, env=env)

    def newest(self) -> int:
        """Step of the newest whole checkpoint; 0: none."""
        found = find(self.out / "checkpoints")
        return found.manifest["step"] if found else 0

    def kill(self, number: int, rank: str) -> None:
        """Launch, be killed at operation `number` of the first save, and check what is left."""
        before = self.newest()
        ranks = self.launch(CHATGOT_FAULT=f"save:{number}:kill9:{rank}")
        context = f"stage {self.stage}, operation {number}, rank {rank}\n" + "\n".join(
            done.stderr[-2000:] for done in ranks
        )
        killed = 1 if rank == "1" else 0
        self.rank_0_was_killed = killed == 0
        assert ranks[killed].returncode == -signal.SIGKILL, context
        assert all(done.returncode for done in ranks), context
        assert self.started_at() == before, context
        published = killed == 0 and number > PUBLISH
        found = find(self.out / "checkpoints")
        assert self.newest() == before + (EVERY if published else 0), context
        if found is not None:
            assert not [note for note in found.notes if "damaged" in note], context
            assert fp32_weights(found)

    def started_at(self) -> int:
        """Step at which the last launch began."""
        return [event for event in in_process.events(self.out) if event["event"] in ("started", "resumed")][-1]["step"]

    def finish(self) -> None:
        """One launch that nothing happens to; it also counts the operations, so that the sweep leaves none out."""
        before = self.newest()
        ranks = self.launch(f"train.max_steps={before + EVERY}", CHATGOT_FAULT="save:0:list:all")
        assert [done.returncode for done in ranks] == [0, 0], ranks[0].stderr
        assert ("was left by a run that is gone" in ranks[0].stdout) == self.rank_0_was_killed
        assert self.started_at() == before
        assert self.newest() == before + EVERY
        assert sorted(in_process.series(self.out, "train/loss")) == list(range(1, before + EVERY + 1))
        assert not [path.name for path in (self.out / "checkpoints").iterdir() if path.name.startswith(".")], (
            "leftovers are swept"
        )
        assert not (self.out / ".lock").exists()
        for rank, done in enumerate(ranks):
            lines = [line for line in done.stderr.splitlines() if line.startswith("CHATGOT_FAULT: operation ")]
            assert len(lines) == OPERATIONS[self.stage][rank], done.stderr
            if rank == 0:
                assert lines[PUBLISH - 1] == f"CHATGOT_FAULT: operation {PUBLISH}: publish step-{before + EVERY:08d}"


@pytest.mark.parametrize(("stage", "background"), SHORT)
def test_killed_in_a_save_and_started_again(stage, background, tmp_path, text_file):
    sweep = Sweep(tmp_path, stage, text_file, background)
    for number, rank in SHORT[stage, background]:
        sweep.kill(number, rank)
    sweep.finish()


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True], ids=["at once", "async"])
@pytest.mark.parametrize("who", ["0", "1", "all"])
@pytest.mark.parametrize("stage", [1, 3])
def test_killed_at_every_file_operation_of_a_save(stage, who, background, tmp_path, text_file):
    sweep = Sweep(tmp_path, stage, text_file, background)
    sweep.finish()
    for number in range(1, OPERATIONS[stage][1 if who == "1" else 0] + 1):
        sweep.kill(number, who)
    sweep.finish()
