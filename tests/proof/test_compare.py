"""A resume repeats what the journal has, bit for bit, and says so; a resume that does not is named at its first
difference.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from chatgot.checkpoint import rng
from chatgot.observe import journal
from chatgot.observe.journal import read_journal
from chatgot.proof import digest
from chatgot.proof.compare import Proof
from chatgot.training import preparation
from tests.support import engine_json, write_json, write_run_yaml, write_text
from tests.training import in_process
from tests.training.in_process import argv, contents, events

STEPS = 8
SAVE = 3
LEFT_AT = 6


def words(folder: Path, text: Path, stage: int = 0, dropout: float = 0.1, **engine) -> list[str]:
    config = write_run_yaml(folder / "run.yaml", max_steps=STEPS, log_every=4, model={"dropout": dropout})
    saving = {"checkpoint": {"every_steps": SAVE, "every_minutes": None, "keep_best": 0, "keep_last": 9}}
    return argv(
        write_json(folder / "engine.json", engine_json(stage, chatgot=saving, **engine)), folder / "out", config, text
    )


def left(folder: Path, text: Path, **settings) -> list[str]:
    """The command line of a run that was left at step 5, two steps after its checkpoint."""
    line = words(folder, text, **settings)
    in_process.abandon_after(LEFT_AT - 1, line)
    return line


@pytest.mark.parametrize("stage", [0, 3])
def test_resumed_steps_are_those_of_the_journal_bit_for_bit(stage, tmp_path, text_file, capsys):
    line = left(tmp_path, text_file, stage=stage)
    assert in_process.train(line) == 0
    assert "resume verified 2/2: steps 4..5 repeat the journal bit for bit" in capsys.readouterr().out
    [event] = events(tmp_path / "out", "resume_verified")
    assert (event["from_step"], event["steps"], event["of"], event["exact"]) == (SAVE, 2, 2, True)
    found = digest.history(tmp_path / "out").digests
    assert sorted(found) == list(range(1, STEPS + 1))
    assert len({d.batch for d in found.values()}) == len({d.rng for d in found.values()}) == STEPS
    assert not events(tmp_path / "out", "resume_differs")


def test_lines_of_the_journal_never_go_back_within_a_run(tmp_path, text_file):
    line = [*words(tmp_path, text_file), "train.eval_every=1", "train.log_every=1"]
    assert in_process.train(line) == 0
    steps = [record["step"] for record in read_journal(tmp_path / "out" / "metrics.jsonl")[0]]
    assert steps == sorted(steps)
    assert len(steps) == 3 * STEPS + 1, "digest, training and evaluation of every step; what the last samples copied"


def test_digests_that_lag_a_step_behind_are_the_same_and_none_is_missing_at_a_checkpoint(
    tmp_path, text_file, monkeypatch
):
    """As on a GPU, where reading a loss at once would wait for the step."""
    for name in ("plain", "late"):
        (tmp_path / name).mkdir()
        line = [*words(tmp_path / name, text_file), "train.log_every=1"]
        loop = in_process.prepare(line)
        loop.proof.lags = name == "late"
        for step in loop.steps():
            known = max(digest.history(tmp_path / name / "out").digests, default=0)
            assert known == (step if name == "plain" or step in (SAVE, 2 * SAVE, STEPS) else step - 1)
    late, plain = (digest.history(tmp_path / name / "out").digests for name in ("late", "plain"))
    assert late == plain
    steps = [record["step"] for record in read_journal(tmp_path / "late" / "out" / "metrics.jsonl")[0]]
    assert steps == sorted(steps)


def test_an_interrupted_comparison_says_how_far_it_came(tmp_path, text_file, capsys):
    line = left(tmp_path, text_file)
    assert in_process.train([*line, f"train.max_steps={SAVE + 1}", "ds.chatgot.schedule.type=constant"]) == 0
    assert "resume verified 1/2" in capsys.readouterr().out


def test_after_a_clean_stop_there_is_nothing_to_compare(tmp_path, text_file):
    line = words(tmp_path, text_file)
    in_process.abandon_after(SAVE, line)
    assert in_process.train(line) == 0
    [event] = events(tmp_path / "out", "resume_not_compared")
    assert event["why"] == "the journal ends at the checkpoint"


def forget_rng(monkeypatch):
    monkeypatch.setattr(rng, "restore", lambda state: [])


def forget_position(monkeypatch):
    original = preparation.resume

    def resume(*arguments):
        client_state, notes = original(*arguments)
        return {**client_state, "next_sample": 0}, notes

    monkeypatch.setattr(preparation, "resume", resume)


def perturb_a_weight(monkeypatch):
    original = preparation.resume

    def resume(engine, *arguments):
        resumed = original(engine, *arguments)
        with torch.no_grad():
            next(engine.module.parameters()).view(-1)[0] += 1e-3
        return resumed

    monkeypatch.setattr(preparation, "resume", resume)


@pytest.mark.parametrize(
    ("sabotage", "field"), [(forget_rng, "rng"), (forget_position, "batch"), (perturb_a_weight, "loss")]
)
def test_control_a_resume_that_is_wrong_is_named_by_what_is_wrong(
    sabotage, field, tmp_path, text_file, capsys, monkeypatch
):
    line = left(tmp_path, text_file)
    sabotage(monkeypatch)
    assert in_process.train(line) == 0, "training goes on"
    [event] = events(tmp_path / "out", "resume_differs")
    assert (event["step"], event["field"]) == (SAVE + 1, field)
    assert event["journal"] != event["now"]
    assert f"WARNING: resume differs at step {SAVE + 1}: {field} was" in capsys.readouterr().out
    assert not events(tmp_path / "out", "resume_verified")


def test_changed_rate_leaves_the_batches_to_compare_and_says_why(tmp_path, text_file, capsys):
    line = left(tmp_path, text_file)
    assert in_process.train([*line, "ds.optimizer.params.lr=1e-3"]) == 0
    said = capsys.readouterr().out
    assert (
        "resume verified 2/2: steps 4..5 repeat the journal (batch, because settings were changed "
        "(ds.optimizer.params.lr: " in said
    )
    [event] = events(tmp_path / "out", "resume_verified")
    assert event["exact"] is False
    # The past that this run left behind had another rate: it is not held against a third start that goes back to the
    # first checkpoint.
    for tag in ("step-00000006", "step-00000008"):
        damaged = tmp_path / "out" / "checkpoints" / tag / "manifest.json"
        damaged.write_text("{")
    assert in_process.train([*line, "ds.optimizer.params.lr=1e-3"]) == 0
    assert "resume verified 5/5: steps 4..8 repeat the journal bit for bit" in capsys.readouterr().out


def test_changed_seed_leaves_nothing_to_compare(tmp_path, text_file):
    line = left(tmp_path, text_file)
    assert in_process.train([*line, "train.seed=5", "--allow_data_change"]) == 0
    [event] = events(tmp_path / "out", "resume_not_compared")
    assert "train.seed: 1337 -> 5" in event["why"]


def test_other_data_leave_nothing_to_compare(tmp_path, text_file):
    line = left(tmp_path, text_file)
    line[line.index(str(text_file))] = str(write_text(tmp_path / "other.txt", seed=1))
    assert in_process.train([*line, "--allow_data_change"]) == 0
    [event] = events(tmp_path / "out", "resume_not_compared")
    assert "settings were changed (data: " in event["why"]


def test_another_global_batch_leaves_nothing_to_compare(tmp_path, text_file):
    line = left(tmp_path, text_file)
    assert in_process.train([*line, "ds.train_batch_size=16", "--allow_batch_change"]) == 0
    [event] = events(tmp_path / "out", "resume_not_compared")
    assert "ds.train_batch_size: 8 -> 16" in event["why"]


def test_what_changes_no_number_does_not_spoil_the_comparison(tmp_path, text_file, capsys):
    line = left(tmp_path, text_file)
    assert (
        in_process.train([*line, "train.log_every=1", "train.eval_every=2", "ds.chatgot.checkpoint.every_steps=2"]) == 0
    )
    assert "resume verified 2/2: steps 4..5 repeat the journal bit for bit" in capsys.readouterr().out


def test_another_stage_is_compared_within_a_tolerance(tmp_path, text_file, capsys):
    line = left(tmp_path, text_file)
    assert in_process.train([*line, "ds.zero_optimization.stage=2"]) == 0
    said = capsys.readouterr().out
    assert (
        "resume verified 2/2: steps 4..5 repeat the journal (batch and rng and lr; loss and grad_norm within a "
        "relative 1e-05" in said
    )
    assert "zero_stage: 0 -> 2" in said


def test_other_micro_batches_without_dropout_are_compared_within_a_tolerance(tmp_path, text_file, capsys, monkeypatch):
    line = left(tmp_path, text_file, dropout=0.0)
    change = ["ds.train_micro_batch_size_per_gpu=2", "ds.gradient_accumulation_steps=4"]
    assert in_process.train([*line, *change]) == 0
    assert "resume verified 2/2" in capsys.readouterr().out


def test_control_a_weight_is_noticed_through_the_tolerance_too(tmp_path, text_file, monkeypatch):
    line = left(tmp_path, text_file, dropout=0.0)
    original = preparation.resume

    def resume(engine, *arguments):
        resumed = original(engine, *arguments)
        with torch.no_grad():
            next(engine.module.parameters()).mul_(1.1)
        return resumed

    monkeypatch.setattr(preparation, "resume", resume)
    change = ["ds.train_micro_batch_size_per_gpu=2", "ds.gradient_accumulation_steps=4"]
    assert in_process.train([*line, *change]) == 0
    [event] = events(tmp_path / "out", "resume_differs")
    assert event["field"] == "loss"


def test_a_run_that_branches_off_is_compared_with_the_run_that_it_left(tmp_path, text_file, capsys):
    line = left(tmp_path, text_file)
    before = contents(tmp_path / "out")
    branch = [word if word != str(tmp_path / "out") else str(tmp_path / "branch") for word in line]
    assert in_process.train([*branch, "--resume_from", str(tmp_path / "out")]) == 0
    assert "resume verified 2/2" in capsys.readouterr().out
    assert contents(tmp_path / "out") == before


def test_full_disk_costs_lines_and_not_the_run(tmp_path, text_file, capsys, monkeypatch):
    """Journal, events and samples; saving has tests of its own (tests/faults)."""
    original, steps = os.write, {4, 5}
    current = [0]

    def write(descriptor, data):
        if current[0] in steps and b'"step"' in bytes(data):
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(descriptor, data)

    def write_sample(path, text):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(journal.os, "write", write)
    monkeypatch.setattr("chatgot.training.evaluation.write_samples", write_sample)
    end_step = Proof.end_step

    def ended(self, trained, flags):
        current[0] = trained.step
        return end_step(self, trained, flags)

    monkeypatch.setattr(Proof, "end_step", ended)
    line = words(tmp_path, text_file)
    assert (
        in_process.train([*line, "train.log_every=1", "ds.chatgot.checkpoint.every_steps=100", "train.sample_every=7"])
        == 0
    )
    out = tmp_path / "out"
    said = capsys.readouterr().out
    assert said.count("WARNING: lines of") == 1
    assert f"lines of {out / 'metrics.jsonl'} can be written again; 4 were lost" in said
    assert sorted(digest.history(out).digests) == [1, 2, 3, 6, 7, 8]
    assert said.count("WARNING: samples cannot be written") == 1
    assert events(out, "sampled") == []
    assert events(out)[-1]["event"] == "finished"


def test_numbers_of_the_journal_are_the_bits(tmp_path, text_file):
    assert in_process.train([*words(tmp_path, text_file), "train.log_every=1"]) == 0
    out = tmp_path / "out"
    for step, norm in in_process.series(out, "optim/grad_norm").items():
        assert digest.history(out).digests[step].grad_norm == norm
    raw = (out / "metrics.jsonl").read_text().splitlines()
    for line in raw:
        assert json.dumps(json.loads(line)) == line


def test_a_run_on_the_cpu_does_not_start_cuda_for_its_random_state(monkeypatch):
    def refuse() -> torch.Tensor:
        raise AssertionError("CUDA was started")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", refuse)
    rng.fingerprint(0)
    assert rng.capture()["cuda"] is None
    assert rng.restore({**rng.capture(), "cuda": torch.zeros(16, dtype=torch.uint8)}) == [
        "the checkpoint's CUDA random state is not used on a CPU: dropout draws from the CPU generator"
    ]


def test_exchanged_random_states_of_two_ranks_are_noticed():
    rng.seed(1, 0)
    first, second = rng.fingerprint(0), rng.fingerprint(1)
    assert first != second
    assert rng.fingerprint(0) == first
    torch.rand(1)
    assert rng.fingerprint(0) != first
