"""`chatgot rehearse` passes where a run will, and finds what was planted to stop one: each row of PLANTED is real."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from chatgot import cli
from chatgot.config.run import load_run_config, preset_names
from chatgot.errors import ChatGoTError, CheckpointError
from chatgot.rehearse.rehearsal import Rehearsal, RehearseArguments, rehearse, shrunk
from chatgot.run_folder import CHECKPOINTS
from tests.support import write_json, write_text

ADAMW = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
JSON: dict[str, Any] = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "optimizer": ADAMW}
COMPILED = {**JSON, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": False}}}


@pytest.mark.parametrize(
    ("tree", "changed", "code", "row", "said"),
    [
        pytest.param({**JSON, "gradient_cliping": 1.0}, {}, 2, "check", "gradient_clipping", id="typo"),
        pytest.param(JSON, {"nproc": 3}, 2, "check", "train_batch_size", id="ranks do not divide the batch"),
        pytest.param(JSON, {"config": "tini"}, 2, "check", "did you mean 'tiny'", id="no such preset"),
        pytest.param(JSON, {"data": "/nowhere.txt"}, 3, "data", "nowhere.txt", id="no such data"),
        pytest.param(JSON, {"data": "short.txt"}, 3, "data", "short.txt", id="data too short"),
        pytest.param(JSON, {"data": "latin.txt"}, 3, "data", "utf-8", id="data in another encoding"),
        pytest.param(COMPILED, {}, 6, "compiler", "g++", id="no compiler"),
        pytest.param(JSON, {"out_dir": Path("/proc/runs/a")}, 2, "folder", "/proc", id="folder not writable"),
        pytest.param(
            JSON, {"overrides": ("model.d_hid=1000000000000",)}, 4, "folder", "make room", id="disk too small"
        ),
    ],
)
def test_finds_what_needs_no_training(
    tree: dict[str, Any],
    changed: dict[str, Any],
    code: int,
    row: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nonexistent")
    write_text(tmp_path / "text.txt")
    (tmp_path / "short.txt").write_text("ab" * 40)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 500)
    given = {"config": "tiny", "data": "text.txt", "out_dir": tmp_path / "runs" / "a", **changed}
    assert rehearse(RehearseArguments(write_json(tmp_path / "engine.json", tree), **given)) == code
    failed = [line for line in capsys.readouterr().out.splitlines() if " FAIL " in line]
    assert len(failed) == 1
    assert failed[0].startswith(row)
    assert said in failed[0]
    assert not [path for path in tmp_path.rglob(".chatgot-rehearsal-*")]


@pytest.mark.parametrize("name", preset_names())
def test_the_small_model_keeps_the_structure(name: str) -> None:
    model = load_run_config(name).model
    small = shrunk(model)
    small.model_validate(small.model_dump())  # its sizes go together
    assert (small.architecture, small.tie_embeddings) == (model.architecture, model.tie_embeddings)
    assert (small.kv_heads < small.n_head) == (model.kv_heads < model.n_head)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "overrides", "code"),
    [
        pytest.param("save:1:enospc", (), 4, id="disk full while saving"),
        pytest.param("save:2:kill9", (), 6, id="a rank dies in a save"),
        pytest.param(None, ("ds.optimizer.params.lr=1e30",), 5, id="loss not finite"),
    ],
)
def test_finds_what_stops_training(
    fault: str | None, overrides: tuple[str, ...], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault:
        monkeypatch.setenv("CHATGOT_FAULT", fault)
    text = write_text(tmp_path / "text.txt")
    arguments = RehearseArguments(
        write_json(tmp_path / "engine.json", JSON), "tiny", str(text), 1, tmp_path / "run", overrides=overrides
    )
    assert rehearse(arguments) == code


@pytest.mark.slow
def test_passes_and_finds_a_changed_rate_and_a_truncated_checkpoint(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    board = {"enabled": True, "output_path": str(tmp_path / "board"), "job_name": "run"}
    tree = {**JSON, "csv_monitor": board}
    given = RehearseArguments(write_json(tmp_path / "engine.json", tree), "tiny", str(text), 1, tmp_path / "run")
    with contextlib.ExitStack() as cleanup:
        rows = Rehearsal(given, cleanup)
        for row in (rows.check, rows.read_data, rows.compiler, rows.folder, rows.train, rows.plain_loop):
            row()
        optimizer = rows.engine.optimizer
        assert optimizer is not None
        optimizer.params["lr"] *= 1.05
        with pytest.raises(ChatGoTError, match="not what the JSON says"):
            rows.plain_loop()
        optimizer.params["lr"] /= 1.05
        states = next((rows.work / "run" / CHECKPOINTS / rows.tag).glob("*model_states.pt"))
        whole = states.read_bytes()
        states.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ChatGoTError) as refused:
            rows.resume()
        assert refused.value.exit_code == CheckpointError.exit_code
        states.write_bytes(whole)
        for row in (rows.resume, rows.other_ranks, rows.evaluate, rows.sample, rows.verify):
            row()
    assert json.loads((tmp_path / "engine.json").read_text()) == tree
    assert not (tmp_path / "board").exists(), "what the JSON writes elsewhere belongs to the run"


def test_the_command_reaches_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["rehearse", "absent.json"])
    assert end.value.code == 2
    assert "absent.json" in capsys.readouterr().out
