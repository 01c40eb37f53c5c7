"""Two ranks, killed with SIGKILL after a checkpoint: two more repeat their journal bit for bit, one within a
tolerance.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from chatgot.proof import digest
from chatgot.verify.replay import replay
from chatgot.verify.verify import verify
from tests.support import ROOT, engine_json, run_ranks, write_json, write_run_yaml
from tests.training import in_process
from tests.training.in_process import argv, events
from tests.training.test_signals import end, start, wait_for_step

SAVED = 3
TRAIN = str(ROOT / "launch" / "train.py")


def killed(folder: Path, text: Path, stage: int, dropout: float) -> tuple[list[str], int]:
    """The command line of a run of two ranks that was killed some steps after its only checkpoint, and the last step
    that it journaled.
    """
    config = write_run_yaml(folder / "run.yaml", max_steps=100_000, model={"dropout": dropout})
    engine = engine_json(stage, micro=2, chatgot={"schedule": {"type": "constant", "warmup_steps": 2}})
    line = argv(write_json(folder / "engine.json", engine), folder / "out", config, text)
    run_ranks([TRAIN, *line, f"train.max_steps={SAVED}"], 2)
    ranks = start(line, 2)
    wait_for_step(folder / "out", SAVED + 2, ranks)
    for rank in ranks:
        rank.send_signal(signal.SIGKILL)
    end(ranks)
    return line, max(digest.history(folder / "out").digests)


@pytest.mark.parametrize("stage", [0, 3])
def test_two_killed_ranks_repeat_the_journal_bit_for_bit(stage, tmp_path, text_file, capsys, warm_starts):
    line, last = killed(tmp_path, text_file, stage, dropout=0.1)
    out, steps = tmp_path / "out", last - SAVED
    said = run_ranks([TRAIN, *line, f"train.max_steps={last + 1}"], 2)[0].stdout
    assert f"resume verified {steps}/{steps}: steps {SAVED + 1}..{last} repeat the journal bit for bit" in said
    [event] = events(out, "resume_verified")
    assert (event["steps"], event["of"], event["exact"]) == (steps, steps, True)
    assert verify(out)
    assert f"{steps} of them were trained again, compared bit for bit" in capsys.readouterr().out
    if stage == 0:
        return  # a replay by two ranks once is enough
    with in_process.cpu_environment():
        assert replay(out, 2)
    found = capsys.readouterr().out
    assert "replay verified 2/2: steps 4..5 after step-00000003 repeat the journal (bit for bit)" in found


def test_one_rank_repeats_the_journal_of_two_within_a_tolerance(tmp_path, text_file):
    line, last = killed(tmp_path, text_file, stage=0, dropout=0.0)
    out, steps = tmp_path / "out", last - SAVED
    assert in_process.train([*line, f"train.max_steps={last + 1}"]) == 0
    [event] = events(out, "resume_verified")
    assert (event["steps"], event["of"], event["exact"]) == (steps, steps, False)
    assert "world_size: 2 -> 1" in event["compares"]
    before, after = (
        {
            r["step"]: r["digest"]
            for r in in_process.read_journal(out / "metrics.jsonl")[0]
            if "digest" in r and r["digest"]["setup"] == id
        }
        for id in dict.fromkeys(e["setup"]["id"] for e in events(out) if "setup" in e)
    )
    assert before[SAVED + 1]["batch"] == after[SAVED + 1]["batch"]
    assert before[SAVED + 1]["rng"] != after[SAVED + 1]["rng"]
    assert before[SAVED + 1]["loss"] == pytest.approx(after[SAVED + 1]["loss"], rel=1e-5)
    assert verify(out)
