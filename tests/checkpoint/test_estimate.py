"""The estimate of a checkpoint's size, made before the first step, against what DeepSpeed writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support import engine_json, run_ranks, takes_fp16, write_run_yaml

MUON = {"type": "Muon", "params": {"lr": 0.02, "muon_lr": 0.02, "adam_lr": 3e-3, "momentum": 0.95, "weight_decay": 0.1}}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "muon": MUON,
    "sgd": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
    "rmsprop": {"type": "RMSprop", "params": {"lr": 1e-3, "momentum": 0.9, "centered": True}},
    "asgd": {"type": "ASGD", "params": {"lr": 1e-3}},
    "adafactor": {"type": "Adafactor", "params": {"lr": 1e-3}},
}
PER_PARAMETER = {"0": 12, "1": 16, "1-bf16": 14, "2": 16, "2-bf16": 14, "2-fp16": 14, "3": 12, "3-bf16": 12}
MUONS = ["0-muon", "1-muon", "1-bf16-muon", "2-muon", "3-muon"]
OTHERS = ["0-amsgrad", "0-rmsprop", "0-asgd", "0-adafactor", "1-asgd", "2-rmsprop", "2-adafactor"]
CASES = {
    1: [*PER_PARAMETER, *MUONS, "2-offload", "1-aligned", "0-sgd", "3-amsgrad", *OTHERS],
    2: [*PER_PARAMETER, *MUONS],
}
"""By number of ranks."""
CONSTANT = 64_000
"""Bytes by which the estimate of the small files may be off."""


def case(name: str) -> dict[str, Any]:
    stage, *words = name.split("-")
    keys: dict[str, Any] = {"stage": int(stage), "batch": 4, "micro": 2, "offload": "offload" in words}
    for word in words:
        if word in ("bf16", "fp16"):
            keys["precision"] = word
        if word in OPTIMIZERS:
            keys["optimizer"] = OPTIMIZERS[word]
    tree = engine_json(**keys)
    if stage != "0" and {"rmsprop", "asgd", "adafactor"} & set(words):
        tree["zero_allow_untested_optimizer"] = True
    if "amsgrad" in words:
        tree["optimizer"]["params"]["amsgrad"] = True
    if "muon" in words and stage == "3":
        tree["zero_optimization"]["reduce_scatter"] = False
    if "aligned" in words:
        tree["zero_optimization"]["parameter_alignment"] = True
    return tree


def marked(ranks: int, name: str) -> Any:
    return pytest.param(ranks, name, marks=pytest.mark.fp16 if "fp16" in name else (), id=f"{name} @{ranks}")


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> dict[int, dict[str, tuple[int, int]]]:
    """By number of ranks and name: bytes estimated before the first step, and written."""
    folder = tmp_path_factory.mktemp("sizes")
    shutil.copy(text_file, folder / "text.txt")
    shape = {"d_model": 128, "n_layers": 4, "d_hid": 256}
    write_run_yaml(folder / "run.yaml", max_steps=1, sample_max_new_tokens=1, model=shape)
    sizes: dict[int, dict[str, tuple[int, int]]] = {}
    for ranks in CASES:
        names = [name for name in CASES[ranks] if takes_fp16() or "fp16" not in name]
        (folder / "plan.json").write_text(json.dumps({name: case(name) for name in names}))
        run_ranks(["-m", "tests.checkpoint.sizes", str(folder), str(folder / "sizes.json")], ranks)
        sizes[ranks] = json.loads((folder / "sizes.json").read_text())
    return sizes


@pytest.mark.parametrize(("ranks", "name"), [marked(ranks, name) for ranks in CASES for name in CASES[ranks]])
def test_estimate_is_within_3_percent_of_every_real_checkpoint(sizes, ranks, name):
    estimated, written = sizes[ranks][name]
    assert abs(estimated - written) <= 0.03 * written
    assert abs(estimated - written) <= CONSTANT


@pytest.mark.parametrize(("ranks", "name"), [marked(ranks, name) for ranks in CASES for name in PER_PARAMETER])
def test_bytes_per_parameter_are_those_of_stage_and_precision(sizes, ranks, name):
    parameters = 4 * (4 * 128**2 + 3 * 128 * 256)  # of the matrices; norms and embeddings are 1.2 % more
    assert PER_PARAMETER[name] < sizes[ranks][name][1] / parameters < 1.05 * PER_PARAMETER[name]
