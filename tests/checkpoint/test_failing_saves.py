"""A save that fails publishes nothing and leaves training going; the third in a row, or the last chance, ends the run
with 4.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from chatgot.checkpoint.load import find
from chatgot.checkpoint.portable import fp32_weights
from chatgot.errors import CheckpointError
from chatgot.run_folder import PRUNED
from chatgot.training import run
from tests.support import ROOT, engine_json, run_ranks, write_json, write_run_yaml
from tests.training import in_process

RUNS = {"recovers": [2, 4], "three in a row": [2, 4, 6], "the last one": [10]}


@pytest.fixture(scope="module")
def launched(tmp_path_factory, text_file) -> tuple[Path, list[dict[str, int]]]:
    """(folder of run folders, exit codes by rank). Rank 1 cannot write at the steps of RUNS."""
    folder: Path = tmp_path_factory.mktemp("full")
    config = write_run_yaml(folder / "run.yaml", max_steps=10)
    saving = {"checkpoint": {"every_steps": 2, "every_minutes": None, "keep_last": 9, "keep_best": 0}}
    plan = []
    for stage in (1, 3):
        engine = write_json(folder / f"engine{stage}.json", engine_json(stage, micro=2, chatgot=saving))
        for name, steps in RUNS.items():
            out = folder / f"{name} {stage}"
            plan.append({"name": out.name, "argv": in_process.argv(engine, out, config, text_file), "fail_at": steps})
    (folder / "swap").mkdir()
    (folder / "swap" / "moments.tensor.swp").write_bytes(bytes(100_000))
    out = folder / "nvme 3"
    argv = in_process.argv(folder / "engine3.json", out, config, text_file)
    plan.append({"name": out.name, "argv": argv, "fail_at": [2], "nvme": str(folder / "swap")})
    (folder / "plan.json").write_text(json.dumps(plan))
    run_ranks(["-m", "tests.checkpoint.failing_ranks", str(folder / "plan.json"), str(folder / "result")], 2)
    return folder, [json.loads((folder / f"result.{rank}").read_text()) for rank in range(2)]


@pytest.fixture(params=[1, 3], ids=["stage 1", "stage 3"])
def two_ranks(request, launched):
    """Given a run's name: its folder and the exit code of every rank."""
    folder, codes = launched
    return lambda name: (folder / f"{name} {request.param}", [code[f"{name} {request.param}"] for code in codes])


def test_invariant_14_latest_changes_only_after_all_ranks_wrote(two_ranks):
    out, codes = two_ranks("recovers")
    assert codes == [0, 0]
    assert in_process.tags(out) == [6, 8, 10], "what rank 1 could not write was not published"
    assert (out / "checkpoints" / "latest").read_text() == "step-00000010"
    assert [(e["step"], e["in_a_row"]) for e in in_process.events(out, "save_failed")] == [(2, 1), (4, 2)]
    assert "rank 1" in in_process.events(out, "save_failed")[0]["error"]
    assert sorted(in_process.series(out, "train/loss")) == list(range(1, 11))
    assert not list((out / "checkpoints").glob(".*")), "what was left unfinished is swept at the next save"


def test_copy_of_what_is_on_nvme_that_fails_on_one_rank_is_shared(launched):
    """DeepSpeed's own copytree, between its files and its barrier."""
    folder, codes = launched
    out = folder / "nvme 3"
    assert [code["nvme 3"] for code in codes] == [0, 0]
    assert in_process.tags(out) == [4, 6, 8, 10]
    [failed] = in_process.events(out, "save_failed")
    assert failed["step"] == 2
    assert "rank 1" in failed["error"]
    for rank in range(2):
        copied = out / "checkpoints" / "step-00000004" / "offloaded_tensors" / f"rank{rank:02d}" / "moments.tensor.swp"
        assert copied.stat().st_size == 100_000


def test_third_failure_in_a_row_ends_every_rank_with_4(two_ranks):
    out, codes = two_ranks("three in a row")
    assert codes == [4, 4]
    assert in_process.tags(out) == []
    assert not (out / "checkpoints" / "latest").exists()
    assert max(in_process.series(out, "train/loss")) == 6
    assert in_process.events(out)[-1]["event"] == "failed"


def test_failed_last_save_ends_with_4_and_keeps_the_earlier_checkpoints(two_ranks):
    out, codes = two_ranks("the last one")
    assert codes == [4, 4]
    assert in_process.tags(out) == [2, 4, 6, 8]
    found = find(out / "checkpoints")
    assert found is not None
    assert found.tag == (out / "checkpoints" / "latest").read_text() == "step-00000008"
    assert fp32_weights(found)


def test_part_that_does_not_load_on_one_rank_is_refused_by_both(two_ranks, launched, tmp_path, text_file):
    out, _ = two_ranks("recovers")
    stage = out.name[-1]
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    [part] = (copy / "checkpoints" / "step-00000010").glob("*zero_pp_rank_1_mp_rank_00_optim_states.pt")
    torch.save({"optimizer_state_dict": {}}, part)
    in_process.rehash(part.parent)  # so that only the loading itself can notice
    before = in_process.contents(copy)
    words = in_process.argv(
        launched[0] / f"engine{stage}.json", copy, launched[0] / "run.yaml", text_file, "--resume_from", "must"
    )
    ranks = run_ranks([str(ROOT / "launch" / "train.py"), *words], 2, check=False)
    assert [rank.returncode for rank in ranks] == [4, 4]
    assert ranks[0].stderr.startswith("chatgot: rank 1: ")
    assert "cannot be loaded" in ranks[0].stderr
    assert ranks[1].stderr == ""
    assert in_process.contents(copy) == before


def test_a_file_in_the_way_is_reported_and_the_next_save_tries_again(tmp_path, text_file, capsys):
    config = write_run_yaml(tmp_path / "run.yaml", max_steps=6)
    engine = write_json(
        tmp_path / "engine.json", engine_json(chatgot={"checkpoint": {"every_steps": 2, "every_minutes": None}})
    )
    out = tmp_path / "out"
    out.mkdir()
    (out / "checkpoints").write_text("in the way")
    loop = in_process.prepare(in_process.argv(engine, out, config, text_file))
    for step in loop.steps():
        if step == 3:
            (out / "checkpoints").unlink()
    assert in_process.tags(out) == [4, 6]
    said = capsys.readouterr().out
    assert "WARNING" in said
    assert "training goes on" in said
    [failure] = in_process.events(out, "save_failed")
    assert failure["step"] == 2


def test_the_run_ends_with_4_when_nothing_could_ever_be_saved(tmp_path, text_file):
    config = write_run_yaml(tmp_path / "run.yaml", max_steps=3)
    engine = write_json(tmp_path / "engine.json", engine_json())
    out = tmp_path / "out"
    out.mkdir()
    (out / "checkpoints").write_text("in the way")
    loop = in_process.prepare(in_process.argv(engine, out, config, text_file))
    with pytest.raises(CheckpointError, match="could not be saved"):
        run.finish(loop)
    assert in_process.events(out)[-1] | {"event": "failed", "exit_code": 4} == in_process.events(out)[-1]
    assert (out / "checkpoints").read_text() == "in the way"


def test_damaged_checkpoint_is_named_once_left_alone_and_no_hindrance_to_deleting_others(tmp_path, text_file, capsys):
    config = write_run_yaml(tmp_path / "run.yaml", max_steps=6)
    engine = write_json(
        tmp_path / "engine.json",
        engine_json(chatgot={"checkpoint": {"every_steps": 1, "keep_last": 2, "keep_best": 0}}),
    )
    out = tmp_path / "out"
    loop = in_process.prepare(in_process.argv(engine, out, config, text_file))
    for step in loop.steps():
        if step == 1:
            (out / "checkpoints" / "step-00000001" / "manifest.json").write_text("{")
        if step == 4:
            next((out / "checkpoints" / "step-00000003").glob("*.pt")).write_bytes(b"short")
    said = capsys.readouterr().out
    assert said.count("WARNING") == 2
    for tag in ("step-00000001", "step-00000003"):
        assert said.count(f"WARNING: checkpoint {out / 'checkpoints' / tag} is damaged: ") == 1
    assert "has 5 bytes, not" in said
    assert in_process.tags(out) == [1, 3, 5, 6], "the two last good ones and the damaged ones"
    found = find(out / "checkpoints")
    assert found is not None
    assert (found.tag, found.damaged) == ("step-00000006", ("step-00000001",)), "step 3 is older, and was not looked at"


def test_checkpoint_that_a_resume_found_damaged_counts_for_nothing_until_it_is_written_anew(
    tmp_path, text_file, capsys
):
    config = write_run_yaml(tmp_path / "run.yaml", max_steps=8)
    engine = write_json(
        tmp_path / "engine.json",
        engine_json(chatgot={"checkpoint": {"every_steps": 1, "keep_last": 2, "keep_best": 0}}),
    )
    out = tmp_path / "out"
    words = in_process.argv(engine, out, config, text_file)
    in_process.abandon_after(4, words)
    assert in_process.tags(out) == [3, 4]
    weights = max((out / "checkpoints" / "step-00000004").glob("*.pt"), key=lambda path: path.stat().st_size)
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")  # which only the hash shows
    loop = in_process.prepare([*words, "ds.chatgot.checkpoint.every_steps=3"])
    assert loop.step == 3
    assert loop.saving.saver.damaged == {"step-00000004"}
    steps = loop.steps()
    loop.save()  # of step 3: at once, before step 4 is written anew
    assert in_process.tags(out) == [3, 4]
    assert next(steps) == 4
    loop.save()
    assert loop.saving.saver.damaged == set()
    for _ in steps:
        pass
    assert in_process.tags(out) == [6, 8], "step 4 was whole again, and went as any other"
    assert capsys.readouterr().out.count("WARNING") == 1  # the resume's


def test_checkpoint_that_cannot_be_deleted_is_reported_tried_again_and_no_hindrance(tmp_path, text_file, capsys):
    config = write_run_yaml(tmp_path / "run.yaml", max_steps=6)
    engine = write_json(
        tmp_path / "engine.json",
        engine_json(chatgot={"checkpoint": {"every_steps": 1, "keep_last": 2, "keep_best": 0}}),
    )
    out = tmp_path / "out"
    in_the_way = (
        out / "checkpoints" / f"{PRUNED}step-00000001"
    )  # a file: no folder can be renamed to it, nor is it a folder to delete
    loop = in_process.prepare(in_process.argv(engine, out, config, text_file))
    for step in loop.steps():
        if step == 1:
            in_the_way.write_text("")
        if step == 4:
            assert in_process.tags(out) == [1, 3, 4]
            in_the_way.unlink()
    said = capsys.readouterr().out
    assert (
        f"WARNING: {out / 'checkpoints' / 'step-00000001'}: the old checkpoint could not be deleted: [Errno 20] Not a "
        f"directory" in said
    )
    assert in_process.tags(out) == [5, 6]
    assert not in_process.events(out, "save_failed")


@pytest.mark.parametrize(("operation", "left"), [(18, [1, 2, 3]), (19, [2, 3])], ids=["unpublish", "delete"])
def test_deletion_that_fails_halfway_is_finished_after_the_next_save(operation, left, tmp_path, text_file, capsys):
    config = write_run_yaml(tmp_path / "run.yaml", max_steps=4)
    engine = write_json(
        tmp_path / "engine.json",
        engine_json(1, chatgot={"checkpoint": {"every_steps": 1, "keep_last": 2, "keep_best": 0}}),
    )
    out = tmp_path / "out"
    with in_process.cpu_environment(CHATGOT_FAULT=f"save:{2 * 17 + operation}:eio"):
        for step in in_process.prepare(in_process.argv(engine, out, config, text_file)).steps():
            if step == 3:
                assert in_process.tags(out) == left
    assert "could not be deleted: [Errno 5] Input/output error (asked for by CHATGOT_FAULT)" in capsys.readouterr().out
    assert in_process.tags(out) == [3, 4]
    assert not list((out / "checkpoints").glob(".*"))
