"""At its second step every run says what was predicted of its memory, and what it took."""

from __future__ import annotations

import pytest

from tests.support import engine_json, write_json, write_run_yaml, write_text
from tests.training.in_process import argv, events, train

STATES = ("parameters", "gradients", "master_weights", "optimizer_states")


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (2, "bf16")])
def test_the_second_step_puts_the_plan_beside_the_measurement(stage, precision, tmp_path, capsys):
    json = write_json(tmp_path / "engine.json", engine_json(stage=stage, precision=precision))
    config = write_run_yaml(tmp_path / "run.yaml", max_steps=3)
    assert train(argv(json, tmp_path / "out", config, write_text(tmp_path / "text.txt"))) == 0
    [event] = events(tmp_path / "out", "memory")
    assert event["step"] == 2
    assert {part: event["measured"][part] for part in STATES} == {part: event["predicted"][part] for part in STATES}
    assert event["measured"]["gradients"] > 0
    assert event["measured"]["peak"] > sum(event["measured"][part] for part in STATES)
    assert event["peak_is"] == "resident set of the process"
    assert "memory, predicted / measured: model states" in capsys.readouterr().out


def test_a_resumed_run_says_it_again(tmp_path):
    json = write_json(tmp_path / "engine.json", engine_json())
    text = write_text(tmp_path / "text.txt")
    for steps in (3, 6):
        config = write_run_yaml(tmp_path / "run.yaml", max_steps=steps)
        assert train(argv(json, tmp_path / "out", config, text)) == 0
    assert [event["step"] for event in events(tmp_path / "out", "memory")] == [2, 5]
