"""`chatgot data`: a run of two ranks that was resumed with one, with another batch, and rolled back."""

from __future__ import annotations

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from chatgot import cli
from chatgot.errors import CheckpointError, ConfigError, DataError
from chatgot.proof.fed import at_step, where
from chatgot.training import run
from tests.support import ROOT, engine_json, run_ranks, write_json, write_run_yaml, write_text
from tests.training import in_process
from tests.training.in_process import argv, events
from tests.training.poison import Poison

PASSAGE = "Aroint thee, witch! the rump-fed ronyon cries, and fled"
SAVING = {"every_steps": 3, "every_minutes": None, "keep_best": 0, "keep_last": 20}
GUARD = {"max_consecutive_skips": 2, "on_diverge": "rollback"}
PLACE = re.compile(r"--- sample (\d+): (\w\.txt):(\d+), tokens (\d+)\.\.(\d+) of the training split")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Steps 1..6 of 8 samples on two ranks; 7.. of 12 samples on one, back from step 11 to 6."""
    path = tmp_path_factory.mktemp("data")
    (path / "texts").mkdir()
    for seed, name in enumerate("ab"):
        text = write_text(path / "texts" / f"{name}.txt", characters=6000, seed=seed).read_text(encoding="utf-8")
        lines = text.split("\n")
        lines.insert(20 + 30 * seed, PASSAGE)
        (path / "texts" / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    config = write_run_yaml(path / "run.yaml", max_steps=40)

    def line(steps: int, batch: int, *more: str) -> list[str]:
        tree = engine_json(0, batch=batch, micro=2, chatgot={"checkpoint": SAVING, "guard": GUARD})
        engine = write_json(path / f"engine-{batch}.json", tree)
        return [*argv(engine, path / "run", config, path / "texts", *more), f"train.max_steps={steps}"]

    run_ranks([str(ROOT / "launch" / "train.py"), *line(6, 8)], 2)
    loop = in_process.prepare(line(40, 12, "--allow_batch_change"))
    Poison(loop, (48 + 36, 48 + 48))  # the batches of steps 10 and 11
    run.finish(loop)
    assert [(one["from_step"], one["to_step"]) for one in events(path / "run", "rolled_back")] == [(11, 6)]
    return path


def test_every_step_is_proved_by_the_journals_hash(folder):
    lines = []
    for step in range(1, 41):
        lines = list(at_step(folder / "run", step))
        assert lines[-1].startswith("\nproved: the hash "), lines[-1]
        assert sum(line.startswith("\n--- sample") for line in lines) == (8 if step <= 6 else 12)
    assert lines[0] == f"step 40 was fed samples {108 + 12 * 33}..{108 + 12 * 34 - 1} of texts"


def test_text_and_place_of_each_sample_are_those_of_the_file(folder):
    for step in (2, 30):
        lines = list(at_step(folder / "run", step))
        for head, text in pairwise(lines):
            if found := PLACE.fullmatch(head.strip()):
                rest = (folder / "texts" / found[2]).read_text(encoding="utf-8").split("\n")[int(found[3]) - 1 :]
                assert text in "\n".join(rest) or found[2] == "a.txt", "one file may end in a sample"
                assert text.split("\n")[0] in rest[0]
                assert len(text) == int(found[5]) - int(found[4]) + 1 == 17


def test_the_ranks_shares_are_the_global_batch(folder):
    def heads(rank: int | None) -> list[str]:
        return [line for line in at_step(folder / "run", 3, rank) if line.startswith("\n--- sample")]

    assert sorted(heads(0) + heads(1)) == sorted(heads(None))
    assert not set(heads(0)) & set(heads(1))
    with pytest.raises(ConfigError, match=r"--rank 2: 2 rank\(s\) trained step 3, 0..1"):
        list(at_step(folder / "run", 3, 2))


def test_where_names_places_and_exactly_the_steps_that_fed_them(folder):
    lines = list(where(folder / "run", PASSAGE[:6]))
    assert lines[-1] == "the run stands at step 40"
    assert [line.split(":")[:2] for line in lines[:-1]] == [["a.txt", "21 (train)"], ["b.txt", "51 (train)"]]
    holding = {1: set[int](), 2: set[int]()}
    for step in range(1, 41):
        for head, text in pairwise(at_step(folder / "run", step)):
            if (found := PLACE.fullmatch(head.strip())) and PASSAGE[:6] in text:
                holding[1 if found[2] == "a.txt" else 2].add(step)
    for line, steps in zip(lines, holding.values()):
        whole = re.search(r"fed in steps? ([\d, ]+)", line)
        assert {int(step) for step in re.findall(r"\d+", whole[1] if whole else "")} == steps
    assert holding[1]
    assert holding[2]
    [missing, _] = where(folder / "run", "Out, damned spot! out, I say")
    assert missing.startswith("it does not stand word for word in ")


def test_what_stands_in_the_validation_split_was_never_fed(folder):
    text = (folder / "texts" / "b.txt").read_text(encoding="utf-8")[-40:]
    [line, _] = where(folder / "run", text)
    assert line.startswith("b.txt:")
    assert line.endswith(" (val): never fed")


def test_refusals(folder, tmp_path, capsys, monkeypatch):
    copy = Path(shutil.copytree(folder / "run", tmp_path / "copy"))
    with pytest.raises(ConfigError, match=r"step 41: .* has trained steps 1..40"):
        list(at_step(copy, 41))
    journal = (copy / "metrics.jsonl").read_text()
    wrong = re.sub(r'("step": 7, "digest": \{"batch": ")\w{4}', r"\g<1>0000", journal)
    (copy / "metrics.jsonl").write_text(wrong)
    with pytest.raises(CheckpointError, match="this text gives"):
        list(at_step(copy, 7))
    (copy / "metrics.jsonl").write_text(re.sub(r'\{"step": 8, "digest".*\n', "", journal))
    assert list(at_step(copy, 8))[-1] == "\nnot proved: metrics.jsonl has no digest of step 8"
    other = write_text(tmp_path / "other.txt", seed=9)
    with pytest.raises(DataError, match="is not the data"):
        list(at_step(copy, 7, spec=str(other)))
    environment = json.loads((copy / "environment.json").read_text())
    environment["data"]["spec"] = "nowhere"
    (copy / "environment.json").write_text(json.dumps(environment))
    with pytest.raises(DataError, match="nowhere"):
        list(where(copy, "night"))
    for words, said in [
        (["data", "at-step", str(copy), "0"], "is no step"),
        (["data", "where", str(copy), ""], "is empty"),
        (["data", "where", str(copy), "night", "--rank", "1"], "--rank belongs to"),
        (["data", "at-step", str(tmp_path), "1"], "not a run folder"),
    ]:
        with pytest.raises(SystemExit) as end:
            cli.main(words)
        assert end.value.code == 2
        assert said in capsys.readouterr().err
