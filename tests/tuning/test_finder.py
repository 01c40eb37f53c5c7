"""The micro-batch finder: its answer is brute force's, and a probe that runs out of memory costs nothing."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chatgot.config.run import ModelConfig
from chatgot.devices import DeviceFacts
from chatgot.errors import MachineError
from chatgot.training.forecast import Forecast, this_device
from chatgot.tuning import finder
from chatgot.tuning.finder import candidates, largest_that_fits
from chatgot.tuning.probe import Probes, Task
from tests.support import TINY_MODEL, engine_json, write_json, write_run_yaml
from tests.training import in_process

MODEL = dataclasses.asdict(ModelConfig(**{**TINY_MODEL, "max_seq_length": 128}))
VOCABULARY = 30_000
LOGITS = 128 * VOCABULARY * 4
"""Bytes of one sample's."""
TOTAL = 27
"""1, 3, 9 or 27 samples at a time."""


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@given(st.lists(st.integers(1, 10_000), unique=True, max_size=40).map(sorted), st.integers(0, 10_000))
def test_the_search_is_brute_force_with_fewer_probes(sizes, limit):
    probed = []

    def fits(size):
        probed.append(size)
        return size <= limit

    assert largest_that_fits(sizes, fits) == max((size for size in sizes if size <= limit), default=None)
    assert len(probed) == len(set(probed)) <= 2 * math.log2(len(sizes) + 1) + 1


def test_candidates_make_the_global_batch_with_whole_accumulation_steps():
    assert candidates(24, 2) == [1, 2, 3, 4, 6, 12]
    assert candidates(7, 2) == []


@pytest.mark.parametrize(("kind", "limit"), [("hook", 4 * LOGITS), ("rlimit", 55 * LOGITS)])
def test_the_answer_is_brute_forces_on_a_limited_memory(kind, limit):
    tree = {**engine_json(batch=TOTAL), "train_micro_batch_size_per_gpu": "auto"}
    probes = Probes((0,), 1, 0.0, program=("-m", "tests.tuning.programs.limited_probe", kind, str(limit)))
    every = {
        size: probes.run(Task(finder.probe_tree(tree, size, 1), MODEL, VOCABULARY)) for size in candidates(TOTAL, 1)
    }
    fitting = [size for size, outcome in every.items() if outcome.fits]
    assert fitting in ([1], [1, 3], [1, 3, 9]), every  # the limit is one, and not for everything
    lines: list[str] = []
    answer = finder.search(tree, probes, forecast(1), lines.append, "key")
    assert answer.micro_batch == max(fitting)
    assert "ran out of memory" in answer.reason
    assert torch.ones(60 * LOGITS // 4).shape == (60 * LOGITS // 4,)  # here nothing is limited, and nothing broken


def forecast(world_size: int, memory: int | None = None) -> Forecast:
    device = this_device(DeviceFacts("cpu", bf16=True, fp16=False))
    return Forecast(MODEL, VOCABULARY, world_size, dataclasses.replace(device, memory=memory) if memory else device)


def test_what_the_plan_puts_far_beyond_the_memory_is_not_probed():
    tree = {**engine_json(batch=TOTAL), "train_micro_batch_size_per_gpu": "auto"}
    started = []

    class Counted(Probes):
        def run(self, task):
            started.append(task.tree["train_micro_batch_size_per_gpu"])
            return super().run(task)

    fitting = Counted((0,), 1, 0.0, program=("-m", "tests.tuning.programs.fake_probe", "fits"))
    lines: list[str] = []
    answer = finder.search(tree, fitting, forecast(1, memory=20 * LOGITS), lines.append, "key")
    assert answer.micro_batch == max(started) == 9, "27 samples have 27 logits, and their gradients"
    assert "27 does not (not tried: chatgot plan says " in answer.reason
    started.clear()
    with pytest.raises(MachineError, match="not even one sample of 128 tokens fits \\(not tried: chatgot plan says"):
        finder.search(tree, fitting, forecast(1, memory=1_000_000), lines.append, "key")
    assert started == []


def probes_of(how: str) -> Probes:
    return Probes((0, 1), 2, 0.05, program=("-m", "tests.tuning.programs.fake_probe", how))


@pytest.mark.parametrize(("how", "why"), [("killed", "rank 1 was killed"), ("told", "rank 1 ran out of memory")])
def test_the_smallest_of_all_ranks_answers_counts(how, why):
    tree = {**engine_json(batch=54), "train_micro_batch_size_per_gpu": "auto"}
    answer = finder.search(tree, probes_of(how), forecast(2), lambda line: None, "key")
    assert answer.micro_batch == 3
    assert f"9 does not ({why}" in answer.reason


def test_a_margin_must_stay_free():
    tree = {**engine_json(batch=6), "train_micro_batch_size_per_gpu": "auto"}
    probes = dataclasses.replace(probes_of("told"), margin=0.75)
    answer = finder.search(tree, probes, forecast(2), lambda line: None, "key")
    assert answer.micro_batch == 1
    assert "3 does not (leaves less than 75% free" in answer.reason


def test_another_failure_of_a_probe_is_no_want_of_memory():
    tree = {**engine_json(batch=54), "train_micro_batch_size_per_gpu": "auto"}
    with pytest.raises(MachineError, match=r"(?s)rank . of a probe ended with 1, not for want of memory"):
        finder.search(tree, probes_of("broken"), forecast(2), lambda line: None, "key")


def test_auto_is_resolved_once_and_a_resume_does_not_probe_again(tmp_path, text_file, monkeypatch, capsys):
    tree = {**engine_json(batch=6), "train_micro_batch_size_per_gpu": "auto"}
    config = write_run_yaml(tmp_path / "run.yaml", max_steps=2)
    command = in_process.argv(write_json(tmp_path / "auto.json", tree), tmp_path / "out", config, text_file)
    assert in_process.train(command) == 0
    resolved = json.loads((tmp_path / "out" / "ds_config.json").read_text())
    batch = [
        resolved[name] for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    ]
    assert batch == [6, 6, 1]
    assert 'train_micro_batch_size_per_gpu = 6: "auto", fits with 5% of the memory free' in capsys.readouterr().out

    def run(self, task):
        raise AssertionError("probed again")

    monkeypatch.setattr(Probes, "run", run)
    assert in_process.train([*command, "train.max_steps=3"]) == 0
    assert "found by an earlier start" in capsys.readouterr().out
