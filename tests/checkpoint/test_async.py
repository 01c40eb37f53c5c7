"""Saving in the background: the same checkpoints, of the moment at which they began, with the same guarantees."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from chatgot.checkpoint import manifest, pickles
from chatgot.checkpoint.load import find
from chatgot.checkpoint.writing import Snapshots
from chatgot.errors import CheckpointError, NumericsError
from chatgot.training import run, saving
from tests.support import engine_json, write_json, write_run_yaml
from tests.training import in_process
from tests.training.in_process import argv, contents, events, series, tags


def command(
    folder: Path, text: Path, stage: int = 1, precision: str = "fp32", *, background: bool = True, **keys: Any
) -> list[str]:
    checkpoint = {"every_steps": 2, "every_minutes": None, "keep_best": 0, "keep_last": 99, "async": background, **keys}
    folder.mkdir(exist_ok=True)
    engine = write_json(folder / "engine.json", engine_json(stage, precision, chatgot={"checkpoint": checkpoint}))
    return argv(engine, folder / "out", write_run_yaml(folder / "run.yaml", max_steps=8), text)


def same(a: Any, b: Any) -> bool:
    """Whether two state dicts have the same values; DeepSpeed numbers its ZeRO-3 tensors through all engines of a
    process.
    """
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return vars(a) == vars(b) if hasattr(a, "__dict__") else a == b


def held_back(loop: Any) -> threading.Event:
    """The event without which the loop's engine writes no file."""
    gate = threading.Event()
    files = loop.engine.engine.checkpoint_engine
    write = type(files).save

    class Held(type(files)):
        def save(self, state_dict: Any, path: str) -> None:
            assert gate.wait(60)
            write(self, state_dict, path)

    files.__class__ = Held
    return gate


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (3, "bf16")]
)
def test_checkpoint_is_of_the_moment_when_it_began_and_the_same_as_without(stage, precision, tmp_path, text_file):
    at_once = command(tmp_path / "at once", text_file, stage, precision, background=False)
    assert in_process.train(at_once) == 0
    loop = in_process.prepare(command(tmp_path / "background", text_file, stage, precision))
    gate, out = held_back(loop), tmp_path / "background" / "out"
    for step in loop.steps():
        if step == 3:
            assert loop.saving.saver.pending
            assert tags(out) == [], "nothing is published before it is written"
            gate.set()
    assert tags(out) == [2, 4, 6, 8]
    for tag in ("step-00000002", "step-00000008"):
        here, there = out / "checkpoints" / tag, tmp_path / "at once" / "out" / "checkpoints" / tag
        names = manifest.listed(here)
        assert names == manifest.listed(there)
        assert all(
            same(pickles.read(here / name), pickles.read(there / name)) for name in names if name.endswith(".pt")
        )
        if stage < 3:
            assert contents(here).keys() == contents(there).keys()
            assert manifest.read(here)["files"] == manifest.read(there)["files"], "byte for byte"
    assert find(out / "checkpoints", "step-00000002")


def test_control_without_the_copy_it_would_be_of_another_moment(tmp_path, text_file, monkeypatch):
    monkeypatch.setattr(Snapshots, "take", lambda self, state: state)
    assert in_process.train(command(tmp_path / "at once", text_file, background=False)) == 0
    loop = in_process.prepare(command(tmp_path / "background", text_file))
    gate = held_back(loop)
    for step in loop.steps():
        if step == 3:
            gate.set()
    files = [
        manifest.read(tmp_path / name / "out" / "checkpoints" / "step-00000002")["files"]
        for name in ("at once", "background")
    ]
    assert files[0] != files[1]


def test_next_save_waits_for_the_one_before(tmp_path, text_file):
    loop = in_process.prepare(command(tmp_path, text_file))
    gate, out = held_back(loop), tmp_path / "out"
    steps = loop.steps()
    assert [next(steps) for _ in range(3)] == [1, 2, 3]
    threading.Timer(0.3, gate.set).start()
    assert next(steps) == 4, "waited for the save of step 2"
    assert 2 in tags(out)
    list(steps)
    assert [event["step"] for event in events(out, "saved")] == [2, 4, 6, 8]
    assert (out / "checkpoints" / "latest").read_text() == "step-00000008"
    assert len(loop.saving.saver._snapshots._buffers) == loop.saving.saver._snapshots._used, (
        "one copy, whatever the number of saves"
    )


def test_run_that_diverges_still_publishes_what_it_was_saving(tmp_path, text_file, monkeypatch):
    loop = in_process.prepare(command(tmp_path, text_file))
    gate, out = held_back(loop), tmp_path / "out"
    train = loop.engine.train_step

    def diverge(batches, **more):
        if loop.step == 3:
            gate.set()
            raise NumericsError("diverged")
        return train(batches, **more)

    monkeypatch.setattr(loop.engine, "train_step", diverge)
    with pytest.raises(NumericsError):
        run.finish(loop)
    assert tags(out) == [2]
    assert [event["event"] for event in events(out)][-2:] == ["saved", "failed"]


def test_failed_save_is_of_the_step_that_it_saved_and_the_next_one_tries_again(tmp_path, text_file, capsys):
    loop = in_process.prepare(command(tmp_path, text_file))
    out, files = tmp_path / "out", loop.engine.engine.checkpoint_engine
    write = type(files).save

    class Broken(type(files)):
        def save(self, state_dict: Any, path: str) -> None:
            if "00000004" in path:
                raise OSError(28, "No space left on device")
            write(self, state_dict, path)

    files.__class__ = Broken
    for _ in loop.steps():
        pass
    assert tags(out) == [2, 6, 8]
    [failure] = events(out, "save_failed")
    assert (failure["step"], failure["in_a_row"]) == (4, 1)
    assert "No space left on device" in failure["error"]
    assert "training goes on" in capsys.readouterr().out
    assert sorted(series(out, "train/loss")) == list(range(1, 9))
    assert not list((out / "checkpoints").glob(".*"))


def test_third_failure_in_a_row_ends_the_run(tmp_path, text_file, monkeypatch):
    monkeypatch.setattr(saving, "RETRY_MINUTES", 0.0)
    loop = in_process.prepare([*command(tmp_path, text_file), "train.max_steps=20"])
    files = loop.engine.engine.checkpoint_engine

    class Broken(type(files)):
        def save(self, state_dict: Any, path: str) -> None:
            raise RuntimeError("unexpected pos 64 vs 0")

    files.__class__ = Broken
    with pytest.raises(CheckpointError, match="unexpected pos"):
        run.finish(loop)
    assert [event["in_a_row"] for event in events(tmp_path / "out", "save_failed")] == [1, 2, 3]
    assert loop.step <= 8, "the third one is of step 6, and known when the next one begins"


def test_key_in_the_json_is_async_and_the_resolved_json_says_so(tmp_path, text_file):
    words = command(tmp_path, text_file, background=False)
    assert in_process.train([*words, "ds.chatgot.checkpoint.async=true"]) == 0
    assert '"async": true' in (tmp_path / "out" / "ds_config.json").read_text()
    assert in_process.refused([*words, "ds.chatgot.checkpoint.async_=true"]) == 2
