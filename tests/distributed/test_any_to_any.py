"""A checkpoint of any ZeRO stage, number of ranks, precision and offload resumes in any other: weights and moments bit
for bit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import run_ranks, takes_fp16

BATCH = 8
MUON = {"type": "Muon", "params": {"lr": 0.02, "muon_lr": 0.02, "adam_lr": 3e-3, "momentum": 0.95, "weight_decay": 0.1}}
STAGES = range(4)
ZERO = {
    "rr": {"round_robin_gradients": True},
    "aligned": {"parameter_alignment": True},
    "sub": {"sub_group_size": 3000},
}


def case(name: str, ranks: int, accumulation: int) -> dict[str, Any]:
    """Of a name like 'stage2-bf16-offload'."""
    stage, *words = name.split("-")
    keys: dict[str, Any] = {"stage": int(stage[-1]), "batch": BATCH, "micro": BATCH // ranks // accumulation}
    zero: dict[str, Any] = {}
    for word in words:
        if word in ("bf16", "fp16"):
            keys["precision"] = word
        elif word == "offload":
            keys["offload"] = True
        elif word == "muon":
            keys["optimizer"] = MUON
            zero["reduce_scatter"] = int(stage[-1]) != 3
        else:
            zero.update(ZERO[word])
    return {"json": keys, "zero": zero}


def marked(name: str) -> Any:
    """A parameter of a test; skipped where the name says fp16 and the CPU has none."""
    return pytest.param(name, marks=pytest.mark.fp16 if "fp16" in name else ())


def possible(*names: str) -> bool:
    """Whether this CPU can compute these cases."""
    return takes_fp16() or not any("fp16" in name for name in names)


def drive(folder: Path, ranks: int, label: str, **plan: Any) -> dict[str, Any]:
    plan_file, results = folder / f"{label}.plan.json", folder / f"{label}.results.json"
    plan_file.write_text(json.dumps({"folder": str(folder / f"ranks{ranks}"), **plan}))
    run_ranks(["-m", "tests.distributed.programs.any_to_any", str(plan_file), str(results)], ranks)
    return json.loads(results.read_text())


def written(folder: Path, ranks: int, names: list[str]) -> dict[str, Any]:
    found = drive(folder, ranks, f"write{ranks}", write={name: case(name, ranks, 2) for name in names})
    return {f"{name} @{ranks}": result for name, result in found.items()}


def loads(folder: Path, ranks: int, pairs: list[tuple[str, int, str]], **extra: Any) -> dict[str, Any]:
    return {
        f"{source} @{was} -> {name} @{ranks}": {
            "from": str(folder / f"ranks{was}" / source),
            "case": case(name, ranks, 1),
            **extra,
        }
        for source, was, name in pairs
    }


MATRIX = [f"stage{stage}" for stage in STAGES]
OTHERS = {
    1: ["stage1-bf16", "stage2-fp16", "stage0-muon", "stage1-muon", "stage3-sub", "stage2-offload"],
    2: [
        "stage1-bf16",
        "stage3-bf16",
        "stage1-muon",
        "stage3-muon",
        "stage1-rr",
        "stage2-aligned",
        "stage3-sub-offload",
    ],
}
PAIRS = {
    1: [
        ("stage1-bf16", 2, "stage0"),
        ("stage0", 1, "stage1-bf16"),
        ("stage2-fp16", 1, "stage3"),
        ("stage1", 2, "stage2-fp16"),
        ("stage3-bf16", 2, "stage2-fp16"),
        ("stage0", 2, "stage2-offload"),
        ("stage3-sub-offload", 2, "stage3-sub"),
        ("stage2-aligned", 2, "stage1-rr"),
        ("stage1-muon", 2, "stage0-muon"),
        ("stage3-muon", 2, "stage1-muon"),
        ("stage0-muon", 1, "stage1-muon"),
    ],
    2: [
        ("stage1-bf16", 1, "stage3-bf16"),
        ("stage1-bf16", 2, "stage2-bf16"),
        ("stage2", 1, "stage1-bf16"),
        ("stage3", 2, "stage1-bf16"),
        ("stage1-bf16", 2, "stage2"),
        ("stage2-offload", 1, "stage3-sub"),
        ("stage3-sub", 1, "stage3-sub-offload"),
        ("stage1-rr", 2, "stage2-aligned"),
        ("stage2-aligned", 2, "stage1-rr"),
        ("stage0-muon", 1, "stage1-muon"),
        ("stage0-muon", 1, "stage3-muon"),
        ("stage1-muon", 2, "stage3-muon"),
        ("stage1-muon", 1, "stage0-muon"),
    ],
}
CONTROLS = ("moments", "shards", "groups")


def matrix(ranks: int, rest: bool) -> list[tuple[str, int, str]]:
    """(source, ranks of it, stage now): half of all, in which there is every pair; or the rest."""
    return [
        (source, was, name)
        for i, source in enumerate(MATRIX)
        for was in (1, 2)
        for j, name in enumerate(MATRIX)
        if (i + was + j + ranks + rest) % 2 == 0
    ]


@pytest.fixture(
    scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["half", "the other half"]
)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("any")
    found: dict[str, Any] = {}
    for ranks in (1, 2):
        found |= written(folder, ranks, [name for name in MATRIX + OTHERS[ranks] if possible(name)])
    found["matrix"] = []
    for ranks in (1, 2):
        others = [pair for pair in PAIRS[ranks] if possible(pair[0], pair[2])]
        of_matrix = loads(folder, ranks, matrix(ranks, request.param), files=False)
        found["matrix"] += of_matrix
        plan = of_matrix | loads(folder, ranks, others)
        if ranks == 1:
            for control in CONTROLS:
                item = loads(folder, ranks, [("stage1", 2, "stage2")], control=control)
                plan |= {f"control {control}": next(iter(item.values()))}
        found |= drive(folder, ranks, f"load{ranks}", load=plan)
    return found


def worst(losses: list[float], reference: list[float]) -> float:
    return max(abs(a - b) / b for a, b in zip(losses, reference, strict=True))


WRITTEN = [f"{name} @{ranks}" for ranks in (1, 2) for name in MATRIX + OTHERS[ranks]]
OTHER_NAMES = [f"{source} @{was} -> {name} @{ranks}" for ranks in (1, 2) for source, was, name in PAIRS[ranks]]


def test_any_stage_and_ranks_to_any_other(results):
    assert len(results["matrix"]) == 32
    for name in results["matrix"]:
        saved, found = results[name.split(" -> ")[0]], results[name]
        assert found["step"] == 3, name
        assert found["engine"] == saved["engine"], name
        assert found["decays"] == saved["decays"] == [0.1, 0.0], name
        assert worst(found["losses"], saved["losses"]) <= 1e-5, name


@pytest.mark.parametrize("name", [marked(name) for name in OTHER_NAMES])
def test_precision_offload_and_layout_change(results, name):
    saved, found = results[name.split(" -> ")[0]], results[name]
    assert found["files"] == saved["files"]
    if "engine" in found and saved["engine"]:
        assert found["engine"] == saved["engine"]
    exact = not any(word in name for word in ("bf16", "fp16", "muon"))
    assert worst(found["losses"], saved["losses"]) <= (1e-5 if exact else 2e-2)
    for note in found["notes"]:
        assert note.startswith(("changed since the checkpoint: ", "fp16: the checkpoint has no loss scale")), note


def test_every_rank_reads_its_own_fragments_and_nothing_else(results):
    """Weight and both moments; DeepSpeed's own load, where nothing but the rank's own files is read, does not count
    here.
    """
    for name in results["matrix"]:
        read, parameters, now = results[name]["read"], results[name]["parameters"], name.split(" -> ")[1]
        if name.split(" -> ")[0] == now:
            assert sum(read) == 0, name
        elif now.startswith("stage0"):
            assert read == [3 * parameters] * len(read), name
        else:
            assert sum(read) == 3 * parameters, name
            assert max(read) <= 3 * parameters * 0.51 or len(read) == 1, name


@pytest.mark.parametrize("name", [marked(name) for name in WRITTEN])
def test_files_say_what_the_engine_held(results, name):
    assert {p["step"] for p in results[name]["files"].values() if "step" in p} == {3}
    for parameter, tensors in (results[name]["engine"] or {}).items():
        assert {key: results[name]["files"][parameter][key] for key in tensors} == tensors, parameter


def test_changes_are_announced_in_one_line_each(results):
    assert results["stage1-bf16 @2 -> stage0 @1"]["notes"] == [
        "changed since the checkpoint: world_size: 2 -> 1",
        "changed since the checkpoint: zero_stage: 1 -> 0",
        "changed since the checkpoint: precision: bf16 -> fp32",
        "changed since the checkpoint: grad_accum_dtype: fp32 -> not given",
    ]


@pytest.mark.parametrize("control", CONTROLS)
def test_control_a_wrong_resume_is_noticed(results, control):
    saved, found = results["stage1 @2"], results[f"control {control}"]
    assert worst(found["losses"], saved["losses"]) > 1e-5
    if control == "groups":
        assert found["decays"] != saved["decays"]
    else:
        assert found["files"] != saved["files"]
        assert found["engine"] != saved["engine"]


@pytest.mark.slow
@pytest.mark.parametrize(("was", "now"), [(4, 2), (2, 4), (3, 2)])
def test_more_ranks(tmp_path, was, now):
    global_batch = {"batch": 12}
    names = [*MATRIX, "stage1-bf16", "stage1-muon"]
    plan = {name: case(name, was, 1) for name in names}
    for item in plan.values():
        item["json"] |= {**global_batch, "micro": 12 // was}
    saved = drive(tmp_path, was, "write", write=plan)
    pairs = [(source, was, name) for source in MATRIX for name in MATRIX]
    items = loads(tmp_path, now, [*pairs, ("stage1-bf16", was, "stage3-bf16"), ("stage1-muon", was, "stage3-muon")])
    for item in items.values():
        item["case"]["json"] |= {**global_batch, "micro": 12 // now}
    for name, found in drive(tmp_path, now, "load", load=items).items():
        source = saved[name.split(" @")[0]]
        assert found["files"] == source["files"], name
        assert found.get("engine") == source["engine"], name
        assert worst(found["losses"], source["losses"]) <= (2e-2 if "bf16" in name or "muon" in name else 1e-5), name
