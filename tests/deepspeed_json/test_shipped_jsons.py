"""The JSONs in ds_configs/: valid for 1, 2, 4 and 8 ranks, strict JSON, and read by stock DeepSpeed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from chatgot.deepspeed_json.read import default_json, read_document
from chatgot.deepspeed_json.resolve import resolve
from chatgot.devices import DeviceFacts
from tests.deepspeed_json.conftest import GPU
from tests.support import read_engine_config

FOLDER = Path(__file__).resolve().parents[2] / "ds_configs"
FILES = sorted(FOLDER.glob("*.json"))


def test_the_promised_files_are_there_and_described() -> None:
    names = {path.stem for path in FILES}
    assert names == {
        "fp32_zero0",
        "fp32_zero0_muon",
        "fp32_zero1_act_ckpt",
        "bf16_zero1",
        "bf16_zero2",
        "bf16_zero2_act_ckpt",
        "bf16_zero3",
        "bf16_zero3_offload",
        "fp16_zero2",
    }
    described = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"| `{name}.json` |" in described for name in names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_every_shipped_json_is_valid(path: Path, ranks: int) -> None:
    config = read_engine_config(path, world_size=ranks, facts=GPU, n_params=14_000_000)
    assert config.train_batch_size == (24 if "muon" in path.stem else 32)
    assert config.micro_batch_size * config.accumulation * ranks == config.train_batch_size
    precision, stage = path.stem.split("_")[:2]
    assert config.precision == precision
    assert config.zero_stage == int(stage.removeprefix("zero"))
    assert (config.activation_checkpointing is not None) == ("act_ckpt" in path.stem)
    assert config.offload_optimizer == config.offload_param == ("cpu" if "offload" in path.stem else "none")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_shipped_json_is_read_by_stock_deepspeed(path: Path) -> None:
    stock = DeepSpeedConfig(str(path))
    config = read_engine_config(path, world_size=1, facts=GPU, n_params=14_000_000)
    assert stock.gradient_accumulation_steps == config.accumulation
    resolved = DeepSpeedConfig(config.deepspeed)
    assert resolved.zero_config.stage == stock.zero_config.stage
    if config.zero_stage:
        assert resolved.zero_config.reduce_bucket_size == 14_000_000


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_shipped_json_states_the_defaults_that_changed(path: Path) -> None:
    tree = json.loads(path.read_text(encoding="utf-8"))
    assert tree["gradient_clipping"] == 1.0
    assert ("bf16" not in tree) or tree["bf16"]["check_grad_overflow"] is True
    for section in ("offload_optimizer", "offload_param"):
        assert "pin_memory" in tree["zero_optimization"].get(section, {"pin_memory": None})
    notes = read_engine_config(path, world_size=1, facts=GPU).notes
    assert not any("default since" in note for note in notes)


@pytest.mark.parametrize("path", [p for p in FILES if "fp16" not in p.stem], ids=lambda path: path.stem)
def test_every_shipped_json_but_fp16_runs_on_a_cpu(path: Path) -> None:
    read_engine_config(path, world_size=2, facts=DeviceFacts("cpu", bf16=True, fp16=False))


def test_the_files_differ_only_where_their_names_say() -> None:
    trees = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in FILES}
    own = {"bf16", "fp16", "data_types", "zero_optimization", "activation_checkpointing"}
    common = {
        name: {k: v for k, v in tree.items() if k not in own} for name, tree in trees.items() if "muon" not in name
    }
    for tree in common.values():
        tree["chatgot"].pop("activation_checkpointing", None)
    assert all(tree == common["bf16_zero1"] for tree in common.values())


@pytest.mark.parametrize(
    ("kind", "bf16", "ranks", "name"),
    [
        ("cpu", True, 1, "fp32_zero0_muon"),
        ("cpu", True, 2, "fp32_zero0_muon"),
        ("cuda", True, 1, "bf16_zero1"),
        ("cuda", True, 2, "bf16_zero2"),
        ("cuda", False, 1, "fp16_zero2"),
        ("cuda", False, 4, "fp16_zero2"),
    ],
)
def test_the_device_decides_where_no_json_is_named(
    kind: Literal["cpu", "cuda"], bf16: bool, ranks: int, name: str
) -> None:
    facts = DeviceFacts(kind, bf16=bf16, fp16=kind == "cuda")
    path = default_json(facts, ranks)
    assert path.stem == name
    assert not resolve(read_document(path), world_size=ranks, facts=facts).findings.at_level("error", "warning")
