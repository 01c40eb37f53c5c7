"""What a run leaves for the next start when memory was not enough: a smaller micro-batch for the same global batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chatgot.deepspeed_json.resolve import EngineConfig, build_engine_config
from chatgot.devices import DeviceFacts
from chatgot.errors import EXIT_INTERRUPTED, MachineError, RunAgainError
from chatgot.tuning import micro_batch
from chatgot.tuning.micro_batch import Stored, largest_divisor, shrink, stored
from tests.support import engine_json

PER_RANK = 12


def settings(micro: int, **more: Any) -> EngineConfig:
    """Twelve samples on each of two ranks."""
    tree = engine_json(batch=2 * PER_RANK, micro=micro, **more)
    return build_engine_config(tree, "test", world_size=2, facts=DeviceFacts("cpu", bf16=True, fp16=False))


@pytest.fixture(autouse=True)
def one_of_two_ranks(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv(micro_batch.ATTEMPT, raising=False)


def test_the_largest_divisor_is_brute_forces():
    for per_rank in range(1, 40):
        for limit in range(1, 45):
            assert largest_divisor(per_rank, limit) == max(n for n in range(1, limit + 1) if per_rank % n == 0)


@pytest.mark.parametrize(("before", "after"), [(12, 6), (6, 3), (4, 2), (3, 1), (2, 1)])
def test_half_or_the_next_divisor_below_is_stored_for_the_same_json(before, after, tmp_path):
    config = settings(before)
    error = shrink(
        tmp_path, config, 2, before, "step 7, the backward pass", RuntimeError("CUDA out of memory\nlong story")
    )
    assert isinstance(error, RunAgainError)
    assert error.exit_code == EXIT_INTERRUPTED
    for part in (
        "step 7, the backward pass: out of memory on rank 1 (CUDA out of memory)",
        f"micro-batch {before} -> {after}, accumulation {PER_RANK // before} -> {PER_RANK // after}",
        "global batch 24 as before",
        "run the same command again",
    ):
        assert part in str(error)
    micro, reason = stored(tmp_path, before, PER_RANK) or pytest.fail("nothing stored")
    assert micro == after
    assert reason == f"memory ran out with {before} (step 7, the backward pass)"
    now = config.with_micro_batch(micro, 2)
    assert (now.train_batch_size, now.micro_batch_size * now.accumulation * 2) == (24, 24)
    assert stored(tmp_path, before + 1, PER_RANK) is None, "another value in the JSON overrules what is stored"
    assert stored(tmp_path, "auto", PER_RANK) is None


def test_the_attempt_is_named_where_the_launcher_can_start_again(tmp_path, monkeypatch):
    monkeypatch.setenv(micro_batch.ATTEMPT, "a-1")
    error = shrink(tmp_path, settings(4), 2, 4, "evaluation")
    assert "launch/run starts all ranks again" in str(error)
    assert "run the same command" not in str(error)
    assert json.loads((tmp_path / "micro_batch.json").read_text())["attempt"] == "a-1"


def test_ranks_that_run_out_together_store_the_same(tmp_path):
    """Also after an earlier shrink, so that the file says another micro-batch than the JSON."""
    shrink(tmp_path, settings(12), 2, 12, "step 1")
    texts = []
    for _ in range(2):
        shrink(tmp_path, settings(6), 2, 12, "step 3")
        texts.append((tmp_path / "micro_batch.json").read_text())
    assert texts[0] == texts[1]
    assert stored(tmp_path, 12, PER_RANK) == (3, "memory ran out with 6 (step 3)")


def test_what_auto_found_becomes_smaller_and_stays_the_answer_to_auto(tmp_path):
    Stored(6, "auto", "fits", key="settings").store(tmp_path)
    shrink(tmp_path, settings(6), 2, "auto", "step 3")
    assert stored(tmp_path, "auto", PER_RANK) == (3, "memory ran out with 6 (step 3)")
    known = micro_batch.read(tmp_path)
    assert known is not None
    assert known.key == "settings"


def test_a_json_that_now_asks_for_what_was_stored_gets_an_answer_of_its_own(tmp_path):
    """Else every start would find nothing for its JSON, run out of memory again, and launch/run would never end."""
    shrink(tmp_path, settings(12), 2, 12, "step 1")
    shrink(tmp_path, settings(6), 2, 6, "step 1")
    assert stored(tmp_path, 6, PER_RANK) == (3, "memory ran out with 6 (step 1)")
    assert stored(tmp_path, 12, PER_RANK) is None


def test_a_file_of_earlier_versions_answers_auto(tmp_path):
    (tmp_path / "micro_batch.json").write_text('{"micro_batch": 4, "reason": "fits", "key": "abc"}')
    assert micro_batch.read(tmp_path) == Stored(4, "auto", "fits", key="abc")
    assert stored(tmp_path, "auto", PER_RANK) == (4, "fits")
    assert stored(tmp_path, "auto", 6) == (3, "fits"), "on more ranks: the largest that divides their samples"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"micro_batch": "x", "reason": ""}'])
def test_a_damaged_file_counts_as_none(text, tmp_path):
    (tmp_path / "micro_batch.json").write_text(text)
    assert stored(tmp_path, "auto", PER_RANK) is None


def test_at_micro_batch_1_the_message_says_what_needs_less(tmp_path):
    error = shrink(tmp_path, settings(1), 2, 1, "step 2, the optimizer step")
    assert isinstance(error, MachineError)
    for part in (
        "at micro-batch 1, the smallest",
        "What needs less: ds.activation_checkpointing={}; ds.zero_optimization.stage=3 on several ranks; a smaller",
    ):
        assert part in str(error)
    assert "offload" not in str(error)
    assert not list(tmp_path.iterdir())
    offload = "ds.zero_optimization.offload_optimizer.device=cpu"
    assert f"on several ranks; {offload}; a smaller" in str(shrink(tmp_path, settings(1, stage=1), 2, 1, "step 2"))
    in_use = settings(1, stage=3, activation_checkpointing={}, offload=True, offload_param=True)
    assert "What needs less: a smaller model.max_seq_length or model." in str(shrink(tmp_path, in_use, 2, 1, "step 2"))


def test_a_folder_that_cannot_be_written_is_named_with_what_to_set(tmp_path: Path):
    error = shrink(tmp_path / "gone", settings(4), 2, 4, "step 2")
    assert isinstance(error, MachineError)
    assert "train_micro_batch_size_per_gpu = 2 and gradient_accumulation_steps = 6" in str(error)
