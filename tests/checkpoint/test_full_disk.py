"""A real file system that fills up: the save is refused before it writes, training goes on, and when there is room
again it saves again.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chatgot.checkpoint import save as save_module
from chatgot.checkpoint.load import examine, find
from chatgot.checkpoint.portable import fp32_weights
from chatgot.checkpoint.retention import make_room
from chatgot.deepspeed_json.settings import CheckpointConfig
from chatgot.errors import CheckpointError
from chatgot.training import saving
from tests.checkpoint.full_disk_ranks import fill
from tests.checkpoint.small_disk import needs_small_disk, small_disk
from tests.support import engine_json, run_ranks, write_json, write_run_yaml
from tests.training import in_process

SAVING = {"checkpoint": {"every_steps": 2, "every_minutes": None, "keep_last": 3, "keep_best": 0}}
MB = 1 << 20


@needs_small_disk
def test_save_on_a_full_disk_is_refused_with_the_numbers_and_the_next_one_succeeds(
    tmp_path, text_file, capsys, request
):
    config = write_run_yaml(tmp_path / "run.yaml", max_steps=10)
    engine = write_json(tmp_path / "engine.json", engine_json(1, chatgot=SAVING))
    out = tmp_path / "out"
    with small_disk(out / "checkpoints", 4 * MB) as checkpoints:
        filler = checkpoints / "filler"
        first: dict[str, bytes] = {}
        for step in in_process.prepare(in_process.argv(engine, out, config, text_file)).steps():
            if step == 2:
                first = in_process.contents(checkpoints / "step-00000002")
                fill(filler)
            if step == 6:
                found = find(checkpoints)
                assert found is not None
                assert (found.tag, found.notes) == ("step-00000002", ())
                filler.unlink()
        assert in_process.tags(out) == [2, 8, 10]
        assert in_process.contents(checkpoints / "step-00000002") == first
        failures = in_process.events(out, "save_failed")
        assert [(failure["step"], failure["in_a_row"]) for failure in failures] == [(4, 1), (6, 2)]
        for failure in failures:
            assert "the checkpoint could not be saved: it needs about 40" in failure["error"]
            assert (
                "kB and a margin of 3 % and 64 KiB), and 0 bytes are free on this file system; make room there"
                in failure["error"]
            )
        assert "training goes on, the next save will try again" in capsys.readouterr().out
        assert sorted(in_process.series(out, "train/loss")) == list(range(1, 11))
        found = find(checkpoints)
        assert found is not None
        assert (found.tag, found.notes) == ("step-00000010", ())
        assert fp32_weights(found)


@needs_small_disk
def test_disk_that_fills_up_in_the_middle_of_a_save_leaves_nothing_of_it(
    tmp_path, text_file, monkeypatch, capsys, request
):
    config = write_run_yaml(tmp_path / "run.yaml", max_steps=6)
    engine = write_json(tmp_path / "engine.json", engine_json(1, chatgot=SAVING))
    out = tmp_path / "out"
    with small_disk(out / "checkpoints", 4 * MB) as checkpoints:
        loop = in_process.prepare(in_process.argv(engine, out, config, text_file))

        def overtaken(*arguments):
            made = make_room(*arguments)
            if loop.step == 4:
                fill(checkpoints / "filler")  # somebody else takes the room that was there
                with open(checkpoints / "filler", "r+b") as filler:
                    filler.truncate(filler.seek(0, 2) - 100_000)
            return made

        monkeypatch.setattr(save_module, "make_room", overtaken)
        first: dict[str, bytes] = {}
        for step in loop.steps():
            if step == 2:
                first = in_process.contents(checkpoints / "step-00000002")
            if step == 4:
                assert sorted(path.name for path in checkpoints.glob("[.s]*")) == ["step-00000002"], (
                    "room is made at once"
                )
                (checkpoints / "filler").unlink()
        assert in_process.contents(checkpoints / "step-00000002") == first
        assert in_process.tags(out) == [2, 6]
        [failure] = in_process.events(out, "save_failed")
        assert failure["step"] == 4
        assert "margin" not in failure["error"], "the kernel refused, not the look before"
    assert "training goes on" in capsys.readouterr().out


@needs_small_disk
def test_third_refused_save_in_a_row_ends_the_run_with_4(tmp_path, text_file, request, monkeypatch):
    monkeypatch.setattr(saving, "RETRY_MINUTES", 0.0)
    config = write_run_yaml(tmp_path / "run.yaml", max_steps=20)
    engine = write_json(tmp_path / "engine.json", engine_json(1, chatgot=SAVING))
    out = tmp_path / "out"
    with small_disk(out / "checkpoints", 4 * MB) as checkpoints:
        loop = in_process.prepare(in_process.argv(engine, out, config, text_file))
        steps = loop.steps()
        while next(steps) < 2:
            pass
        fill(checkpoints / "filler")
        with pytest.raises(CheckpointError) as refusal:
            list(steps)
        assert refusal.value.exit_code == 4
        assert loop.step == 8
        assert in_process.tags(out) == [2]
        found = find(checkpoints)
        assert found is not None
        assert fp32_weights(found)


@needs_small_disk
def test_old_checkpoints_go_before_the_save_where_the_new_one_would_not_fit_beside_them(tmp_path, text_file, request):
    config = write_run_yaml(tmp_path / "run.yaml", max_steps=10)
    engine = write_json(tmp_path / "engine.json", engine_json(1, chatgot=SAVING))
    out = tmp_path / "out"
    with small_disk(out / "checkpoints", 5 * MB // 4) as checkpoints:
        assert in_process.train(in_process.argv(engine, out, config, text_file)) == 0
        assert in_process.tags(out) == [6, 8, 10]
        assert not in_process.events(out, "save_failed")
        saves = in_process.events(out, "saved")
        assert [save["pruned"] for save in saves] == [[], [], [], ["step-00000002"], ["step-00000004"]]
        # A fourth one never fitted beside three: the oldest must have gone before.
        assert 4 * examine(checkpoints).good[-1].bytes > 5 * MB // 4


@needs_small_disk
def test_run_whose_checkpoints_cannot_fit_is_warned_or_refused_before_it_trains(tmp_path, text_file, capsys, request):
    config = write_run_yaml(tmp_path / "run.yaml", max_steps=4)
    engine = write_json(tmp_path / "engine.json", engine_json(1, chatgot=SAVING))
    out = tmp_path / "out"
    words = in_process.argv(engine, out, config, text_file)
    with small_disk(out / "checkpoints", MB // 4):
        assert in_process.refused(words) == 4
        assert "the checkpoint could not be saved: it needs about" in capsys.readouterr().err
        assert [path.name for path in out.iterdir()] == ["checkpoints"]
    with small_disk(out / "checkpoints", MB):
        assert in_process.train(words) == 0
        said = capsys.readouterr().out
        assert "2 fit; kept: 3 last: about 1." in said
        assert "WARNING: the checkpoints that are kept need 1." in said
        assert in_process.train(words) == 0, "a run that is done saves nothing more, and is not refused"


@needs_small_disk
def test_file_system_without_inodes_is_noticed(tmp_path, request):
    with (
        small_disk(tmp_path / "disk", MB, inodes=50) as place,
        pytest.raises(CheckpointError, match=r"64 new files, and .* inodes for 4"),
    ):
        make_room(place / "checkpoints", CheckpointConfig(), 1000)


@needs_small_disk
def test_two_ranks_on_a_disk_that_fills_up(tmp_path, text_file, request):
    config = write_run_yaml(tmp_path / "run.yaml", max_steps=8)
    engine = write_json(tmp_path / "engine.json", engine_json(3, micro=2, chatgot=SAVING))
    plan = []
    with small_disk(tmp_path / "disk", 12 * MB) as disk:
        for name, empty in (("recovers", 4), ("three in a row", 99)):
            (tmp_path / name).mkdir()
            (disk / name).mkdir()
            (tmp_path / name / "checkpoints").symlink_to(disk / name)  # the journal lies elsewhere
            argv = in_process.argv(engine, tmp_path / name, config, text_file)
            plan.append({"name": name, "argv": argv, "filler": str(disk / f"{name}.filler"), "fill": 2, "empty": empty})
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        run_ranks(
            ["-m", "tests.checkpoint.full_disk_ranks", str(tmp_path / "plan.json"), str(tmp_path / "codes")],
            2,
        )
        codes = [json.loads(Path(f"{tmp_path / 'codes'}.{rank}").read_text()) for rank in range(2)]
        assert codes == [{"recovers": 0, "three in a row": 4}] * 2
        recovers, ends = tmp_path / "recovers", tmp_path / "three in a row"
        assert in_process.tags(recovers) == [2, 6, 8]
        assert [event["step"] for event in in_process.events(recovers, "save_failed")] == [4]
        assert in_process.tags(ends) == [2]
        assert [event["in_a_row"] for event in in_process.events(ends, "save_failed")] == [1, 2, 3]
        for out in (recovers, ends):
            found = find(out / "checkpoints")
            assert found is not None
            assert found.notes == ()
            assert fp32_weights(found)
