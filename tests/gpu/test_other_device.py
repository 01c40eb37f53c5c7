"""A checkpoint goes from the GPU to a CPU and back: the same weights, the training goes on, and what cannot move is
named.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chatgot.inference.sample import SampleArguments, sample
from tests.gpu import program
from tests.gpu.machine import DRY_RUN
from tests.gpu.programs.digests import checkpoint_digests, parameter_digests
from tests.gpu.tiny import json_tree, worst
from tests.support import write_json, write_run_yaml

pytestmark = pytest.mark.gpu

N = 4


def test_checkpoints_move_between_gpu_and_cpu(device, tmp_path: Path, text_file: Path, capfd, record):
    json_path = write_json(
        tmp_path / "engine.json",
        json_tree(
            stage=1,
            gradient_clipping=1.0,
            chatgot={"checkpoint": {"every_steps": N, "every_minutes": None, "keep_best": 0}},
        ),
    )
    config = write_run_yaml(tmp_path / "run.yaml", max_steps=2 * N)
    whole, to_cpu, to_gpu = (tmp_path / name for name in ("whole", "to_cpu", "to_gpu"))

    def argv(out: Path, *more: str) -> list[str]:
        return program.argv(json_path, out, config, text_file, *more)

    program.train(argv(whole))
    program.train(argv(to_cpu), abandon_after=N)
    saved_by_gpu = checkpoint_digests(to_cpu)
    plan, results = tmp_path / "plan.json", tmp_path / "results.json"
    runs = [
        {"argv": argv(to_cpu, "--resume_from", "must"), "abandon_after": None},
        {"argv": argv(to_gpu), "abandon_after": N},
    ]
    plan.write_text(json.dumps(runs))
    on_cpu = program.start(["-m", "tests.gpu.programs.other_device", str(plan), str(results)], kind="cpu")
    loaded_by_cpu = json.loads(results.read_text())[0]
    assert checkpoint_digests(to_cpu, f"step-{N:08d}") == saved_by_gpu
    assert loaded_by_cpu == {name: saved_by_gpu[name] for name in loaded_by_cpu}

    saved_by_cpu = checkpoint_digests(to_gpu)
    capfd.readouterr()
    loaded_by_gpu = program.train(argv(to_gpu, "--resume_from", "must"), inspect=parameter_digests)
    on_gpu = "".join(capfd.readouterr())
    assert len(loaded_by_gpu) > 5
    assert loaded_by_gpu == {name: saved_by_cpu[name] for name in loaded_by_gpu}
    assert saved_by_cpu != saved_by_gpu or DRY_RUN
    if not DRY_RUN:
        assert "CUDA random state is not used on a CPU" in on_cpu.stdout + on_cpu.stderr
        assert "has no CUDA random state" in on_gpu

    reference = program.series(whole, "train/loss")
    deviations = {}
    for out in (to_cpu, to_gpu):
        losses = program.series(out, "train/loss")
        assert list(losses) == list(range(1, 2 * N + 1))
        deviations[out.name] = worst(list(losses.values()), list(reference.values()))
    texts = [
        sample(SampleArguments(out, prompt="The night", max_new_tokens=16, greedy=True, device=kind))
        for out in (to_cpu, to_gpu)
        for kind in ("cpu", device.type)
    ]
    record(**deviations, text=texts[0][0][:40])
    assert max(deviations.values()) <= 1e-3
    assert texts[0] == texts[1]
    assert texts[2] == texts[3]
