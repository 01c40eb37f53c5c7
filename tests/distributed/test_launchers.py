"""The same training under every launcher: the same losses, and the exit code that was meant."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from chatgot.observe.journal import newest_step
from chatgot.observe.status import status
from tests.support import ROOT, engine_json, environment, free_port, warm_python, write_json, write_run_yaml
from tests.training.in_process import argv, contents, events, series, tags

BIN = Path(sys.executable).parent
TRAIN = str(ROOT / "launch" / "train.py")
LAUNCHERS = {
    "python": [sys.executable, TRAIN],
    "torchrun": ["torchrun", "--nproc_per_node", "2", "--master_port", "{port}", TRAIN],
    "deepspeed": ["deepspeed", "--num_accelerators", "2", "--master_port", "{port}", TRAIN],
    "launch/run": [str(ROOT / "launch" / "run"), "--nproc", "2", "--"],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("launchers")
    write_run_yaml(folder / "run.yaml", max_steps=10, eval_every=5)
    saving = {"checkpoint": {"every_steps": 5, "every_minutes": None, "keep_best": 0}}
    write_json(folder / "engine.json", engine_json(1, micro=2, chatgot=saving))
    return folder


def launch(name: str, files: Path, text: Path, out: str, *more: str) -> subprocess.CompletedProcess[str]:
    """The Python is support.warm_python, but for DeepSpeed's ranks, which look at the name of their parent."""
    command = [word.format(port=free_port()) for word in LAUNCHERS[name]]
    command = [
        warm_python(),
        *(str(BIN / word) if word == name else word for word in command if word != sys.executable),
    ]
    cold = {"CHATGOT_TEST_COLD": "1"} if name == "deepspeed" else {}
    process = subprocess.Popen(
        [*command, *argv(files / "engine.json", files / out, files / "run.yaml", text, *more)],
        env=environment(PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}", **cold),
        cwd=files,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the ranks too, which a killed launcher would leave behind
        raise AssertionError(f"{command} did not end: {process.communicate()}") from None
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


@pytest.fixture(scope="module")
def alone(files, text_file) -> Path:
    """The run folder of plain python, the reference."""
    done = launch("python", files, text_file, "python")
    assert done.returncode == 0, done.stderr
    return files / "python"


@pytest.mark.parametrize("name", ["torchrun", "deepspeed", "launch/run"])
def test_losses_under_a_launcher_are_those_of_plain_python(name, files, alone, text_file):
    done = launch(name, files, text_file, name.replace("/", "-"))
    assert done.returncode == 0, done.stdout + done.stderr
    out = files / name.replace("/", "-")
    expected = series(alone, "train/loss")
    assert len(expected) == 10
    for metric in ("train/loss", "val/loss", "optim/grad_norm"):
        assert series(out, metric) == pytest.approx(series(alone, metric), rel=1e-5)
    assert series(out, "optim/lr") == series(alone, "optim/lr")
    assert series(out, "data/tokens") == series(alone, "data/tokens")
    assert json.loads((out / "environment.json").read_text())["world_size"] == 2
    assert [event["event"] for event in events(out)] == [event["event"] for event in events(alone)]
    assert done.stdout.count("done at step 10") == 1, "rank 0 speaks, the other is silent"


def test_resume_with_another_model_is_refused_by_every_rank_with_one_message(files, alone, text_file):
    before = contents(alone)
    done = launch("launch/run", files, text_file, "python", "--resume_from", "must", "model.d_hid=64")
    assert done.returncode == 4, done.stdout + done.stderr
    assert done.stderr.count("does not fit this run:") == 1
    assert re.search(r"\n *model\.d_hid +48 +\| 64\b", done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert contents(alone) == before


def test_wrong_command_line_is_refused_once_by_two_ranks(files, text_file):
    done = launch("launch/run", files, text_file, "refused", "train.max_step=3")
    assert done.returncode == 2
    assert done.stderr.count("chatgot: override train.max_step=3: no such key; did you mean 'train.max_steps'?") == 1
    assert not (files / "refused").exists()


def wait_until(what: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.1)


def processes(out: Path) -> list[int]:
    """Everything that has the run folder on its command line: the launchers and the ranks."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(out).encode() in (folder / "cmdline").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


@pytest.mark.parametrize(
    ("name", "number"),
    [("launch/run", signal.SIGKILL), ("torchrun", signal.SIGUSR1), ("deepspeed", signal.SIGKILL)],
)
def test_ranks_save_and_end_when_their_launcher_is_gone(name, number, files, text_file, tmp_path):
    out, port = tmp_path / "out", free_port()
    words = argv(files / "engine.json", out, files / "run.yaml", text_file, "train.max_steps=1000000")
    command = [word.format(port=port) for word in LAUNCHERS[name]]
    if name != "launch/run":  # torchrun and DeepSpeed's runner are forks, what they start is not
        command = [warm_python(), str(BIN / command[0]), *command[1:]]
    process = subprocess.Popen(
        [*command, *words],
        env=environment(PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}", CHATGOT_TEST_COLD="1"),
        cwd=files,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_until(lambda: newest_step(out / "metrics.jsonl") is not None, 300)
        said, code = status(out)
        assert (code, said.startswith("running, pid ")) == (10, True), said
        os.kill(process.pid, number)  # DeepSpeed's runner: its launch.py and the ranks stay
        wait_until(lambda: process.poll() is not None, 30)
        wait_until(lambda: not processes(out), 60)
    finally:
        for pid in processes(out):
            os.kill(pid, signal.SIGKILL)
    [event] = events(out, "preempted")
    assert event["step"] == newest_step(out / "metrics.jsonl") == tags(out)[-1]
    said, code = status(out)
    assert (code, "saved at step" in said) == (75, True), said
    done = launch("python", files, text_file, str(out), f"train.max_steps={event['step'] + 1}")
    assert done.returncode == 0, done.stderr
    assert status(out)[1] == 0
