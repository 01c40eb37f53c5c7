"""`chatgot tune`: a table of real measurements, and a JSON that trains to the same losses."""

from __future__ import annotations

import json

import pytest

from chatgot.errors import ConfigError
from chatgot.tuning.tune import TuneArguments, tune
from tests.support import engine_json, write_json, write_run_yaml
from tests.training import in_process
from tests.training.in_process import argv, cpu_environment, series


def test_the_written_json_trains_to_the_losses_of_the_original(tmp_path, text_file, caplog, warm_starts):
    caplog.set_level("INFO", "chatgot.tuning")
    original = write_json(tmp_path / "original.json", engine_json(stage=0, micro=8))
    config = write_run_yaml(tmp_path / "run.yaml")
    arguments = TuneArguments(
        deepspeed_config=original,
        config=str(config),
        data=str(text_file),
        out=tmp_path / "tuned.json",
        micro_batches=(2,),
        stages=(0, 1),
        recomputation=("on",),
        steps=2,
    )
    with cpu_environment(OMP_NUM_THREADS="1"):
        best = tune(arguments)
    tuned = json.loads((tmp_path / "tuned.json").read_text())
    assert tuned["train_batch_size"] == 8
    assert tuned["train_micro_batch_size_per_gpu"] == best.micro_batch == 2
    assert tuned["zero_optimization"]["stage"] == best.stage
    assert tuned["activation_checkpointing"] == {}
    table = [line for line in caplog.messages if line.startswith("|")]
    assert len(table) == 4
    assert all("fits" in line for line in table[2:])
    for name in ("original", "tuned"):
        assert in_process.train(argv(tmp_path / f"{name}.json", tmp_path / name, config, text_file)) == 0
    before, after = series(tmp_path / "original", "train/loss"), series(tmp_path / "tuned", "train/loss")
    assert before.keys() == after.keys()
    assert len(before) == 6
    assert max(abs(after[step] / before[step] - 1) for step in before) < 1e-6


def test_what_the_settings_do_not_allow_is_a_row_and_no_error(tmp_path, text_file, caplog, warm_starts):
    caplog.set_level("INFO", "chatgot.tuning")
    json_file = write_json(tmp_path / "bf16.json", engine_json(stage=1, precision="bf16"))
    config = write_run_yaml(tmp_path / "run.yaml")
    arguments = TuneArguments(
        json_file, str(config), str(text_file), stages=(0, 1), micro_batches=(8,), recomputation=("off",), steps=1
    )
    with cpu_environment(OMP_NUM_THREADS="1"):
        best = tune(arguments)
    assert best.stage == 1
    (refused,) = [line for line in caplog.messages if line.startswith("| 0")]
    assert "refused: " in refused


def test_a_micro_batch_that_does_not_make_the_global_batch_is_refused(tmp_path, text_file):
    json_file = write_json(tmp_path / "plain.json", engine_json())
    arguments = TuneArguments(json_file, str(write_run_yaml(tmp_path / "run.yaml")), str(text_file), micro_batches=(3,))
    with (
        cpu_environment(),
        pytest.raises(ConfigError, match=r"--micro_batches 3: train_batch_size = 8 .* can be made of 1, 2, 4, 8"),
    ):
        tune(arguments)
