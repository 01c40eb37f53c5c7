"""Sampling on two ranks, where under ZeRO-3 every forward is a collective, and sampling in one process from what they
leave.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chatgot.data.loader import EvalBatches
from chatgot.inference.sample import SampleArguments, load_run, sample
from tests.support import TINY_MODEL, VAL_FRACTION, engine_json, run_ranks, write_json, write_run_yaml
from tests.training import in_process
from tests.training.in_process import argv, series

PROMPTS = ["T", "The night is dark and full of terrors. Winter", "fire and", "Winter came for house", "s"]
STEPS, EVERY, NEW, LONGEST = 6, 3, 14, 24
RUNS: dict[str, dict[str, Any]] = {
    "greedy": {"sample_prompts": PROMPTS, "sample_temperature": 0.0, "sample_max_new_tokens": NEW},
    "stops": {"sample_prompts": PROMPTS[:3], "sample_stop": "e", "sample_max_new_tokens": LONGEST},
    "one prompt": {"sample_prompts": PROMPTS[:1], "sample_max_new_tokens": 12},
}
KINDS = [(stage, "fp32") for stage in range(4)] + [(stage, "bf16") for stage in (1, 2, 3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, text_file) -> Path:
    """Two ranks: a ZeRO-3 run of each of RUNS that samples twice, and a short run of every kind."""
    folder: Path = tmp_path_factory.mktemp("sampling")
    plan = []
    for stage, precision in KINDS:
        write_json(folder / f"{precision}-{stage}.json", engine_json(stage, precision, micro=2))
    gathering = engine_json(3, micro=2)
    # DeepSpeed keeps parameters that are used again soon, in this model all of them: then no forward would be a
    # collective.
    gathering["zero_optimization"] |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    write_json(folder / "gathering.json", gathering)
    for name, train in RUNS.items():
        config = write_run_yaml(folder / f"{name}.yaml", max_steps=STEPS, sample_every=EVERY, **train)
        plan.append({"name": name, "argv": argv(folder / "gathering.json", folder / name, config, text_file)})
    config = write_run_yaml(folder / "short.yaml", max_steps=2, sample_max_new_tokens=2)
    for stage, precision in KINDS:
        name = f"{precision}-{stage}"
        plan.append({"name": name, "argv": argv(folder / f"{name}.json", folder / name, config, text_file)})
    (folder / "plan.json").write_text(json.dumps(plan))
    run_ranks(
        ["-m", "tests.distributed.programs.runs", str(folder / "plan.json"), str(folder / "results.json")],
        2,
    )
    return folder


def written(run: Path, step: int, prompts: list[str]) -> list[str]:
    """What follows each prompt in a sample file."""
    text = (run / "samples" / f"step-{step:06d}.txt").read_text(encoding="utf-8")
    parts = text.removesuffix("\n").split("\n\n=== ")
    assert len(parts) == len(prompts)
    found = []
    for part, prompt in zip(parts, prompts):
        head = f"{prompt!r}\n{prompt}"
        part = part.removeprefix("=== ")
        assert part.startswith(head)
        found.append(part[len(head) :])
    return found


def test_zero_3_run_with_unequal_prompts_finishes_and_its_samples_are_those_of_its_weights(folder):
    run = folder / "greedy"
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["step-000003.txt", "step-000006.txt"]
    for prompt, text in zip(PROMPTS, written(run, STEPS, PROMPTS), strict=True):
        settings = SampleArguments(run, prompt=prompt, greedy=True, max_new_tokens=NEW, device="cpu")
        assert sample(settings, io.StringIO()) == [prompt + text]


def test_sample_that_ends_early_on_one_rank_leaves_no_other_waiting(folder):
    texts = written(folder / "stops", EVERY, PROMPTS[:3]) + written(folder / "stops", STEPS, PROMPTS[:3])
    assert all(text.find("e") in (-1, len(text) - 1) for text in texts)
    lengths = {len(text) for text in texts}
    assert len(lengths) > 1, "they have to end at different steps for this to be a test"
    assert max(lengths) <= LONGEST


def test_fewer_prompts_than_ranks_is_fine(folder):
    [text] = written(folder / "one prompt", STEPS, PROMPTS[:1])
    assert len(text) == 12


def test_two_ranks_at_stage_3_train_the_model_of_one_process_at_stage_0(folder, tmp_path, text_file):
    engine = write_json(tmp_path / "engine.json", engine_json(0, micro=8))
    assert in_process.train(argv(engine, tmp_path / "alone", folder / "greedy.yaml", text_file)) == 0
    assert series(folder / "greedy", "train/loss") == pytest.approx(series(tmp_path / "alone", "train/loss"), rel=1e-5)
    ours, *_ = load_run(folder / "greedy", device="cpu")
    theirs, *_ = load_run(tmp_path / "alone", device="cpu")
    for name, weight in ours.state_dict().items():
        assert torch.allclose(weight, theirs.state_dict()[name], atol=1e-5), name


@pytest.mark.parametrize(("stage", "precision"), KINDS)
def test_weights_of_two_ranks_load_in_one_process(stage, precision, folder, text_file):
    run = folder / f"{precision}-{stage}"
    model, tokenizer, *_ = load_run(run, device="cpu")
    text = text_file.read_text(encoding="utf-8")
    val = tokenizer.encode(text[int((1 - VAL_FRACTION) * len(text)) :])
    nats = tokens = 0.0
    with torch.no_grad():
        for input_ids, targets in EvalBatches(np.asarray(val), TINY_MODEL["max_seq_length"], 64, 0, 1):
            nats += float(model(input_ids, targets, reduction="sum"))
            tokens += int((targets != -100).sum())
    assert nats / tokens == pytest.approx(series(run, "val/loss")[2], rel=1e-5 if precision == "fp32" else 2e-3)
    assert len(sample(SampleArguments(run, prompt="The", max_new_tokens=20, device="cpu"), io.StringIO())[0]) == 23
