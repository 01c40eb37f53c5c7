"""CHATGOT_FAULT does what it says, and a save whose disk is full or broken leaves training and the earlier checkpoints
alone.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from chatgot.checkpoint.load import find
from tests.support import engine_json, environment, write_json, write_run_yaml
from tests.training import in_process
from tests.training.in_process import argv, contents, events, series, tags

OPERATIONS = 17
"""Of one save of one rank at stage 1."""
PUBLISH = 13
PROGRAM = (
    "from chatgot.checkpoint import faults; faults.arm({rank}); "
    "[faults.operation('x') for _ in range(3)]; print('went on')"
)


def suffer(fault: str, rank: int = 0) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(rank=rank)],
        env=environment(CHATGOT_FAULT=fault),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("fault", "rank", "code", "says"),
    [
        ("save:2:kill9", 0, -signal.SIGKILL, ""),
        ("save:2:kill9", 1, 0, ""),
        ("save:2:kill9:1", 1, -signal.SIGKILL, ""),
        ("save:2:kill9:1", 0, 0, ""),
        ("save:2:kill9:all", 5, -signal.SIGKILL, ""),
        ("save:4:kill9", 0, 0, ""),
        ("save:2:enospc", 0, 1, "No space left on device (asked for by CHATGOT_FAULT)"),
        ("save:2:eio", 0, 1, "Input/output error (asked for by CHATGOT_FAULT)"),
        ("save:2:delay=0.01", 0, 0, ""),
        ("save:0:list", 0, 0, "CHATGOT_FAULT: operation 3: x"),
    ],
)
def test_fault_strikes_the_chosen_operation_on_the_chosen_rank(fault, rank, code, says):
    process = suffer(fault, rank)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    assert (out == "went on\n") == (code == 0)
    assert says in err


def test_stopped_process_hangs_until_it_is_continued():
    process = suffer("save:2:sigstop")
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=300)[0] == "went on\n"


@pytest.mark.parametrize(
    "fault", ["save:2", "save:x:kill9", "load:1:kill9", "save:1:explode", "save:1:delay", "save:1:kill9:-1"]
)
def test_misspelt_fault_is_refused(fault, tmp_path, text_file, monkeypatch, capsys):
    monkeypatch.setenv("CHATGOT_FAULT", fault)
    words = argv(
        write_json(tmp_path / "engine.json", engine_json()),
        tmp_path / "out",
        write_run_yaml(tmp_path / "run.yaml"),
        text_file,
    )
    assert in_process.refused(words) == 2
    assert f"CHATGOT_FAULT={fault}: must be save:N:" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def cell(number: int, kind: str, background: bool) -> Any:
    """Every pair of two is in half of the cells; the others are marked slow."""
    slow = (number + (kind == "eio") + background) % 2
    name = f"{number}-{kind}-{'async' if background else 'at once'}"
    return pytest.param(number, kind, background, marks=pytest.mark.slow if slow else (), id=name)


CELLS = [cell(*one) for one in itertools.product(range(1, OPERATIONS + 1), ("enospc", "eio"), (False, True))]


@pytest.mark.parametrize(("number", "kind", "background"), CELLS)
def test_failing_operation_leaves_training_and_the_previous_checkpoint_alone(
    number, kind, background, tmp_path, text_file, capsys
):
    config = write_run_yaml(tmp_path / "run.yaml", max_steps=6)
    saving = {
        "checkpoint": {"every_steps": 2, "every_minutes": None, "keep_best": 0, "keep_last": 9, "async": background}
    }
    engine = write_json(tmp_path / "engine.json", engine_json(1, chatgot=saving))
    out = tmp_path / "out"
    with in_process.cpu_environment(CHATGOT_FAULT=f"save:{OPERATIONS + number}:{kind}"):
        loop = in_process.prepare(argv(engine, out, config, text_file))
        first: dict[str, bytes] = {}
        for step in loop.steps():
            if loop.saving.saver.pending:
                loop.saving.finish()
            if step == 2:
                first = contents(out / "checkpoints" / "step-00000002")
            if step == 4:
                found = find(out / "checkpoints")
                assert found is not None
                assert found.tag == ("step-00000004" if number > PUBLISH else "step-00000002")
                hidden = {path.name for path in (out / "checkpoints").iterdir() if path.name.startswith(".")}
                assert hidden <= {f".latest.tmp-{os.getpid()}"}, "room is made at once"
    assert tags(out) == ([2, 4, 6] if number > PUBLISH else [2, 6])
    assert contents(out / "checkpoints" / "step-00000002") == first
    [failure] = events(out, "save_failed")
    assert failure["step"] == 4
    assert "asked for by CHATGOT_FAULT" in failure["error"]
    assert ("GiB free)" in failure["error"]) == (kind == "enospc")
    assert "training goes on, the next save will try again" in capsys.readouterr().out
    assert sorted(series(out, "train/loss")) == list(range(1, 7))
    found = find(out / "checkpoints")
    assert found is not None
    assert (found.tag, found.notes) == ("step-00000006", ())
