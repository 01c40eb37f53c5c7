"""The whole program resumes its own run at another ZeRO stage, another number of ranks and another precision, and says
so.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import ROOT, engine_json, live_metrics, run_ranks, write_json, write_run_yaml


def train(folder: Path, text: Path, ranks: int, steps: int, out: str = "out", **engine) -> str:
    config = write_run_yaml(folder / f"run{steps}.yaml", max_steps=steps, model={"dropout": 0.0})
    json = write_json(
        folder / "engine.json", engine_json(**engine, chatgot={"schedule": {"type": "constant", "warmup_steps": 0}})
    )
    arguments = [
        "--deepspeed_config",
        str(json),
        "--config",
        str(config),
        "--data",
        str(text),
        "--out_dir",
        str(folder / out),
    ]
    return run_ranks([str(ROOT / "launch" / "train.py"), *arguments], ranks)[0].stdout


def losses(folder: Path, out: str) -> dict[int, float]:
    return {r["step"]: r["train/loss"] for r in live_metrics(folder / out / "metrics.jsonl") if "train/loss" in r}


def test_a_run_moves_to_other_hardware(tmp_path, text_file):
    train(tmp_path, text_file, 1, 6, "whole", stage=0, micro=8)
    train(tmp_path, text_file, 2, 2, stage=0, micro=4)
    said = train(tmp_path, text_file, 1, 4, stage=3, micro=2, offload=True)
    for line in ("world_size: 2 -> 1", "zero_stage: 0 -> 3", "offload_optimizer: not given -> cpu"):
        assert f"changed since the checkpoint: {line}" in said
    assert "dropout is not the uninterrupted run's" in said
    said = train(tmp_path, text_file, 1, 6, stage=0, micro=8)
    assert "zero_stage: 3 -> 0" in said
    assert "dropout is not" not in said
    whole, moved = losses(tmp_path, "whole"), losses(tmp_path, "out")
    assert whole.keys() == moved.keys()
    assert max(abs(whole[step] - moved[step]) / whole[step] for step in whole) <= 1e-5


def test_a_run_turns_to_16_bit_and_back(tmp_path, text_file):
    train(tmp_path, text_file, 1, 2, stage=1, precision="fp32")
    said = train(tmp_path, text_file, 1, 3, stage=1, precision="bf16")
    assert "precision: fp32 -> bf16" in said
    said = train(tmp_path, text_file, 1, 4, stage=1, precision="fp32")
    assert "precision: bf16 -> fp32" in said
    assert losses(tmp_path, "out").keys() == {1, 2, 3, 4}


@pytest.mark.fp16
def test_a_run_turns_from_bf16_to_fp16(tmp_path, text_file):
    train(tmp_path, text_file, 1, 2, stage=1, precision="bf16")
    said = train(tmp_path, text_file, 1, 3, stage=2, precision="fp16")
    assert "fp16: the checkpoint has no loss scale; starting with 1024" in said
    assert losses(tmp_path, "out").keys() == {1, 2, 3}
