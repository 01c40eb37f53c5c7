"""What the rules keep and in which order the rest goes; the disk budget; what is said and refused before a run."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatgot.checkpoint import manifest, retention
from chatgot.checkpoint.load import Published, examine, find
from chatgot.checkpoint.retention import find_room, make_room, needed, prune, shown, to_go
from chatgot.deepspeed_json.settings import CheckpointConfig
from chatgot.errors import CheckpointError
from tests.support import engine_json, write_json, write_run_yaml
from tests.training import in_process

STEPS = st.lists(st.integers(1, 40), unique=True, max_size=12)


@st.composite
def folders(draw) -> list[Published]:
    steps = draw(STEPS)
    return [
        Published(
            f"step-{step:08d}",
            step,
            sequence,
            draw(st.integers(1, 20)) * 10**8,
            5,
            draw(st.none() | st.floats(0.1, 9.0) | st.just(float("nan"))),
        )
        for sequence, step in enumerate(steps)
    ]


@settings(max_examples=400, deadline=None)
@given(
    good=folders(),
    keep_last=st.integers(2, 4),
    keep_best=st.integers(0, 3),
    every=st.none() | st.integers(1, 10),
    limit=st.none() | st.integers(1, 120).map(lambda tenths: tenths / 10),
    others=st.integers(0, 20).map(lambda hundreds: hundreds * 10**8),
    coming=st.none() | st.integers(1, 20).map(lambda hundreds: hundreds * 10**8),
)
def test_what_goes_leaves_the_newest_good_one_the_budget_and_then_the_rules(
    good, keep_last, keep_best, every, limit, others, coming
):
    config = CheckpointConfig(keep_last=keep_last, keep_best=keep_best, keep_every_steps=every, disk_budget_gb=limit)
    gone = [checkpoint.tag for checkpoint in to_go(good, config, others, coming)]
    by_tag = {checkpoint.tag: checkpoint for checkpoint in good}
    kept = [checkpoint.tag for checkpoint in good if checkpoint.tag not in gone]
    assert sorted([*kept, *gone]) == sorted(by_tag), "each is kept or goes"
    held = sum(by_tag[tag].bytes for tag in kept) + others + (coming or 0)
    last = [checkpoint.tag for checkpoint in good][-(keep_last if coming is None else keep_last - 1) :]
    scored = [c for c in good if c.val_loss is not None and c.val_loss == c.val_loss]
    best = [c.tag for c in sorted(scored, key=lambda c: (c.val_loss, c.sequence))[:keep_best]]
    multiples = [c.tag for c in good if every and c.step % every == 0]
    if good:
        assert good[-1].tag in kept, "the newest good one never goes"
    ruled = {*last, *best, *multiples}
    assert gone[: len(by_tag.keys() - ruled)] == [c.tag for c in good if c.tag not in ruled], (
        "first what no rule keeps, oldest first"
    )
    sacrificed = gone[len(by_tag.keys() - ruled) :]
    if limit is None:
        assert not sacrificed
        return
    assert held <= limit * 1e9 or kept == [c.tag for c in good[-1:]], "as much as the budget needs"
    order = [tag for tag in multiples if tag not in best and tag not in last]
    order += [tag for tag in reversed(best) if tag not in last]
    order += last[:-1]
    assert sacrificed == order[: len(sacrificed)]
    if sacrificed:
        assert held + by_tag[sacrificed[-1]].bytes > limit * 1e9, "and no more than that"


def write(folder: Path, step: int, size: int, loss: float | None = None) -> str:
    """A checkpoint of one file; returns its tag."""
    tag = f"step-{step:08d}"
    (folder / tag).mkdir(parents=True)
    (folder / tag / "weights").write_bytes(b"w" * size)
    files = {"weights": manifest.measure(folder / tag / "weights")}
    manifest.write(folder / tag, {"step": step, "sequence": step, "val_loss": loss, "files": files})
    return tag


def gb(size: int) -> float:
    return size / 1e9


def test_room_is_made_only_where_it_is_needed_and_by_what_the_rules_no_longer_keep(tmp_path):
    tags = [write(tmp_path, step, 1_000_000) for step in (1, 2, 3)]
    held = sum(checkpoint.bytes for checkpoint in examine(tmp_path).good)
    new = needed(1_000_000)
    roomy = CheckpointConfig(keep_last=3, keep_best=0, disk_budget_gb=gb(held + new))
    assert make_room(tmp_path, roomy, 1_000_000).tags == (), (
        "the oldest would go after the save, but it is in nobody's way"
    )
    tight = CheckpointConfig(keep_last=9, keep_best=0, disk_budget_gb=gb(held + new - 1))
    assert make_room(tmp_path, tight, 1_000_000).tags == (tags[0],)
    assert prune(tmp_path, tight).tags == ()
    two = CheckpointConfig(keep_last=9, keep_best=0, disk_budget_gb=gb(2 * new))
    assert make_room(tmp_path, two, 1_000_000).tags == (tags[1],)
    with pytest.raises(CheckpointError, match=r"may not be deleted .* more than chatgot.checkpoint.disk_budget_gb"):
        make_room(tmp_path, two, 2_000_000)
    assert [checkpoint.tag for checkpoint in examine(tmp_path).good] == [tags[2]]


def test_damaged_checkpoints_count_for_the_budget_and_stay(tmp_path):
    tags = [write(tmp_path, step, 1_000_000) for step in (1, 2, 3, 4)]
    (tmp_path / tags[3] / "weights").write_bytes(b"w" * 900_000)
    os.remove(tmp_path / tags[1] / manifest.NAME)
    config = CheckpointConfig(keep_last=2, keep_best=0, disk_budget_gb=gb(4_050_000))
    pruned = make_room(tmp_path, config, 1_000_000, damaged={tags[3]})
    assert pruned.tags == (tags[0],), (
        "1.9 MB are damaged, so that the newest good one and the coming one fill the budget"
    )
    assert pruned.damaged == (tags[1],)
    [warning] = pruned.warnings
    assert (
        f"checkpoint {tmp_path / tags[1]} is damaged: file manifest.json: {tmp_path / tags[1]}: no manifest.json"
        in warning
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == tags[1:]
    assert prune(tmp_path, config, damaged={tags[1], tags[3]}) == retention.Pruned()


def test_what_a_person_renamed_or_copied_to_keep_is_never_deleted(tmp_path):
    tags = [write(tmp_path, step, 1_000_000) for step in range(1, 7)]
    shutil.copytree(tmp_path / tags[0], tmp_path / "before-the-spike")
    shutil.copytree(tmp_path / tags[1], tmp_path / "step-00000099")
    os.rename(tmp_path / tags[2], tmp_path / "good")
    config = CheckpointConfig(keep_last=2, keep_best=0, disk_budget_gb=gb(9 * 10**6))
    assert prune(tmp_path, config).tags == (tags[0], tags[1], tags[3])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["before-the-spike", "good", *tags[4:], "step-00000099"]
    found = find(tmp_path)
    assert found is not None
    assert (found.tag, found.notes) == (tags[5], ())
    shutil.copytree(tmp_path / tags[5], tmp_path / "z")
    again = find(tmp_path)
    assert again is not None
    assert again.tag == tags[5], "a copy has the same place in the order"


def test_files_that_a_system_leaves_in_a_checkpoint_are_no_damage(tmp_path):
    tag = write(tmp_path, 1, 1_000)
    for name in (".DS_Store", ".nfs00000001", "._weights"):
        (tmp_path / tag / name).write_bytes(b"x")
    found = find(tmp_path)
    assert found is not None
    assert found.notes == ()
    (tmp_path / tag / "notes.txt").write_bytes(b"the good one")
    found = find(tmp_path)
    assert found is not None
    assert found.notes == (f"{tmp_path / tag / 'notes.txt'}: is not in the manifest, and is not read",)
    assert [checkpoint.tag for checkpoint in examine(tmp_path).good] == [tag]


def test_what_a_save_has_left_unfinished_is_no_hindrance_because_it_is_swept(tmp_path):
    tag = write(tmp_path, 1, 1_000_000)
    write(tmp_path, 2, 1_000_000)
    os.rename(tmp_path / "step-00000002", tmp_path / ".unfinished-step-00000002")
    config = CheckpointConfig(keep_best=0, disk_budget_gb=gb(2 * needed(1_000_000)))
    room = find_room(tmp_path, config, 1_000_000)
    assert room.deletions == []
    assert [checkpoint.tag for checkpoint in room.holdings.good] == [tag]
    assert room.holdings.leftover_bytes > 1_000_000


def budgeted(tmp_path: Path, gigabytes: float | None, **keys) -> Path:
    checkpoint = {
        "every_steps": 1,
        "every_minutes": None,
        "keep_best": 1,
        "keep_last": 3,
        "disk_budget_gb": gigabytes,
        **keys,
    }
    return write_json(tmp_path / "engine.json", engine_json(1, chatgot={"checkpoint": checkpoint}))


def test_checkpoints_folder_of_a_run_never_exceeds_its_budget(tmp_path, text_file, monkeypatch, capsys):
    config = write_run_yaml(tmp_path / "run.yaml", max_steps=8, eval_every=2)
    out = tmp_path / "out"
    assert in_process.train(in_process.argv(budgeted(tmp_path, None), tmp_path / "one", config, text_file)) == 0
    [*_, one] = examine(tmp_path / "one" / "checkpoints").good
    limit = 3.5 * one.bytes
    largest = 0
    operation = retention.faults.operation

    def measured(what: str) -> None:
        nonlocal largest
        largest = max(largest, sum(path.stat().st_size for path in (out / "checkpoints").rglob("*") if path.is_file()))
        operation(what)

    monkeypatch.setattr(retention.faults, "operation", measured)
    words = in_process.argv(budgeted(tmp_path, gb(int(limit)), keep_every_steps=1), out, config, text_file)
    assert in_process.train(words) == 0
    assert 2.9 * one.bytes < largest <= limit
    assert len(in_process.tags(out)) == 3
    assert in_process.tags(out)[-2:] == [7, 8]
    assert not in_process.events(out, "save_failed")
    said = capsys.readouterr().out
    assert f"disk_budget_gb = {gb(int(limit)):g}: 3 fit into it, and it comes first" in said


def test_budget_without_room_for_two_is_refused_before_anything_is_written(tmp_path, text_file, capsys):
    config = write_run_yaml(tmp_path / "run.yaml")
    engine = budgeted(tmp_path, 0.0006)
    out = tmp_path / "out"
    assert in_process.refused(in_process.argv(engine, out, config, text_file)) == 2
    error = capsys.readouterr().err
    assert f"{engine}: chatgot.checkpoint.disk_budget_gb = 0.0006 (600 kB): must have room for two checkpoints" in error
    assert not list(out.rglob("*"))
    found = re.search(r"give at least ([\d.]+)", error)
    assert found is not None
    assert in_process.train(in_process.argv(budgeted(tmp_path, float(found[1])), out, config, text_file)) == 0, (
        "what it asks for is enough"
    )
    assert 1 <= len(in_process.tags(out)) <= 2


@pytest.mark.parametrize("value", [0, -1.0, '"much"'])
def test_budget_that_is_no_size_is_refused(value, tmp_path, text_file, capsys):
    words = in_process.argv(budgeted(tmp_path, 1.0), tmp_path / "out", write_run_yaml(tmp_path / "run.yaml"), text_file)
    assert in_process.refused([*words, f"ds.chatgot.checkpoint.disk_budget_gb={value}"]) == 2
    assert "chatgot.checkpoint.disk_budget_gb" in capsys.readouterr().err


def test_first_lines_say_how_large_a_checkpoint_is_and_how_many_fit(tmp_path, text_file, capsys):
    config = write_run_yaml(tmp_path / "run.yaml", max_steps=6)
    out = tmp_path / "out"
    assert in_process.train(in_process.argv(budgeted(tmp_path, None, keep_every_steps=2), out, config, text_file)) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("checkpoints: ")]
    found = re.fullmatch(
        rf"checkpoints: about (.+) each; .+ free in {re.escape(str(out / 'checkpoints'))}, (\d+) fit; "
        r"kept: 3 last \+ 1 best \+ every 2 steps, which is up to 3 over this run: about (.+)",
        line,
    )
    assert found is not None, line
    assert int(found[2]) > 100
    [*_, one] = examine(out / "checkpoints").good
    assert 0.7 < float(found[1].removesuffix(" kB")) * 1e3 / one.bytes < 1.3
    assert in_process.train(in_process.argv(budgeted(tmp_path, None), out, config, text_file, "train.max_steps=7")) == 0
    assert f"checkpoints: about {shown(one.bytes)} each" in capsys.readouterr().out, (
        "a resume knows the size from the newest checkpoint"
    )


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1500, "1.5 kB"),
        (168_400_000, "168 MB"),
        (76_100_000_000, "76.1 GB"),
        (999_900_000, "1 GB"),
    ],
)
def test_sizes_have_three_digits(size, words):
    assert shown(size) == words
