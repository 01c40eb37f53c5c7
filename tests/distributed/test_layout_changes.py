"""Resumes in another layout, held against 100 steps of the journal: no false alarm, and what is wrong is found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from chatgot.proof import digest
from chatgot.verify.verify import verify
from tests.support import engine_json, run_ranks, write_json, write_run_yaml
from tests.training.in_process import argv, events

pytestmark = pytest.mark.slow

SAVED, STEPS = 10, 100
LAST = SAVED + STEPS
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "stage 0": (1, {"stage": 0, "micro": 8}),
    "small": (1, {"stage": 0, "micro": 1}),
    "stage 2": (1, {"stage": 2, "micro": 2, "activation_checkpointing": {}}),
    "stage 3": (1, {"stage": 3, "micro": 4}),
    "two ranks": (2, {"stage": 1, "micro": 4}),
    "two ranks, stage 3": (2, {"stage": 3, "micro": 1}),
    "bf16": (1, {"stage": 1, "micro": 8, "precision": "bf16"}),
    "bf16 on two ranks": (2, {"stage": 2, "micro": 2, "precision": "bf16"}),
}
"""Ranks, and arguments of engine_json."""
CHANGES = [
    ("stage 0", "small"),
    ("stage 0", "stage 2"),
    ("stage 0", "stage 3"),
    ("stage 0", "two ranks"),
    ("stage 0", "bf16"),
    ("small", "stage 0"),
    ("small", "two ranks, stage 3"),
    ("stage 2", "small"),
    ("stage 2", "stage 3"),
    ("stage 2", "two ranks"),
    ("stage 3", "stage 0"),
    ("stage 3", "two ranks, stage 3"),
    ("two ranks", "small"),
    ("two ranks", "two ranks, stage 3"),
    ("two ranks, stage 3", "stage 0"),
    ("two ranks, stage 3", "bf16"),
    ("bf16", "bf16 on two ranks"),
    ("bf16", "stage 0"),
    ("bf16 on two ranks", "bf16"),
    ("bf16 on two ranks", "two ranks"),
]
CONTROLS = [
    (before, now, control)
    for before, now in [("stage 0", "small"), ("stage 2", "two ranks"), ("bf16", "bf16 on two ranks")]
    for control in ("position", "moments", "rate")
]
RATES = {"usual rate": 3e-3, "high rate": 1e-2}


def start(folder: Path, world_size: int, runs: list[dict[str, Any]]) -> None:
    (folder / "plan.json").write_text(json.dumps(runs))
    program = ["-m", "tests.distributed.programs.runs", str(folder / "plan.json"), str(folder / "results.json")]
    run_ranks(program, world_size, timeout=3000)


@pytest.fixture(scope="module", params=list(RATES.values()), ids=list(RATES))
def resumed(request, tmp_path_factory, text_file) -> Path:
    """Run folders named 'before > now' and 'before > now, control'."""
    folder: Path = tmp_path_factory.mktemp("layouts")
    config = write_run_yaml(folder / "run.yaml", max_steps=LAST + 1)
    params = {"lr": request.param, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "torch_adam": True}
    constant = {"schedule": {"type": "constant", "warmup_steps": 2}}
    jsons = {
        name: write_json(
            folder / f"{name}.json", engine_json(optimizer={"type": "AdamW", "params": params}, chatgot=constant, **how)
        )
        for name, (_, how) in LAYOUTS.items()
    }
    for world_size in (1, 2):
        plan = []
        for name in (name for name, (ranks, _) in LAYOUTS.items() if ranks == world_size):
            line = argv(jsons[name], folder / name, config, text_file)
            plan.append({"name": f"{name} begins", "argv": [*line, f"train.max_steps={SAVED}"]})
            plan.append({"name": name, "argv": line, "abandon_after": LAST})
        start(folder, world_size, plan)
    for control in (None, "position", "moments", "rate"):
        cases = [(before, now, None) for before, now in CHANGES] if control is None else CONTROLS
        for world_size in (1, 2):
            plan = []
            for before, now, wrong in cases:
                if wrong == control and LAYOUTS[now][0] == world_size:
                    out = Path(shutil.copytree(folder / before, folder / name_of(before, now, wrong)))
                    line = argv(jsons[now], out, config, text_file)
                    plan.append({"name": out.name, "argv": line, "abandon_after": LAST, "control": control})
            start(folder, world_size, plan)
    return folder


def name_of(before: str, now: str, control: str | None = None) -> str:
    return f"{before} > {now}" + (f", {control}" if control else "")


def test_no_change_of_layout_is_a_false_alarm(resumed, capsys):
    assert len(CHANGES) == 20
    for before, now in CHANGES:
        out = resumed / name_of(before, now)
        assert not events(out, "resume_differs"), (out.name, events(out, "resume_differs"))
        [event] = events(out, "resume_verified")
        assert (event["steps"], event["of"], event["exact"]) == (STEPS, STEPS, False), out.name
        assert len(digest.history(out).digests) == LAST
        assert verify(out), capsys.readouterr().out
        assert "no proof of damage" not in capsys.readouterr().out, out.name


@pytest.mark.parametrize(("before", "now", "control"), CONTROLS)
def test_control_what_is_wrong_is_found_through_a_change_of_layout(before, now, control, resumed, capsys):
    out = resumed / name_of(before, now, control)
    [event] = events(out, "resume_differs")
    expected = {"position": {"batch"}, "rate": {"lr"}, "moments": {"loss", "grad_norm"}}[control]
    assert event["field"] in expected
    assert event["step"] <= SAVED + (5 if control == "moments" else 1)
    assert verify(out) == (control == "moments")
    said = capsys.readouterr().out
    assert f"step {event['step']} was trained again after a resume, and differs: {event['field']} was" in said
