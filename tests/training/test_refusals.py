"""Refusals: one message on stderr, the documented exit code, and nothing written."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from chatgot.checkpoint.load import choose
from chatgot.errors import CheckpointError
from tests.support import ROOT, engine_json, environment, run_ranks, write_json, write_run_yaml, write_text
from tests.training import in_process
from tests.training.in_process import argv, contents, refused


@pytest.fixture
def files(tmp_path, text_file) -> dict[str, Path]:
    """A run that would be accepted."""
    return {
        "json": write_json(tmp_path / "engine.json", engine_json()),
        "out": tmp_path / "out",
        "config": write_run_yaml(tmp_path / "run.yaml"),
        "data": text_file,
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text_file) -> Path:
    """A run folder with a checkpoint at step 2, beside run.yaml and engine.json."""
    folder = tmp_path_factory.mktemp("trained")
    write_run_yaml(folder / "run.yaml", max_steps=2)
    write_json(folder / "engine.json", engine_json(stage=1))
    assert in_process.train(argv(folder / "engine.json", folder / "out", folder / "run.yaml", text_file)) == 0
    return folder


def edit(path: Path, section: str, **keys: object) -> None:
    tree = json.loads(path.read_text())
    (tree if section == "" else tree.setdefault(section, {})).update(keys)
    write_json(path, tree)


def check(capsys, command_line: list[str], code: int, *fragments: str) -> str:
    """The refusal's message."""
    assert refused(command_line) == code
    said = capsys.readouterr().err
    assert said.startswith("chatgot: ")
    assert said.count("chatgot: ") == 1, said
    assert "Traceback" not in said
    for fragment in fragments:
        assert fragment in said
    return said


def test_invariant_10_unknown_keys_are_refused_in_every_home(capsys, files):
    (files["config"].parent / "wrong.yaml").write_text("model:\n  n_layer: 2\n")
    wrong_yaml = {**files, "config": files["config"].parent / "wrong.yaml"}
    check(capsys, argv(**wrong_yaml), 2, "wrong.yaml", "n_layer", "did you mean 'n_layers'")
    for override, meant in (
        ("model.n_layer=3", "model.n_layers"),
        ("ds.optimizer.param.lr=1", "ds."),
        ("train.max_step=1", "train.max_steps"),
    ):
        check(capsys, [*argv(**files), override], 2, override, meant)
    edit(files["json"], "", gradient_cliping=1.0)
    check(capsys, argv(**files), 2, "engine.json", "gradient_cliping", "did you mean 'gradient_clipping'")
    write_json(files["json"], engine_json())
    edit(files["json"], "zero_optimization", stge=1)
    check(capsys, argv(**files), 2, "zero_optimization", "stge")
    assert not files["out"].exists()


def test_a_monitor_that_is_not_installed_is_a_refusal(capsys, files):
    if importlib.util.find_spec("tensorboard") is not None:
        pytest.skip("tensorboard is installed")
    edit(files["json"], "tensorboard", enabled=True)
    check(capsys, argv(**files), 6, "DeepSpeed needs what is not installed here", "tensorboard")


def test_wrong_files_names_and_values_are_refused(capsys, files):
    check(capsys, argv(**{**files, "json": Path("none.json")}), 2, "none.json", "no such file")
    check(capsys, argv(**{**files, "config": "tinny"}), 2, "--config tinny", "did you mean 'tiny'")
    check(capsys, argv(**{**files, "config": "none.yaml"}), 2, "none.yaml", "no such file")
    check(capsys, [*argv(**files), "model.n_head=3"], 2, "d_model", "n_head")
    check(capsys, [*argv(**files), "train.max_steps=many"], 2, "max_steps", "many")
    check(capsys, [*argv(**files), "ds.optimizer.params.lrr=1"], 2, "lrr")
    files["json"].write_text("{")
    check(capsys, argv(**files), 2, "engine.json")
    assert not files["out"].exists()


def test_texts_that_cannot_be_trained_on_are_refused(capsys, files, tmp_path):
    empty, short, broken = tmp_path / "empty.txt", tmp_path / "short.txt", tmp_path / "broken.txt"
    empty.write_text("")
    short.write_text("winter is here ")  # 13 characters to train on, and a block has 16 + 1
    broken.write_bytes(b"good " * 1000 + b"\xff bad")
    check(capsys, argv(**{**files, "data": tmp_path / "none.txt"}), 3, "none.txt")
    check(capsys, argv(**{**files, "data": "war_of_the_roses"}), 3, "war_of_the_roses", "wars_of_the_roses")
    check(capsys, argv(**{**files, "data": empty}), 3, "empty.txt", "empty")
    check(capsys, [*argv(**{**files, "data": short}), "data.val_fraction=0.1"], 3, "max_seq_length")
    check(capsys, argv(**{**files, "data": broken}), 3, "broken.txt", "5000")
    assert not files["out"].exists()


def test_out_dir_that_cannot_be_written_is_refused(capsys, files, tmp_path):
    (tmp_path / "file").write_text("mine")
    check(capsys, argv(**{**files, "out": tmp_path / "file"}), 2, "--out_dir", "cannot be written to")
    check(capsys, argv(**{**files, "out": tmp_path / "file" / "below"}), 2, "--out_dir")
    check(capsys, argv(**{**files, "out": Path("/proc/none/run")}), 2, "--out_dir")  # read-only even for root
    assert (tmp_path / "file").read_text() == "mine"


def test_run_folder_among_the_texts_is_refused_before_it_could_be_trained_once(capsys, files, tmp_path):
    (texts := tmp_path / "texts").mkdir()
    write_text(texts / "night.txt")
    for out in (texts / "run", texts, texts / "a" / "b"):
        check(capsys, argv(**{**files, "data": texts, "out": out}), 2, f"--out_dir {out}: inside the folder of texts")
    assert [path.name for path in texts.iterdir()] == ["night.txt"]


def test_an_at_sign_in_a_path_is_no_tag(tmp_path):
    run = tmp_path / "me@home" / "run@2"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=f"{run}/checkpoints has no complete checkpoint"):
        choose(str(run), tmp_path)
    with pytest.raises(CheckpointError, match=f"{run}/checkpoints: no checkpoint 'step-00000009'"):
        choose(f"{run}@step-00000009", tmp_path)


def test_requested_resume_without_a_checkpoint_is_refused(capsys, files, tmp_path):
    check(capsys, [*argv(**files), "--resume_from", "must"], 4, "--resume_from must", "no complete checkpoint")
    check(capsys, [*argv(**files), "--resume_from", str(tmp_path / "none")], 4, "no such folder")
    check(capsys, [*argv(**files), "--resume_from", str(tmp_path)], 4, "no complete checkpoint")
    assert not files["out"].exists()


def resume(trained: Path, data: Path, **changed: Path) -> list[str]:
    names = {
        "json": trained / "engine.json",
        "out": trained / "out",
        "config": trained / "run.yaml",
        "data": data,
        **changed,
    }
    return argv(**names)


def test_unknown_tags_and_never_are_refused(capsys, trained, text_file):
    before = contents(trained)
    check(
        capsys,
        [*resume(trained, text_file), "--resume_from", f"{trained / 'out'}@step-00000009"],
        4,
        "step-00000009",
        "step-00000002",
    )
    check(capsys, [*resume(trained, text_file), "--resume_from", f"{trained / 'out'}@../../x"], 4, "tag")
    check(
        capsys,
        [*resume(trained, text_file), "--resume_from", "never"],
        2,
        "--resume_from never",
        "choose another --out_dir",
    )
    assert contents(trained) == before


def table(said: str) -> list[str]:
    """Rows of the refusal's table, runs of spaces as one; its columns must be aligned."""
    heading, *rows = [line for line in said.splitlines() if " | " in line]
    assert heading.split() == ["checkpoint", "|", "this", "run"]
    assert {row.index(" | ") for row in rows} == {heading.index(" | ")}
    return [" ".join(row.split()) for row in rows]


def test_invariant_10_resume_with_another_shape_tokenizer_data_or_batch_is_refused(
    capsys, trained, text_file, tmp_path
):
    before = contents(trained)

    def differs(command_line: list[str], *lines: str) -> None:
        assert len(rows := table(check(capsys, command_line, 4, "does not fit this run:"))) == len(lines)
        assert all(row.startswith(line) for row, line in zip(rows, lines)), rows

    config = write_run_yaml(tmp_path / "run.yaml", max_steps=2, model={"d_hid": 64, "n_layers": 3})
    rows = table(said := check(capsys, resume(trained, text_file, config=config), 4))
    assert rows[:2] == ["model.d_hid 48 | 64", "model.n_layers 2 | 3"]
    assert [row.split()[0] for row in rows[2:]] == ["parameters"]
    assert "--allow" not in said
    engine = write_json(tmp_path / "engine.json", engine_json(stage=1, batch=16))
    differs(resume(trained, text_file, json=engine), "train_batch_size 8 | 16 allowed by --allow_batch_change")
    other = write_text(tmp_path / "other.txt", seed=1)
    differs(resume(trained, other), "data ")
    differs([*resume(trained, text_file), "train.seed=7"], "train.seed 1337 | 7 allowed by --allow_data_change")
    differs([*resume(trained, other), "--allow_batch_change"], "data ")
    bytes_now = [*resume(trained, text_file), "data.tokenizer=byte"]
    differs(bytes_now, "model.vocab_size 41 | 256", "parameters ", "tokenizer ", "data ")
    differs(
        [*bytes_now, "--allow_data_change", "--allow_batch_change"],
        "model.vocab_size 41 | 256",
        "parameters ",
        "tokenizer ",
    )
    assert contents(trained) == before


def test_files_that_do_not_load_are_refused(capsys, trained, text_file, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(trained / "out", copy)
    [shard] = (copy / "checkpoints").glob("step-*/*optim_states.pt")
    shard.write_bytes(shard.read_bytes()[:1000])
    before = contents(copy)
    check(capsys, resume(trained, text_file, out=copy), 4, "step-00000002", "is damaged", shard.name)
    (copy / "checkpoints" / "step-00000002" / "manifest.json").write_text("{")
    check(capsys, resume(trained, text_file, out=copy), 4, "manifest.json")
    assert contents(copy) == {**before, "checkpoints/step-00000002/manifest.json": b"{"}


def test_debug_shows_the_traceback(capsys, files):
    assert refused([*argv(**files), "--debug", "model.n_layer=3"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_process_prints_one_message_on_stderr_and_nothing_on_stdout(files):
    command = [sys.executable, str(ROOT / "launch" / "train.py"), *argv(**files), "model.n_layer=3"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("chatgot: override model.n_layer=3: no such key")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("more", "torch", "code", "said"),
    [
        ([[], ["ds.optimizer.params.lr=1.0"]], None, 2, "ds.optimizer.params.lr is 0.003 on rank 0 ({}), 1.0 on rank"),
        ([["train.seed=5"], []], None, 2, "train.seed is 5 on rank 0 ({}), 1337 on rank 1 ({})"),
        ([[], ["ds.fp16.enabled=false"]], None, 2, "ds.fp16.enabled is absent on rank 0 ({}), false on rank 1 ({})"),
        ([[], ["--data", "OTHER"]], None, 3, "data fingerprint is "),
        ([[], []], ["2.13.0", "2.12.0"], 6, 'version of torch is "2.13.0" on rank 0 ({}), "2.12.0" on rank 1 ({})'),
    ],
    ids=["rate", "seed", "key", "data", "torch"],
)
def test_ranks_that_would_not_train_the_same_run_are_refused(more, torch, code, said, files, tmp_path):
    other = str(write_text(tmp_path / "other.txt", seed=1))
    plan = {"argv": argv(**files), "more": [[other if word == "OTHER" else word for word in one] for one in more]}
    plan = json.loads(json.dumps(plan | ({"torch": torch} if torch else {}), default=str))
    done = run_ranks(["-m", "tests.distributed.programs.unlike", json.dumps(plan)], 2, timeout=120, check=False)
    assert [rank.returncode for rank in done] == [code, code], [rank.stderr for rank in done]
    message = f"the ranks would not train the same run: {said.replace('{}', socket.gethostname())}"
    assert message in done[0].stderr
    assert "Traceback" not in done[0].stderr + done[1].stderr
    assert not files["out"].exists()


def test_a_run_folder_that_the_ranks_do_not_share_is_refused(files, tmp_path):
    plan = {"argv": argv(**files), "more": [[], ["--out_dir", str(tmp_path / "elsewhere")]]}
    plan = json.loads(json.dumps(plan, default=str))
    done = run_ranks(["-m", "tests.distributed.programs.unlike", json.dumps(plan)], 2, timeout=120, check=False)
    assert [rank.returncode for rank in done] == [2, 2], [rank.stderr for rank in done]
    said = f"host {socket.gethostname()} (rank 1) does not see the folder that rank 0 writes to"
    assert said in done[0].stderr
    assert not files["out"].exists()
    assert not (tmp_path / "elsewhere").exists()


def test_clocks_that_differ_are_warned_of(files):
    plan = {"argv": [*argv(**files), "train.max_steps=1"], "more": [[], []], "clock": [0, 3600]}
    plan = json.loads(json.dumps(plan, default=str))
    done = run_ranks(["-m", "tests.distributed.programs.unlike", json.dumps(plan)], 2, timeout=120, check=False)
    assert [rank.returncode for rank in done] == [0, 0], [rank.stderr for rank in done]
    assert re.search(r"the clocks of \S+ and \S+ differ by 36\d\d s", done[0].stdout)
