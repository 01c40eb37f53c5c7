"""N steps, save, a new process and N more equal 2N steps on the device, bit for bit, fp16's loss scale included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chatgot.devices import device_facts
from tests.gpu import program
from tests.gpu.tiny import json_tree
from tests.support import write_json, write_run_yaml

pytestmark = pytest.mark.gpu

N = 10
FP16 = {
    "enabled": True,
    "loss_scale": 0,
    "initial_scale_power": 26,
    "hysteresis": 1,
    "loss_scale_window": 1000,
    "min_loss_scale": 1,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "fp32-stage1": {"stage": 1},
    "bf16-stage1": {"stage": 1, "precision": "bf16"},
    "bf16-stage2": {"stage": 2, "precision": "bf16"},
    "fp32-stage3": {"stage": 3},
    "fp32-stage1-act_ckpt": {"stage": 1, "activation_checkpointing": {}},
    "fp16-stage2": {"stage": 2, "fp16": FP16},
    "fp16-stage3": {"stage": 3, "fp16": FP16},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def variants(device) -> list[str]:
    return [name for name in VARIANTS if "fp16" not in name or device_facts().fp16]


@pytest.fixture(scope="module")
def runs(variants: list[str], folder: Path, text_file: Path) -> dict[str, Any]:
    """All variants: the whole run and the first half in one process, the second half in another; last, a half without
    its random state.
    """
    config = write_run_yaml(folder / "run.yaml", model={"dropout": 0.1}, max_steps=2 * N)
    first, second = [], []
    for name in variants:
        chatgot = {"checkpoint": {"every_steps": N, "every_minutes": None, "keep_best": 0}}
        path = write_json(folder / f"{name}.json", json_tree(gradient_clipping=1.0, chatgot=chatgot, **VARIANTS[name]))
        whole, halves = (
            program.argv(path, folder / f"{name}-{part}", config, text_file) for part in ("whole", "halves")
        )
        first.append({"name": f"{name} whole", "argv": whole})
        first.append({"name": f"{name} first half", "argv": halves, "abandon_after": N + 1})
        second.append({"name": f"{name} second half", "argv": [*halves, "--resume_from", "must"]})
    control = program.argv(folder / "fp32-stage1.json", folder / "control", config, text_file)
    first.append({"name": "control first half", "argv": control, "abandon_after": N})
    second.append({"name": "control second half", "argv": [*control, "--resume_from", "must"], "control": "rng"})
    found: dict[str, Any] = {}
    for label, items in (("first", first), ("second", second)):
        plan, results = folder / f"{label}.plan.json", folder / f"{label}.results.json"
        plan.write_text(json.dumps(items))
        program.start(
            ["-m", "tests.gpu.programs.deterministic_runs", str(plan), str(results)], CUBLAS_WORKSPACE_CONFIG=":4096:8"
        )
        found |= json.loads(results.read_text())
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_resumed_run_is_bit_for_bit_the_uninterrupted_one_on_the_device(name, variants, folder, runs, record):
    if name not in variants:
        pytest.skip("dry run on the CPU: it has no fp16")
    whole, half = runs[f"{name} whole"], runs[f"{name} second half"]
    assert half["started_at"] == N
    assert len(whole["losses"]) == 2 * N
    last = str(2 * N)
    record(
        loss=float.fromhex(whole["losses"][last]),
        equal_steps=sum(half["losses"][s] == loss for s, loss in whole["losses"].items()),
    )
    for quantity in ("losses", "lr", "grad_norm", "weights"):
        assert half[quantity] == whole[quantity], quantity
    assert half["trace"] == [rank[N:] for rank in whole["trace"]]
    if name.startswith("fp16"):
        scales, skipped = (
            program.series(folder / f"{name}-halves", f"optim/{metric}") for metric in ("loss_scale", "skipped_steps")
        )
        record(scale_saved=scales[N], scale_last=scales[2 * N], skipped=skipped[2 * N])
        assert scales == program.series(folder / f"{name}-whole", "optim/loss_scale")
        assert skipped == program.series(folder / f"{name}-whole", "optim/skipped_steps")
        assert scales[N] < 2.0**26
        assert scales[N + 1] in (scales[N], scales[N] / 2)
        assert skipped[N] > 0


def test_control_a_resume_without_the_random_state_is_noticed(runs, record):
    whole, broken = runs["fp32-stage1 whole"], runs["control second half"]
    record(equal_steps=sum(broken["losses"][s] == loss for s, loss in whole["losses"].items()))
    assert broken["started_at"] == N
    assert broken["weights"] != whole["weights"]
    assert broken["losses"] != whole["losses"]
