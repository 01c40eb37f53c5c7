"""The run folder is complete, says what was run, can be run again from what it says, and has one run at a time."""

from __future__ import annotations

import errno
import io
import itertools
import json
import math
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from chatgot import run_folder
from chatgot.data.tokenizer import load_tokenizer
from chatgot.errors import ConfigError, FolderMovedError
from chatgot.inference.sample import SampleArguments, sample
from chatgot.observe.journal import METRICS, read_journal
from chatgot.run_folder import changed_settings, check_writable, flattened
from chatgot.training import run
from tests.support import ROOT, engine_json, environment, run_ranks, write_json, write_run_yaml
from tests.training import in_process
from tests.training.in_process import argv, contents, events, series

STEPS = 6


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text_file) -> Path:
    """A finished run in out/, beside run.yaml, engine.json and what it said (said.txt)."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_run_yaml(folder / "run.yaml", max_steps=STEPS, eval_every=3, sample_every=3)
    engine = write_json(folder / "engine.json", engine_json(stage=2, chatgot={"checkpoint": {"every_steps": 2}}))
    with pytest.MonkeyPatch.context() as patch, (folder / "said.txt").open("w", encoding="utf-8") as said:
        patch.setattr("sys.stdout", said)
        assert in_process.train([*argv(engine, folder / "out", config, text_file), "ds.gradient_clipping=0.5"]) == 0
    return folder


def test_every_file_of_a_run_folder_is_there(finished):
    out = finished / "out"
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert names >= {
        "run.yaml",
        "ds_config.json",
        "tokenizer.json",
        "environment.json",
        "metrics.jsonl",
        "events.jsonl",
        "samples/step-000003.txt",
        "samples/step-000006.txt",
        "checkpoints/latest",
        "checkpoints/step-00000006/manifest.json",
        "checkpoints/step-00000006/mp_rank_00_model_states.pt",
        "checkpoints/step-00000006/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    }
    assert not [name for name in names if Path(name).name.startswith(".")], "nothing unfinished is left"
    assert load_tokenizer(out / "tokenizer.json").kind == "char"
    environ = json.loads((out / "environment.json").read_text())
    assert {
        "python",
        "torch",
        "deepspeed",
        "numpy",
        "chatgot",
        "host",
        "platform",
        "command",
        "data",
        "world_size",
    } <= environ.keys()
    assert "=== 'The night'\nThe night" in (out / "samples" / "step-000006.txt").read_text(encoding="utf-8")


def test_journal_has_a_line_a_step_and_the_documented_metrics(finished):
    out = finished / "out"
    assert sorted(series(out, "train/loss")) == list(range(1, STEPS + 1))
    assert sorted(series(out, "val/loss")) == sorted(series(out, "val/bits_per_char")) == [3, 6]
    records, broken = read_journal(out / "metrics.jsonl")
    assert broken == 0
    seen = {name for record in records for name in record} - {"step", "digest"}
    assert seen == set(METRICS) - {"optim/loss_scale", "perf/mfu"}, (
        "no loss scale in fp32, and no peak is known for a CPU"
    )
    assert [record["step"] for record in records if "digest" in record] == list(range(1, STEPS + 1))
    assert series(out, "data/tokens")[STEPS] == STEPS * 8 * 16
    assert list(series(out, "optim/lr").values())[:2] == pytest.approx([1.5e-3, 3e-3])
    assert all(norm > 0 for norm in series(out, "optim/grad_norm").values())


def test_events_tell_the_story(finished):
    found = [event for event in events(finished / "out") if event["event"] != "goodput"]
    story = ["started", "memory", "saved", "sampled", "saved", "saved", "sampled", "saved", "finished"]
    assert [event["event"] for event in found] == story
    assert [event["step"] for event in found if event["event"] == "saved"] == [2, 3, 4, 6]
    assert found[-1]["val/loss"] == series(finished / "out", "val/loss")[STEPS]


def test_invariant_11_no_value_of_a_config_is_changed_and_the_resolved_one_is_stored_and_derived_ones_printed(finished):
    out = finished / "out"
    given = flattened(yaml.safe_load((finished / "run.yaml").read_text()))
    stored = flattened(yaml.safe_load((out / "run.yaml").read_text(encoding="utf-8")))
    assert {key: stored[key] for key in given} == given
    given_json = flattened(json.loads((finished / "engine.json").read_text())) | {
        "gradient_clipping": 0.5
    }  # the override
    stored_json = flattened(json.loads((out / "ds_config.json").read_text()))
    assert {key: stored_json[key] for key in given_json} == given_json
    said = (finished / "said.txt").read_text(encoding="utf-8")
    assert f"  settings       all of them in {out / 'run.yaml'} and ds_config.json" in said
    assert "gradient_accumulation_steps = 2: 8 samples / 4 per rank / 1 rank" in said, (
        "what is derived is printed with its reason"
    )


def test_run_folder_gives_the_same_run_again(finished, text_file, tmp_path):
    out = finished / "out"
    assert in_process.train(argv(out / "ds_config.json", tmp_path / "again", out / "run.yaml", text_file)) == 0
    for metric in ("train/loss", "val/loss", "optim/lr", "optim/grad_norm"):
        assert series(tmp_path / "again", metric) == series(out, metric)
    for name in ("run.yaml", "ds_config.json", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
    control = [*argv(out / "ds_config.json", tmp_path / "control", out / "run.yaml", text_file), "train.seed=1"]
    assert in_process.train(control) == 0
    assert series(tmp_path / "control", "train/loss") != series(out, "train/loss")


def test_end_says_the_result_and_what_to_do_next(finished):
    said = (finished / "said.txt").read_text(encoding="utf-8").splitlines()
    val = series(finished / "out", "val/loss")[STEPS]
    assert f"done at step {STEPS}: val/loss {val:.4f} nats, {val / math.log(2):.3f} bits/char" in said
    assert said[-1] == f"next: chatgot sample {finished / 'out'} --prompt 'The night'"


def test_the_next_command_is_quoted_for_a_shell(tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]):
    prompt, out = 'He said "it\'s $HOME"\n', tmp_path / "my first run; ls"
    config = write_run_yaml(tmp_path / "run.yaml", max_steps=1, sample_prompts=[prompt])
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text() + prompt)
    assert in_process.train(argv(write_json(tmp_path / "engine.json", engine_json()), out, config, text)) == 0
    said = capsys.readouterr().out.partition("next: ")[2]
    assert shlex.split(said) == ["chatgot", "sample", str(out), "--prompt", prompt]


def test_a_run_folder_that_cannot_be_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError) as refusal:
            run_folder.check_writable(path)
        assert str(refusal.value).startswith(f"--out_dir {path}: cannot be written to: it, or what should be a folder")
        assert "Errno" not in str(refusal.value)


def test_changed_settings_names_keys_as_overrides_do(tmp_path):
    run, engine = (
        {"train": {"max_steps": 5, "seed": 1}},
        {"optimizer": {"params": {"lr": 0.1}}, "bf16": {"enabled": True}},
    )
    assert changed_settings(tmp_path, run, engine) == []
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    (tmp_path / "ds_config.json").write_text(json.dumps(engine))
    assert changed_settings(tmp_path, run, engine) == []
    assert changed_settings(
        tmp_path, {"train": {"max_steps": 9, "seed": 1}}, {"optimizer": {"params": {"lr": 0.2}}}
    ) == ["train.max_steps: 5 -> 9", "ds.optimizer.params.lr: 0.1 -> 0.2", "ds.bf16.enabled: True -> absent"]
    (tmp_path / "ds_config.json").write_text("{")
    [line] = changed_settings(tmp_path, run, engine)
    assert "ds_config.json cannot be read" in line


def test_probing_a_folder_leaves_no_trace(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    check_writable(tmp_path / "a")
    assert list((tmp_path / "a").iterdir()) == []


HOLDER = """
import sys, time
from pathlib import Path
from chatgot import run_folder
run_folder.acquire_lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path) -> Iterator[subprocess.Popen]:
    """Another process that holds the lock of tmp_path/out."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "out")]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def words(tmp_path, text_file) -> list[str]:
    engine = write_json(tmp_path / "engine.json", engine_json(micro=2))
    return argv(engine, tmp_path / "out", write_run_yaml(tmp_path / "run.yaml", max_steps=2), text_file)


def test_second_run_is_refused_and_named_the_holder(holder, words, tmp_path, capsys):
    before = contents(tmp_path / "out")
    assert in_process.refused(words) == 2
    said = capsys.readouterr().err
    assert (
        f"--out_dir {tmp_path / 'out'}: another run is writing there: pid {holder.pid} on host "
        f"{socket.gethostname()}, since 2" in said
    )
    ranks = run_ranks([str(ROOT / "launch" / "train.py"), *words], 2, check=False)
    assert [done.returncode for done in ranks] == [2, 2]
    assert f"pid {holder.pid} on host" in ranks[0].stderr
    assert ranks[1].stderr == ""
    assert contents(tmp_path / "out") == before


def test_lock_of_a_run_that_is_gone_is_taken_over_with_a_note(holder, words, tmp_path, capsys):
    holder.kill()
    holder.wait()
    assert (tmp_path / "out" / ".lock").exists()
    assert in_process.train(words) == 0
    assert f"was left by a run that is gone (pid {holder.pid} on host" in capsys.readouterr().out
    assert not (tmp_path / "out" / ".lock").exists()


def test_refused_run_leaves_no_lock_and_no_folder(words, tmp_path):
    assert in_process.refused([*words, "--resume_from", "must"]) == 4
    assert not (tmp_path / "out").exists()


def test_lock_is_free_again_after_release(tmp_path):
    folder = tmp_path / "a" / "out"
    assert run_folder.acquire_lock(folder) is None
    assert run_folder.acquire_lock(folder) is None, "the runs of one process follow each other"
    run_folder.release_lock(folder)
    run_folder.release_lock(folder)
    assert list(tmp_path.iterdir()) == []
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ConfigError, match="its lock cannot be taken"):
        run_folder.acquire_lock(blocked)


def test_lock_with_unreadable_text_is_taken_over_too(tmp_path):
    (tmp_path / ".lock").write_text("junk")
    note = run_folder.acquire_lock(Path(tmp_path))
    run_folder.release_lock(tmp_path)
    assert note is not None
    assert "junk" in note


@pytest.mark.parametrize("then", ["nothing", "a folder"])
@pytest.mark.parametrize("every_minutes", [None, 30])
def test_run_folder_that_is_moved_ends_the_run_at_the_next_step_and_is_never_made_again(
    words, tmp_path, text_file, then, every_minutes
):
    out, moved = tmp_path / "out", tmp_path / "elsewhere" / "out"
    saving = {"checkpoint": {"every_steps": None, "every_minutes": every_minutes, "keep_best": 0}}
    write_json(tmp_path / "engine.json", engine_json(micro=2, chatgot=saving))
    loop = in_process.prepare([*words, "train.max_steps=9", "train.sample_every=4"])
    steps = loop.steps()
    assert [next(steps) for _ in range(2)] == [1, 2]
    moved.parent.mkdir()
    out.rename(moved)
    if then == "a folder":
        out.mkdir()
    with in_process.cpu_environment(), pytest.raises(FolderMovedError) as refusal:
        run.finish(loop)
    assert refusal.value.exit_code == 4
    assert str(refusal.value).startswith(f"{out}: is not the folder any more")
    assert f"go on with --out_dir {moved}" in str(refusal.value)
    assert out.exists() == (then == "a folder")
    assert not out.exists() or not list(out.iterdir())
    assert [event["event"] for event in events(moved)][-2:] == ["save_failed", "failed"]
    assert sorted(series(moved, "train/loss")) == [1, 2, 3]
    assert not (moved / ".lock").exists()
    assert in_process.train(argv(tmp_path / "engine.json", moved, tmp_path / "run.yaml", text_file)) == 0


def test_file_system_without_locks_is_a_warning(tmp_path, monkeypatch):
    def no_locks(file: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(run_folder.fcntl, "flock", no_locks)
    note = run_folder.acquire_lock(tmp_path / "out")
    assert note is not None
    assert "this file system has no locks" in note
    run_folder.release_lock(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", ".lock"])
@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
def test_file_that_would_be_written_to_and_is_no_plain_file_is_refused(words, tmp_path, name, kind, capsys):
    foreign, path = tmp_path / "foreign", tmp_path / "out" / name
    foreign.write_text("precious")
    path.parent.mkdir()
    {"link": lambda: path.symlink_to(foreign), "fifo": lambda: os.mkfifo(path), "folder": path.mkdir}[kind]()
    assert in_process.refused(words) == 2
    assert name.strip(".").partition(".")[0] in capsys.readouterr().err
    assert foreign.read_text() == "precious"


def test_links_that_are_replaced_overwrite_no_foreign_file_and_linked_folders_are_said(words, tmp_path, capsys):
    out, foreign, scratch = tmp_path / "out", tmp_path / "foreign", tmp_path / "scratch"
    foreign.write_text("precious")
    names = ("run.yaml", "ds_config.json", "environment.json", "tokenizer.json", "samples/step-000002.txt")
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).symlink_to(foreign)
    scratch.mkdir()
    (out / "checkpoints").symlink_to(scratch)
    assert in_process.train(words) == 0
    assert f"{out / 'checkpoints'} is a symbolic link to {scratch}, and is followed" in capsys.readouterr().out
    assert foreign.read_text() == "precious"
    assert not any((out / name).is_symlink() for name in names)
    assert in_process.tags(out) == [2]
    shutil.rmtree(scratch)
    assert in_process.refused(words) == 4, "the disk is not mounted: no new run"
    assert "is its disk mounted?" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_folder_of_another_owner_is_not_followed(words, tmp_path, capsys):
    (tmp_path / "theirs").mkdir()
    os.chown(tmp_path / "theirs", 12345, 12345)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "samples").symlink_to(tmp_path / "theirs")
    assert in_process.refused(words) == 2
    assert "a link to somebody else's" in capsys.readouterr().err


def test_empty_settings_beside_whole_checkpoints_stop_neither_a_resume_nor_a_sample(finished, text_file, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    for name in ("run.yaml", "ds_config.json", "environment.json"):
        (copy / "out" / name).write_text("")
    in_process_words = argv(copy / "engine.json", copy / "out", copy / "run.yaml", text_file)
    sample(SampleArguments(copy / "out", max_new_tokens=1, device="cpu"), io.StringIO())
    assert in_process.train([*in_process_words, "ds.gradient_clipping=0.5", "train.max_steps=8"]) == 0
    assert events(copy / "out", "resumed")[-1]["step"] == STEPS


def test_settings_of_a_folder_from_elsewhere_are_read_within_bounds(tmp_path):
    path = tmp_path / "run.yaml"
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefgh")
    )
    for text in (bomb, "[" * 100_000, "a: " + "9" * 5000, "x" * (1 << 20 | 1), "a: 1\na", "\0"):
        path.write_text(text)
        with pytest.raises(ConfigError) as refusal:
            run_folder.read(tmp_path, "run.yaml")
        assert len(str(refusal.value)) < 1000


def test_records_reach_the_disk_with_every_checkpoint(words, tmp_path, monkeypatch):
    flushed: list[str] = []
    sync = os.fsync

    def noted(descriptor: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    assert in_process.train(words) == 0
    published = flushed.index("manifest.json" if "manifest.json" in flushed else f".manifest.json.tmp-{os.getpid()}")
    assert {"metrics.jsonl", "events.jsonl"} <= set(flushed[:published])
    assert any(name.startswith((".tokenizer.json.tmp", "tokenizer.json")) for name in flushed)


def test_run_folder_that_is_deleted_is_never_made_again(tmp_path):
    run_folder.acquire_lock(tmp_path / "out")
    run_folder.check_in_place(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(FolderMovedError, match="was unmounted or deleted"):
        run_folder.check_in_place(tmp_path / "out")
    run_folder.release_lock(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
