"""chatgot verify: a whole run passes, and every kind of damage is named; a replay repeats the journal and notices one
altered digit.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from chatgot import cli, run_folder
from chatgot.checkpoint import manifest
from chatgot.checkpoint.load import Found, find, tags_in
from chatgot.checkpoint.retention import prune
from chatgot.checkpoint.writing import publish, tag_of
from chatgot.deepspeed_json.settings import CheckpointConfig
from chatgot.observe.journal import read_journal
from chatgot.verify import verify as verify_module
from chatgot.verify.verify import verify
from tests.proof.test_compare import left, words
from tests.support import ROOT, engine_json, environment, write_json, write_run_yaml, write_text
from tests.training import in_process
from tests.training.in_process import contents

REPLAYED = 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text_file) -> Path:
    """A finished run in out/ that was left at step 5 and resumed from step 3 on the way; checkpoints after 3, 6 and
    8.
    """
    folder = tmp_path_factory.mktemp("finished")
    assert in_process.train(left(folder, text_file)) == 0
    return folder / "out"


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def code(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(["verify", *words])
    return int(end.value.code or 0)


def edit(path: Path, change) -> None:
    """Put `change(lines)` in place of a file's lines."""
    path.write_text("".join(f"{line}\n" for line in change(path.read_text().splitlines())))


def is_digest_of(line: str, step: int) -> bool:
    record = json.loads(line)
    return record["step"] == step and "digest" in record


def test_whole_run_passes_and_is_only_read(finished, capsys):
    before = contents(finished)
    assert code(str(finished)) == 0
    said = capsys.readouterr().out
    for tag in ("step-00000003", "step-00000006", "step-00000008"):
        assert f"checkpoint {tag}: whole" in said
    assert "journal: 8 steps with a digest, 1..8; 2 of them were trained again, compared bit for bit" in said
    assert said.endswith(f"{finished}: whole\n")
    assert contents(finished) == before


def test_the_offline_part_imports_no_torch(finished):
    program = f"""
import sys
from chatgot.cli import main
try:
    main(["verify", {str(finished)!r}])
except SystemExit as end:
    print(end.code, sorted({{"torch", "deepspeed", "numpy"}} & sys.modules.keys()))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "0 []"


def test_flipped_bit_is_named_by_file(run, capsys):
    path = next((run / "checkpoints" / "step-00000006").glob("*.pt"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert code(str(run)) == 4
    said = capsys.readouterr().out
    assert "checkpoint step-00000006: NOT WHOLE" in said
    assert f"file {path.name}: its contents have changed" in said
    assert "checkpoint step-00000008: whole" in said
    assert code(str(run), "--tag", "step-00000008") == 0
    assert code(str(run), "--tag", "step-00000006") == 4


def test_latest_that_leads_nowhere_is_a_problem_and_one_that_is_behind_a_note(run, capsys):
    (run / "checkpoints" / "latest").write_text("step-00000006")
    assert code(str(run)) == 0
    assert "note: latest is step-00000006, and step-00000008 is newer" in capsys.readouterr().out
    (run / "checkpoints" / "latest").write_text("step-00000007")
    assert code(str(run)) == 4
    assert "names 'step-00000007'" in capsys.readouterr().out


def test_removed_digests_are_a_gap(run, capsys):
    def change(lines: list[str]) -> list[str]:
        return [line for line in lines if not any(is_digest_of(line, step) for step in (2, 7))]

    edit(run / "metrics.jsonl", change)
    assert code(str(run)) == 4
    assert "PROBLEM: " in (said := capsys.readouterr().out)
    assert "no digest of step 2, 7" in said


def test_digest_missing_after_a_resume_is_not_hidden_by_the_past_that_was_given_up(run, capsys):
    def change(lines: list[str]) -> list[str]:
        last = max(i for i, line in enumerate(lines) if is_digest_of(line, 5))
        return lines[:last] + lines[last + 1 :]

    edit(run / "metrics.jsonl", change)
    assert code(str(run)) == 4
    assert "no digest of step 5" in capsys.readouterr().out


def test_missing_beginning_and_missing_end_are_noticed(run, capsys):
    edit(run / "metrics.jsonl", lambda lines: lines[1:])
    assert code(str(run)) == 4
    assert "no digest of step 1" in capsys.readouterr().out
    edit(run / "metrics.jsonl", lambda lines: [line for line in lines if json.loads(line)["step"] < 8])
    assert code(str(run)) == 4
    assert "ends at step 7, and does not cover step-00000008" in capsys.readouterr().out


def test_steps_trained_twice_must_agree(run, capsys):
    def change(lines: list[str]) -> list[str]:
        first = next(i for i, line in enumerate(lines) if is_digest_of(line, 5))
        record = json.loads(lines[first])
        record["digest"]["loss"] += 1e-12
        return [*lines[:first], json.dumps(record), *lines[first + 1 :]]

    edit(run / "metrics.jsonl", change)
    assert code(str(run)) == 4
    assert "step 5 was trained again after a resume, and differs: loss was" in capsys.readouterr().out


def test_announced_changes_explain_other_digests(tmp_path, text_file, capsys):
    line = left(tmp_path, text_file)
    assert in_process.train([*line, "ds.optimizer.params.lr=1e-3"]) == 0
    assert code(str(tmp_path / "out")) == 0
    assert "2 of them were trained again, compared as far as changes allow" in capsys.readouterr().out


def abandoned(step: int, line: list[str], *change: str) -> None:
    in_process.abandon_after(step, [*line, *change])


@pytest.mark.parametrize(
    "change", [["ds.bf16.enabled=true", "ds.zero_optimization.stage=1"], ["ds.optimizer.params.lr=1e-3"]]
)
def test_a_past_is_not_held_against_a_run_that_came_another_way(change, tmp_path, text_file, capsys):
    """Steps 7 and 8 were trained first and last with the same settings, but from other weights at step 6."""
    line = words(tmp_path, text_file, dropout=0.0)
    abandoned(8, line, "train.max_steps=9")
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-00000006")
    abandoned(6, line, "train.max_steps=9", *change)
    abandoned(8, line, "train.max_steps=9")
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    trained = [(r["step"], r["digest"]["loss"], r["digest"]["grad_norm"]) for r in records if "digest" in r]
    assert [step for step, *_ in trained] == [*range(1, 9), *range(4, 9)]
    assert trained[6:8] != trained[-2:]
    assert verify(tmp_path / "out"), capsys.readouterr().out


@pytest.mark.parametrize(("field", "is_problem"), [("loss", False), ("lr", True), ("batch", True)])
def test_where_roundings_differ_only_what_they_cannot_change_is_a_problem(
    field, is_problem, tmp_path, text_file, capsys
):
    line = left(tmp_path, text_file, dropout=0.0)
    assert in_process.train([*line, "ds.train_micro_batch_size_per_gpu=2"]) == 0

    def change(lines: list[str]) -> list[str]:
        first = next(i for i, line in enumerate(lines) if is_digest_of(line, 5))
        record = json.loads(lines[first])
        record["digest"][field] = "0" * 16 if field == "batch" else 1.1 * record["digest"][field]
        return [*lines[:first], json.dumps(record), *lines[first + 1 :]]

    edit(tmp_path / "out" / "metrics.jsonl", change)
    assert code(str(tmp_path / "out")) == (4 if is_problem else 0)
    said = capsys.readouterr().out
    kind = "PROBLEM" if is_problem else "note"
    assert f"step 5 was trained again after a resume, and differs: {field} was" in said
    assert any(line.startswith(f"{kind}: ") and "trained again" in line for line in said.splitlines())


def test_line_cut_off_by_a_kill_is_a_note_and_more_of_them_a_problem(tmp_path, text_file, capsys):
    line = words(tmp_path, text_file)
    in_process.abandon_after(4, line)
    path = tmp_path / "out" / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert code(str(tmp_path / "out")) == 0
    assert "the last line was cut off by a kill" in capsys.readouterr().out
    edit(path, lambda lines: [lines[0], "{", "{", *lines[1:]])
    assert code(str(tmp_path / "out")) == 4
    assert "3 broken lines, and a kill leaves one at most" in capsys.readouterr().out


def test_tokens_that_do_not_grow_are_a_problem(run, capsys):
    def change(lines: list[str]) -> list[str]:
        records = [json.loads(line) for line in lines]
        for record in records:
            if record["step"] == 8 and "data/tokens" in record:
                record["data/tokens"] = 3
        return [json.dumps(record) for record in records]

    edit(run / "metrics.jsonl", change)
    assert code(str(run)) == 4
    assert "data/tokens does not grow: 512 at step 4, 3 at step 8" in capsys.readouterr().out


def test_what_is_no_run_folder_is_refused(tmp_path, finished, capsys):
    assert code(str(tmp_path)) == 2
    assert "not a run folder of train.py: run.yaml is missing" in capsys.readouterr().err
    assert code(str(tmp_path / "none")) == 2
    assert "no such folder" in capsys.readouterr().err
    assert code(str(finished), "--tag", "step-7") == 4
    assert "no checkpoint 'step-7' (there are: step-00000003" in capsys.readouterr().err
    assert code(str(finished), "--replay", "0") == 2


def test_a_branch_begins_where_it_left_the_other_run(tmp_path, text_file, capsys):
    line = left(tmp_path, text_file)
    branch = [word if word != str(tmp_path / "out") else str(tmp_path / "branch") for word in line]
    assert in_process.train([*branch, "--resume_from", str(tmp_path / "out")]) == 0
    assert verify(tmp_path / "branch")
    assert "5 steps with a digest, 4..8" in capsys.readouterr().out


def test_replay_repeats_the_journal_and_touches_nothing(finished, capsys, warm_starts):
    before = contents(finished)
    with in_process.cpu_environment():
        assert code(str(finished), "--replay", str(REPLAYED)) == 0
    said = capsys.readouterr().out
    assert "replay verified 2/2: steps 4..5 after step-00000003 repeat the journal (bit for bit)" in said
    assert contents(finished) == before


def test_replay_names_the_step_and_the_field_of_an_altered_digest(run, capsys, warm_starts):
    def change(lines: list[str]) -> list[str]:
        records = [json.loads(line) for line in lines]
        for record in records:
            if record["step"] == 7 and "digest" in record:
                record["digest"]["grad_norm"] += 1e-9
        return [json.dumps(record) for record in records]

    edit(run / "metrics.jsonl", change)
    with in_process.cpu_environment():
        assert code(str(run)) == 0, "nothing contradicts it offline"
        assert code(str(run), "--replay", "9", "--tag", "step-00000006") == 4
    said = capsys.readouterr().out
    assert "replay: 2 journaled steps follow step-00000006, fewer than 9" in said
    assert "replay differs at step 7: grad_norm was" in said


@pytest.mark.parametrize(
    ("factor", "said"), [(1 + 1e-7, "replay verified 2/2"), (1.1, "replay differs at step 7: loss")]
)
def test_replay_on_a_device_that_does_not_repeat_its_roundings_proves_no_damage(factor, said, run, capsys, warm_starts):
    def not_deterministic(lines: list[str]) -> list[str]:
        return [line.replace('"deterministic": true', '"deterministic": false') for line in lines]

    def change(lines: list[str]) -> list[str]:
        records = [json.loads(line) for line in lines]
        for record in records:
            if record["step"] == 7 and "digest" in record:
                record["digest"]["loss"] *= factor
        return [json.dumps(record) for record in records]

    edit(run / "events.jsonl", not_deterministic)
    edit(run / "metrics.jsonl", change)
    with in_process.cpu_environment():
        assert code(str(run), "--replay", "2", "--tag", "step-00000006") == 0
    assert said in (printed := capsys.readouterr().out)
    assert ("no proof of damage" in printed) == (factor == 1.1)


def test_replay_without_the_data_is_refused_with_3(tmp_path, capsys, warm_starts):
    text = write_text(tmp_path / "text.txt")
    assert in_process.train(words(tmp_path, text)) == 0
    text.rename(tmp_path / "elsewhere.txt")
    assert code(str(tmp_path / "out"), "--replay", "1") == 3
    assert "text.txt" in capsys.readouterr().err
    write_text(text, seed=1)
    assert code(str(tmp_path / "out"), "--replay", "1") == 3
    assert "is not the data that" in capsys.readouterr().err


def test_replay_with_nothing_to_compare_is_refused(finished, capsys):
    assert code(str(finished), "--replay", "1", "--tag", "step-00000008") == 2
    assert "no journaled step follows checkpoint step-00000008" in capsys.readouterr().err


def test_replay_finds_a_text_that_was_named_from_another_folder(tmp_path, capsys, monkeypatch, warm_starts):
    write_text(tmp_path / "text.txt")
    monkeypatch.chdir(tmp_path)
    assert in_process.train(words(tmp_path, Path("text.txt"))) == 0
    monkeypatch.chdir("/")
    assert code(str(tmp_path / "out"), "--replay", "1") == 0
    assert "replay verified 1/1" in capsys.readouterr().out


def test_gap_that_a_full_disk_left_is_the_runs_own_and_accuses_nobody(tmp_path, text_file, capsys):
    config = write_run_yaml(tmp_path / "run.yaml", max_steps=12, sample_every=None)
    engine = write_json(tmp_path / "engine.json", engine_json(1))
    out = tmp_path / "out"
    loop = in_process.prepare(in_process.argv(engine, out, config, text_file))
    for step in loop.steps():
        size = (out / "metrics.jsonl").stat().st_size
        if step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, resource.RLIM_INFINITY))
        if step == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    loop.records.close()
    run_folder.release_lock(out)
    assert code(str(out)) == 0
    said = capsys.readouterr().out
    assert (
        f"note: {out / 'metrics.jsonl'}: the run could not write lines of step 4..7 (a full disk?), and says so" in said
    )
    assert "journal: 8 steps with a digest, 1..12" in said
    assert [record["step"] for record in read_journal(out / "metrics.jsonl")[0] if "digest" in record] == [
        1,
        2,
        3,
        *range(8, 13),
    ]
    edit(out / "metrics.jsonl", lambda lines: [line for line in lines if "lost_lines" not in line])
    assert code(str(out)) == 4
    assert "no digest of step 4..7" in capsys.readouterr().out


def test_hostile_lines_of_the_records_are_problems_and_cost_nothing(run, capsys):
    hostile = [
        {"step": 10**10, "digest": {}},
        {"step": 10**18, "data/tokens": "many"},
        {"step": 10**18, "data/tokens": 10**30, "train/loss": []},
        {"step": "7"},
        {"step": 1, "lost_from_step": "x", "lost_lines": {}},
    ]
    lines = [*map(json.dumps, hostile), "[" * 100_000, '{"step": ' + "1" * 5000 + "}", '"' + "x" * 3_000_000 + '"']
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(f"{line}\n" for line in lines)
    with (run / "events.jsonl").open("a") as file:
        file.writelines(f"{json.dumps({'event': event, 'step': []})}\n" for event in ("rolled_back", "resumed", ["x"]))
    assert code(str(run)) == 4
    assert "PROBLEM" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", "checkpoints/latest", "checkpoints"])
@pytest.mark.parametrize("kind", ["fifo", "link", "device", "giant"])
def test_what_is_no_plain_file_of_the_folder_is_refused_or_named_and_nothing_waits(run, name, kind, tmp_path, capsys):
    path, real = run / name, tmp_path / "real"
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.rename(real)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(real)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(1 << 40)
    assert code(str(run)) in (2, 4)
    assert path.name in (said := "".join(capsys.readouterr())) or "no checkpoint" in said


def test_nothing_is_deleted_under_a_reader_beside_a_run_that_saves_all_the_time(tmp_path):
    """As many rounds as CHATGOT_TEST_ROUNDS says; the run is a thread that publishes and prunes tiny checkpoints."""
    folder, stop = tmp_path / "checkpoints", threading.Event()
    config = CheckpointConfig(keep_last=2, keep_best=0)

    def save(step: int) -> None:
        unfinished = folder / f".unfinished-{step}"
        unfinished.mkdir(parents=True)
        (unfinished / "weights").write_bytes(b"w" * 1000 + bytes(step % 7))
        publish(unfinished, tag_of(step), {"step": step}, [{"weights": manifest.measure(unfinished / "weights")}])
        prune(folder, config)

    def saves() -> None:
        step = 4
        while not stop.is_set():
            save(step := step + 1)
            if step % 5 == 0:
                save(step - 1)  # again, as after a rollback

    for step in (1, 2, 3, 4):
        save(step)
    thread = threading.Thread(target=saves)
    thread.start()
    try:
        for _ in range(int(os.environ.get("CHATGOT_TEST_ROUNDS", "60"))):
            found = find(folder)
            assert found is not None
            assert all("/latest says" in note for note in found.notes), found.notes  # it comes after the checkpoint
            whole, problems = verify_module._checkpoints(folder, tags := tags_in(folder))
            assert problems + verify_module._latest(folder, whole, tags) == []
    finally:
        stop.set()
        thread.join()


def test_a_checkpoint_that_is_saved_again_while_it_is_looked_at_is_looked_at_again(tmp_path, capsys, monkeypatch):
    """As after a rollback: for a moment there is none of that step, and then `latest` names the new one."""
    folder, look = tmp_path / "checkpoints", verify_module.find_again
    for step in (1, 2):
        unfinished = folder / f".unfinished-{step}"
        unfinished.mkdir(parents=True)
        (unfinished / "weights").write_bytes(b"w" * 1000)
        publish(unfinished, tag_of(step), {"step": step}, [{"weights": manifest.measure(unfinished / "weights")}])
    away, looked = folder / ".away", []

    def find_again(folder: Path, tag: str) -> Found | None:
        looked.append(tag)
        if looked == [tag_of(2)]:
            (folder / tag).rename(away)
        found = look(folder, tag)
        if away.exists():
            away.rename(folder / tag)
        return found

    monkeypatch.setattr(verify_module, "find_again", find_again)
    whole, problems = verify_module._checkpoints(folder, tags := [tag_of(2), tag_of(1)])
    assert problems + verify_module._latest(folder, whole, tags) == []
    assert looked == [tag_of(2), tag_of(1), tag_of(2)]
    out = capsys.readouterr().out
    assert f"{tag_of(2)}: deleted or saved again by the run meanwhile" in out
    assert f"latest: {tag_of(2)}" in out
