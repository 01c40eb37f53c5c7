"""The micro-batch that is found by probes: it is brute force's, and a probe that runs out of memory costs nothing."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from typing import Any, cast

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chatgot.config.run import ModelConfig
from chatgot.devices import Device, DeviceFacts, device_of_machine
from chatgot.distributed import Place
from chatgot.errors import MachineError
from chatgot.tuning import micro_batch
from chatgot.tuning.micro_batch import candidates, largest_that_fits
from chatgot.tuning.probe import Probes, Task
from tests.support import ROOT, TINY_MODEL, engine_json, environment, warm_python, write_json, write_run_yaml
from tests.training import in_process

MODEL = ModelConfig(**{**TINY_MODEL, "max_seq_length": 128}).model_dump()
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


@pytest.mark.parametrize(("kind", "limit"), [("hook", 4 * LOGITS), ("rlimit", 75 * LOGITS)])
def test_the_answer_is_brute_forces_on_a_limited_memory(kind, limit, warm_starts):
    tree = {**engine_json(batch=TOTAL), "train_micro_batch_size_per_gpu": "auto"}
    probes = Probes(cpu(), (0,), 1, 0.0, program=("-m", "tests.tuning.programs.limited_probe", kind, str(limit)))
    every = {
        size: probes.run(Task(micro_batch.probe_tree(tree, size, 1), MODEL, VOCABULARY))
        for size in candidates(TOTAL, 1)
    }
    fitting = [size for size, outcome in every.items() if outcome.fits]
    assert fitting in ([1], [1, 3], [1, 3, 9]), every  # the limit is one, and not for everything

    class Remembered(Probes):
        def run(self, task):
            return every[task.tree["train_micro_batch_size_per_gpu"]]

    answer = micro_batch.search(tree, MODEL, VOCABULARY, Remembered(probes.device, (0,), 1, 0.0))
    assert answer.micro_batch == max(fitting)
    assert "ran out of memory" in answer.reason
    assert torch.ones(60 * LOGITS // 4).shape == (60 * LOGITS // 4,)  # here nothing is limited, and nothing broken


def cpu(memory: int | None = None) -> Device:
    device = device_of_machine(DeviceFacts("cpu", bf16=True, fp16=False))
    return dataclasses.replace(device, memory=memory) if memory else device


def test_what_the_plan_puts_far_beyond_the_memory_is_not_probed():
    tree = {**engine_json(batch=TOTAL), "train_micro_batch_size_per_gpu": "auto"}
    started = []

    class Counted(Probes):
        def run(self, task):
            started.append(task.tree["train_micro_batch_size_per_gpu"])
            return super().run(task)

    fitting = Counted(cpu(20 * LOGITS), (0,), 1, 0.0, program=("-m", "tests.tuning.programs.fake_probe", "fits"))
    answer = micro_batch.search(tree, MODEL, VOCABULARY, fitting)
    assert answer.micro_batch == max(started) == 9, "27 samples have 27 logits, and their gradients"
    assert "27 does not (not tried: chatgot plan says " in answer.reason
    started.clear()
    fitting.device = cpu(1_000_000)
    with pytest.raises(MachineError, match="not even one sample of 128 tokens fits \\(not tried: chatgot plan says"):
        micro_batch.search(tree, MODEL, VOCABULARY, fitting)
    assert started == []


def probes_of(how: str) -> Probes:
    return Probes(cpu(), (0, 1), 2, 0.05, program=("-m", "tests.tuning.programs.fake_probe", how))


@pytest.mark.parametrize(("how", "why"), [("killed", "rank 1 was killed"), ("told", "rank 1 ran out of memory")])
def test_the_smallest_of_all_ranks_answers_counts(how, why):
    tree = {**engine_json(batch=54), "train_micro_batch_size_per_gpu": "auto"}
    answer = micro_batch.search(tree, MODEL, VOCABULARY, probes_of(how))
    assert answer.micro_batch == 3
    assert f"9 does not ({why}" in answer.reason


PROBING = """
import sys
from chatgot.training.stop import StopSignals
from tests.tuning.test_probe import MODEL, VOCABULARY, engine_json, micro_batch, probes_of
with StopSignals(starting=True):
    tree = {**engine_json(batch=54), "train_micro_batch_size_per_gpu": "auto"}
    sys.executable = sys.argv[1]
    micro_batch.search(tree, MODEL, VOCABULARY, probes_of("hangs"))
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_probes_die_with_their_parent(how, tmp_path):
    seen, temporary = tmp_path / "seen", tmp_path / "tmp"
    seen.mkdir()
    temporary.mkdir()
    places = {"SEEN": str(seen), "TMPDIR": str(temporary), "DS_ACCELERATOR": "cpu"}
    words = [warm_python(), "-c", PROBING, sys.executable]
    parent = subprocess.Popen(words, env=environment(**places), cwd=ROOT, stderr=-1)
    deadline = time.monotonic() + 300
    while len(pids := [int(one.read_text() or 0) for one in seen.glob("*.pid")]) < 2 or 0 in pids:
        assert parent.poll() is None
        assert time.monotonic() < deadline, "the probes have not started"
        time.sleep(0.05)
    parent.send_signal(how)
    _, said = parent.communicate(timeout=300)
    while any(map(psutil.pid_exists, pids)):
        assert time.monotonic() < deadline, "a probe lives on"
        time.sleep(0.05)
    if how == signal.SIGTERM:
        assert b"RunAgainError: stopped by SIGTERM before the first step" in said
        assert not list(temporary.glob("chatgot-probe-*"))


def test_a_probe_has_the_device_of_the_run_where_a_scheduler_shows_only_one(tmp_path, monkeypatch):
    """engine.build.join sets LOCAL_RANK to 0 there (srun --gpus-per-task 1)."""
    asked: list[Probes] = []

    def search(tree, model, vocab_size, probes, key, tried):
        asked.append(probes)
        return micro_batch.Stored(1, "auto", "", key=key)

    class Alone:
        on_rank_0 = staticmethod(lambda function: function())
        gather = staticmethod(lambda value: [value])

    monkeypatch.setattr(micro_batch, "search", search)
    monkeypatch.setenv("LOCAL_RANK", "0")
    place: Any = Place(5, 3, 8, "slurm")
    micro_batch.find(engine_json(), MODEL, VOCABULARY, "gpu", tmp_path, place, cast(Any, Alone()))
    assert [(one.ranks, one.first_local) for one in asked] == [((5,), 0)]


def test_a_margin_must_stay_free():
    tree = {**engine_json(batch=6), "train_micro_batch_size_per_gpu": "auto"}
    probes = dataclasses.replace(probes_of("told"), margin=0.75)
    answer = micro_batch.search(tree, MODEL, VOCABULARY, probes)
    assert answer.micro_batch == 1
    assert "3 does not (leaves less than 75% free" in answer.reason


def test_another_failure_of_a_probe_is_no_want_of_memory():
    tree = {**engine_json(batch=54), "train_micro_batch_size_per_gpu": "auto"}
    with pytest.raises(MachineError, match=r"(?s)rank . of a probe ended with 1, not for want of memory"):
        micro_batch.search(tree, MODEL, VOCABULARY, probes_of("broken"))


def test_auto_is_resolved_once_and_a_resume_does_not_probe_again(
    tmp_path, text_file, monkeypatch, capsys, caplog, warm_starts
):
    caplog.set_level("INFO", "chatgot")
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
    assert "found by an earlier start" in caplog.text


def test_a_probe_has_the_environment_that_launch_run_gives_to_a_rank(tmp_path, monkeypatch):
    """Threads shared out over the ranks, and the allocator that keeps its memory, where the user says nothing else."""
    for name in ("OMP_NUM_THREADS", "MALLOC_TRIM_THRESHOLD_", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CHATGOT_ATTEMPT", "of the run")
    monkeypatch.setenv("SEEN", str(tmp_path))
    tree = {**engine_json(batch=2, micro=1), "gradient_accumulation_steps": 1}
    assert probes_of("environment").outcome(Task(tree, MODEL, VOCABULARY)).fits
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for rank, one in enumerate(seen):
        assert (one["RANK"], one["LOCAL_RANK"], one["WORLD_SIZE"]) == (str(rank), str(rank), "2")
        assert one["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
        assert one["MALLOC_TRIM_THRESHOLD_"] == "10000000000"
        assert one["GOMP_SPINCOUNT"] == "10000"
        assert "CHATGOT_ATTEMPT" not in one
    assert seen[0]["MASTER_PORT"] == seen[1]["MASTER_PORT"]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert probes_of("environment").outcome(Task(tree, MODEL, VOCABULARY)).fits
    assert json.loads((tmp_path / "0.json").read_text())["OMP_NUM_THREADS"] == "3"
