"""What a start of training does once."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from chatgot.deepspeed_json import read, resolve
from chatgot.training import run
from tests.support import ROOT, engine_json, live_metrics, read_engine_config, run_ranks, write_json, write_run_yaml
from tests.training import in_process


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the JSON was read, held against the schema and resolved, wherever that was asked for."""
    calls: Counter[str] = Counter()

    def count(module: Any, name: str) -> None:
        function = getattr(module, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    count(run, "read_document")
    count(run, "resolve")
    count(read, "parse_document")
    count(resolve, "read_values")
    return calls


def test_a_start_and_a_resume_read_and_resolve_the_json_once(
    calls: Counter[str], tmp_path: Path, text_file: Path
) -> None:
    config = write_run_yaml(tmp_path / "run.yaml", max_steps=2)
    engine = write_json(tmp_path / "engine.json", engine_json(1))
    for steps in (1, 2):
        words = in_process.argv(engine, tmp_path / "run", config, text_file, f"train.max_steps={steps}")
        assert in_process.train(words) == 0
        assert set(calls.values()) == {1}
        assert len(calls) == 4
        calls.clear()
    assert read_engine_config(engine, world_size=1, facts=run.device_facts()).zero_stage == 1
    assert calls["parse_document"] == calls["read_values"] == 1, "the control: another reader is counted too"


def test_without_a_json_the_device_decides_and_says_so(
    tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = write_run_yaml(tmp_path / "run.yaml", max_steps=1), tmp_path / "run"
    words = ["--config", str(config), "--data", str(text_file), "--out_dir", str(out)]
    assert in_process.train(words) == 0
    said = capsys.readouterr().out
    assert "--deepspeed_config is not given: " in said
    assert "fp32_zero0_muon.json, chosen for cpu and 1 rank(s)\n" in said
    assert json.loads((out / "ds_config.json").read_text())["optimizer"]["type"].lower() == "muon"


@pytest.mark.parametrize(("ranks", "afresh"), [(1, True), (2, False)])
def test_nothing_is_left_in_the_folder_for_temporary_files(
    ranks: int, afresh: bool, tmp_path: Path, text_file: Path
) -> None:
    config = write_run_yaml(tmp_path / "run.yaml", max_steps=1)
    engine = write_json(tmp_path / "engine.json", engine_json(1, micro=2))
    words = in_process.argv(engine, tmp_path / "run", config, text_file)
    (tmp_path / "tmp").mkdir()
    train = [str(ROOT / "launch" / "train.py"), *words]
    run_ranks(train, ranks, afresh=afresh, env={"TMPDIR": str(tmp_path / "tmp")})
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["transformers_zero2_auto", "transformers_zero3_auto", "neox_comments_and_tensorboard"]
)
def test_jsons_of_transformers_documentation_and_one_with_comments_train_and_resume(
    name: str, tmp_path: Path, text_file: Path
) -> None:
    given = (ROOT / "tests" / "deepspeed_json" / "stock" / f"{name}.json").read_text()
    # The one with comments also asks for tensorboard, which is not installed everywhere.
    (path := tmp_path / "engine.json").write_text(
        given.replace('"tensorboard": {"enabled": true', '"tensorboard": {"enabled": false')
    )
    short = ("train.log_every=1", "train.eval_tokens=256", "train.sample_max_new_tokens=8")
    for steps in (3, 5):
        words = in_process.argv(path, tmp_path / "run", "tiny", text_file, f"train.max_steps={steps}", *short)
        assert in_process.train(words) == 0
    assert [record["step"] for record in live_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events if event["event"] in ("started", "resumed")] == ["started", "resumed"]
