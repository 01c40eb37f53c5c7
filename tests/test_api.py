"""The Python API: what importing it does, training, and a run folder."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import chatgot
from chatgot.errors import CheckpointError, ConfigError, DataError, RunAgainError
from chatgot.inference.sample import SampleArguments, sample
from tests.support import ROOT, encoded, engine_json, environment, warm_python, write_json, write_run_yaml
from tests.training.in_process import cpu_environment


def python(program: str, *more: str, start: str = sys.executable, **env: str) -> subprocess.CompletedProcess[str]:
    command = [start, "-c", program, *more]
    return subprocess.run(command, env=environment(**env), cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_importing_loads_no_torch_and_touches_no_environment() -> None:
    done = python(
        "import os, sys; before = dict(os.environ); import chatgot; "
        "heavy = {'torch', 'deepspeed', 'numpy', 'yaml', 'wandb', 'pydantic', 'tqdm'} & set(sys.modules); "
        "assert not heavy, heavy; assert dict(os.environ) == before; "
        "print(chatgot.train.__name__, chatgot.load.__name__, chatgot.Run.__name__, chatgot.ChatGoTError.__name__)"
    )
    assert (done.stdout, done.stderr) == ("train load Run ChatGoTError\n", "")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> dict[str, Any]:
    """What chatgot.train takes, for four steps."""
    folder = tmp_path_factory.mktemp("api")
    return {
        "deepspeed_config": write_json(folder / "engine.json", engine_json()),
        "out_dir": folder / "run",
        "config": write_run_yaml(folder / "run.yaml", max_steps=4),
        "data": text_file,
    }


@pytest.fixture(scope="module")
def run(arguments: dict[str, Any]) -> chatgot.Run:
    """A finished run of three steps."""
    with cpu_environment():
        return chatgot.train(**arguments, overrides={"train.max_steps": 3, "ds.optimizer.params.lr": 1e-3})


def test_training_returns_the_run_with_its_settings_and_metrics(run: chatgot.Run) -> None:
    assert run.path.name == "run"
    assert (run.config.train.max_steps, run.config.model.d_model) == (3, 32)
    assert run.deepspeed_config["optimizer"]["params"]["lr"] == 1e-3
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert run.metrics == [json.loads(line) for line in lines]
    assert [line["step"] for line in run.metrics if "train/loss" in line] == [1, 2, 3]


def test_copies_are_those_of_the_command(run: chatgot.Run, text_file: Path) -> None:
    text = text_file.read_text()
    passage = text[100:160]
    (span,) = chatgot.load(run.path, device="cpu").copies(f"§ {passage} §")
    assert text[100:160] in f"§ {passage} §"[span.begin : span.end]
    line = text[:100].count("\n") + 1
    assert span.where.startswith(f"stands in {text_file.name}:{line}, ")
    assert chatgot.load(run.path, device="cpu").copies(passage, after=len(passage)) == []
    with pytest.raises(DataError, match="not at hand"):
        chatgot.load(run.path, device="cpu").copies(passage, data=run.path / "run.yaml")


def test_samples_are_those_of_the_command_and_weights_are_read_once(run: chatgot.Run, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    loaded = chatgot.load(tmp_path / "run", device="cpu")
    written = io.StringIO()
    expected = sample(SampleArguments(run.path, prompt="The night", max_new_tokens=12, seed=5, device="cpu"), written)
    text = loaded.sample("The night", max_new_tokens=12, seed=5)
    assert [text] == expected
    assert written.getvalue() == text + "\n"
    shutil.rmtree(tmp_path / "run")
    assert loaded.sample("The night", max_new_tokens=12, seed=5) == text
    assert loaded.sample("The night", max_new_tokens=12, seed=6) != text
    with pytest.raises(ConfigError, match="temperature"):
        loaded.sample(temperature=-1.0)


def test_training_again_goes_on_and_overrides_may_be_texts(arguments: dict[str, Any], run: chatgot.Run) -> None:
    with cpu_environment():
        longer = chatgot.train(**arguments, overrides=["train.max_steps=5", "ds.optimizer.params.lr=1e-3"])
    assert [line["step"] for line in longer.metrics if "train/loss" in line] == [1, 2, 3, 4, 5]


def test_the_json_may_be_a_mapping_or_base64_of_it(arguments: dict[str, Any], tmp_path: Path) -> None:
    tree = engine_json(author="ō" * 300)
    with cpu_environment():
        for number, json_given in enumerate((tree, encoded(tree))):
            given = {**arguments, "deepspeed_config": json_given, "out_dir": tmp_path / f"run{number}"}
            run = chatgot.train(**given, overrides={"train.max_steps": 1})
            assert run.deepspeed_config["optimizer"] == tree["optimizer"]
            with pytest.raises(ConfigError, match="the JSON given as base64:1: author = "):
                chatgot.train(**given, strict=True)


def test_refusals_are_errors_with_the_commands_exit_code(arguments: dict[str, Any], tmp_path: Path) -> None:
    given = {**arguments, "out_dir": tmp_path / "refused"}
    with cpu_environment():
        with pytest.raises(chatgot.ChatGoTError, match=r"did you mean 'train.max_steps'") as refusal:
            chatgot.train(**given, overrides={"train.max_step": 3})
        assert refusal.value.exit_code == 2
        with pytest.raises(chatgot.ChatGoTError, match="did you mean 'bf16_zero2'"):
            chatgot.train(**{**given, "deepspeed_config": "bf16_zero22"})
        with pytest.raises(CheckpointError):
            chatgot.train(**given, resume_from="must")
    assert not (tmp_path / "refused").exists()
    with pytest.raises(ConfigError, match="give the --out_dir of a run"):
        chatgot.load(tmp_path)


INTERRUPTED = """
import os, signal, sys, threading, time
import signal
from pathlib import Path
import chatgot
json, out, config, data = sys.argv[1:]
def interrupt():
    metrics = Path(out, "metrics.jsonl")
    while not metrics.exists() or not metrics.stat().st_size:
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=interrupt, daemon=True).start()
try:
    chatgot.train(json, out, config, data, overrides={"train.max_steps": 100000})
except chatgot.ChatGoTError as error:
    print("ENDED", type(error).__name__, error.exit_code)
"""


def test_an_interrupted_run_is_saved_and_says_so(arguments: dict[str, Any], tmp_path: Path) -> None:
    words = [str(arguments[name]) for name in ("deepspeed_config", "config", "data")]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # which a child inherits
    try:
        done = python(INTERRUPTED, words[0], str(tmp_path / "run"), *words[1:], start=warm_python())
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert "ENDED RunAgainError 75" in done.stdout, done.stdout + done.stderr
    assert chatgot.load(tmp_path / "run", device="cpu").sample("The night", max_new_tokens=3).startswith("The night")


def test_a_run_that_is_out_of_time_says_so(arguments: dict[str, Any], tmp_path: Path) -> None:
    with cpu_environment(), pytest.raises(RunAgainError, match="interrupted and saved"):
        chatgot.train(
            **arguments | {"out_dir": tmp_path / "short", "overrides": {"train.max_steps": 10**6}}, max_minutes=0.01
        )


def test_two_ranks_train_from_python(arguments: dict[str, Any], tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import sys, chatgot\nprint(len(chatgot.train(*sys.argv[1:]).metrics) > 0)\n")
    words = [str(arguments[name]) for name in ("deepspeed_config", "config", "data")]
    command = [warm_python(), str(ROOT / "launch" / "run"), "--nproc", "2", "--script", str(program), "--"]
    command += [words[0], str(tmp_path / "run"), *words[1:]]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("True") == 2  # two processes write to it
