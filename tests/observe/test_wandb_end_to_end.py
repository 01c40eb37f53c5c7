"""wandb beside a real training: no key, no network, kills and resumes; and no wandb at all."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.observe.offline_wandb import read_offline_history, read_offline_records, summary_of
from tests.support import ROOT, engine_json, environment, warm_python, write_json, write_run_yaml
from tests.training import in_process
from tests.training.in_process import argv, series

pytest.importorskip("wandb")
WANDB = {"enabled": True, "project": "thrones", "group": "north"}
KILLED_AFTER_7 = """
import os, signal, sys
from chatgot.distributed import find_place
from chatgot.training import run
from tests.training.in_process import arguments
for step in run.prepare_run(arguments(sys.argv[1:]), find_place()).steps():
    if step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def without_key(home: Path) -> dict[str, str | None]:
    """The environment of somebody who never heard of wandb, on a machine whose network is gone."""
    return {"HOME": str(home), "NETRC": str(home / "netrc"), "WANDB_BASE_URL": "http://127.0.0.1:9"} | dict.fromkeys(
        ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_RUN_ID")
    )


@pytest.fixture
def command_line(tmp_path, text_file) -> list[str]:
    config = write_run_yaml(tmp_path / "run.yaml", max_steps=12, eval_every=4, sample_every=4)
    saving = {"checkpoint": {"every_steps": 5, "every_minutes": None, "keep_best": 0}}
    return argv(
        write_json(tmp_path / "engine.json", engine_json(1, chatgot=saving, wandb=WANDB)),
        tmp_path / "out",
        config,
        text_file,
    )


def start(program: list[str], home: Path) -> subprocess.CompletedProcess[str]:
    (home / "tmp").mkdir(exist_ok=True)
    changed = {**without_key(home), "TMPDIR": str(home / "tmp")}
    variables = {name: value for name, value in environment().items() if name not in changed}
    variables |= {name: value for name, value in changed.items() if value is not None}
    return subprocess.run(
        [warm_python(), *program], env=variables, cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def logged_steps(out: Path) -> list[int]:
    try:
        return [record["train/step"] for record in read_offline_history(out)[1]]
    except FileNotFoundError:
        return []


def test_invariant_16_killed_and_resumed_run_has_one_id_and_each_step_once(command_line, tmp_path):
    out = tmp_path / "out"
    killed = start(["-c", KILLED_AFTER_7, *command_line], tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert "wandb: new run" in killed.stdout
    assert "offline (no API key" in killed.stdout
    deadline = (
        time.monotonic() + 300
    )  # wandb's process outlives the training just long enough to hand over what it was given
    while logged_steps(out)[-1:] not in ([6], [7]) or list((tmp_path / "tmp").iterdir()):  # 7 may not have left yet
        assert time.monotonic() < deadline, (logged_steps(out), list((tmp_path / "tmp").iterdir()))
        time.sleep(0.1)

    resumed = start([str(ROOT / "launch" / "train.py"), *command_line], tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert not list((tmp_path / "tmp").iterdir())
    assert "at step 5" in resumed.stdout
    assert "goes on, offline" in resumed.stdout
    ids, history = read_offline_history(out)
    assert ids == {json.loads((out / "wandb" / "run_id.json").read_text())["id"]}
    assert Counter(record["train/step"] for record in history) == Counter(range(1, 13))
    by_step = {record["train/step"]: record for record in history}
    for metric in ("train/loss", "val/loss", "optim/lr", "perf/tokens_per_sec"):
        ours = series(out, metric)
        assert {step for step, record in by_step.items() if metric in record} == set(ours)
    assert all(by_step[step]["train/loss"] == value for step, value in series(out, "train/loss").items())
    assert [step for step in by_step if "samples" in by_step[step] or "samples/_type" in by_step[step]] == [4, 8, 12]
    [project] = {
        record.run.project for record in read_offline_records(out) if record.WhichOneof("record_type") == "run"
    }
    assert project == "thrones"
    assert summary_of(read_offline_records(out))["verified"] == "2/2 (bit for bit)"


def test_invariant_16_absent_wandb_is_no_error(command_line, tmp_path, capsys):
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'wandb':\n"
        "            raise ModuleNotFoundError(\"No module named 'wandb'\", name='wandb')\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    assert in_process.train(command_line, **without_key(tmp_path), PYTHONPATH=str(tmp_path / "path")) == 0
    said = capsys.readouterr().out
    assert "wandb: off, wandb is not installed (pip install wandb)" in said
    assert sorted(series(tmp_path / "out", "train/loss")) == list(range(1, 13))
