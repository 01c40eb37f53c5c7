"""What fails on one rank of two, memory first of all, ends both, with the message and the exit code of the cause.

A rank that runs out of memory stores a smaller micro-batch and ends the run with 75; the next start goes on with it.

The launchers are real; memory runs out where tests/distributed/programs/short_of_memory.py raises what torch raises.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chatgot.errors import MachineError, RunAgainError
from tests.support import (
    ROOT,
    engine_json,
    environment,
    free_port,
    run_ranks,
    warm_python,
    write_json,
    write_run_yaml,
)
from tests.training import in_process
from tests.training.in_process import argv, events, series, tags

STEPS = 6
PROGRAM = ROOT / "tests" / "distributed" / "programs" / "short_of_memory.py"


def words(
    folder: Path, text: Path, stage: int, micro: int | str = 8, steps: int = STEPS, name: str = "out"
) -> list[str]:
    saving = {"every_steps": 2, "every_minutes": None, "keep_best": 0}
    tree = engine_json(stage=stage, batch=16, micro=micro, chatgot={"checkpoint": saving})
    more: dict[str, Any] = {"eval_every": 4, "sample_every": 5}
    config = write_run_yaml(folder / f"{name}.yaml", max_steps=steps, **more)
    return argv(write_json(folder / f"{name}.json", tree), folder / name, config, text)


def launch(launcher: list[str], folder: Path, plan: dict[str, list[Any]], line: list[str]) -> tuple[int, str]:
    """Exit code and output; DeepSpeed's ranks, which look at the name of their parent, are no forks."""
    count = folder / f"count-{line[-1].rpartition('/')[2]}-{len(list(folder.glob('count*')))}"
    count.mkdir()
    planned = {"SHORT_OF_MEMORY": json.dumps(plan), "SHORT_OF_MEMORY_COUNT": str(count)}
    if launcher[0].endswith("deepspeed"):
        planned["CHATGOT_TEST_COLD"] = "1"
    done = subprocess.run(
        [warm_python(), *launcher, *line],
        env=environment(**planned),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    return done.returncode, done.stdout + done.stderr


def uninterrupted(folder: Path, text: Path, stage: int) -> dict[int, float]:
    assert in_process.train(words(folder, text, stage, name="whole")) == 0
    return series(folder / "whole", "train/loss")


LAUNCH_RUN = [str(ROOT / "launch" / "run"), "--nproc", "2", "--script", str(PROGRAM), "--"]
JOURNEYS = {
    3: {"0": [1, "forward", 3], "1": [1, "evaluation", 4], "2": [0, "saving", 6]},
    1: {"0": [0, "backward", 1], "1": [1, "optimizer", 4], "2": [1, "sampling", 5]},
}
"""By stage and attempt: rank, place and step at which memory runs out; the micro-batch goes 8, 4, 2, 1."""


@pytest.mark.parametrize("stage", JOURNEYS)
def test_launch_run_starts_all_ranks_again_until_memory_is_enough(stage, tmp_path, text_file):
    code, output = launch(LAUNCH_RUN, tmp_path, JOURNEYS[stage], words(tmp_path, text_file, stage))
    assert code == 0, output[-4000:]
    assert output.count("all ranks start again with the smaller micro-batch") == 3
    for before, after in ((8, 4), (4, 2), (2, 1)):
        assert f"micro-batch {before} -> {after}" in output
    named = {
        "forward": "step 3",
        "backward": "step 1",
        "optimizer": "step 4",
        "evaluation": "the evaluation after step 4",
    }
    named |= {"sampling": "sampling after step 5", "saving": "saving at step 6"}
    for rank, place, _ in JOURNEYS[stage].values():
        assert f"{named[place]}: out of memory on rank {rank}" in output
    stored = json.loads((tmp_path / "out" / "micro_batch.json").read_text())
    assert (stored["micro_batch"], stored["json"]) == (1, 8)
    whole, found = uninterrupted(tmp_path, text_file, stage), series(tmp_path / "out", "train/loss")
    assert found.keys() == whole.keys()
    assert max(abs(found[step] / whole[step] - 1) for step in whole) < 1e-6
    assert not events(tmp_path / "out", "resume_differs")


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_another_launcher_ends_the_others_and_the_same_command_goes_on(launcher, tmp_path, text_file):
    here = Path(sys.executable).parent
    starts = {
        "deepspeed": [
            str(here / "deepspeed"),
            "--num_accelerators",
            "2",
            "--master_port",
            str(free_port()),
            str(PROGRAM),
        ],
        "torchrun": [str(here / "torchrun"), "--nproc_per_node", "2", "--master_port", str(free_port()), str(PROGRAM)],
    }
    line = words(tmp_path, text_file, stage=2, steps=4)
    code, output = launch(starts[launcher], tmp_path, {"0": [1, "forward", 3]}, line)
    assert code != 0
    assert "step 3: out of memory on rank 1" in output
    assert "micro-batch 8 -> 4" in output
    assert "run the same command again" in output
    assert tags(tmp_path / "out") == [2]
    run_ranks([str(ROOT / "launch" / "train.py"), *line], 2)
    assert tags(tmp_path / "out")[-1] == 4
    assert events(tmp_path / "out", "resumed")[-1]["step"] == 2


def run_out(monkeypatch: pytest.MonkeyPatch, line: list[str], error: BaseException | None = None) -> None:
    """One rank whose third forward pass finds no memory."""
    from chatgot.training import loop as loop_module

    with monkeypatch.context() as patch:
        train_step = loop_module.Loop._train_step  # the control below trains with the same patch

        def runs_out(self: loop_module.Loop) -> Any:
            if self.step == 2:
                self.watchdog.beat(doing="step 3")
                raise error or RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
            return train_step(self)

        patch.setattr(loop_module.Loop, "_train_step", runs_out)
        in_process.train(line)


@pytest.mark.parametrize(
    ("place", "code", "said"),
    [
        ("logits", 5, "sampling: logits after 1 tokens are not finite"),
        ("samples", 3, "chatgot: the tokens are gone"),
        ("bug", 1, "IndexError: list index out of range"),
        ("precision", 75, "the precision check: out of memory on rank 1"),
        ("build", 6, "building the engine: out of memory on rank 1"),
    ],
)
def test_what_fails_on_rank_1_alone_is_said_and_ends_both(place, code, said, tmp_path, text_file):
    precision = "bf16" if place == "precision" else "fp32"
    saving = {"every_steps": 1, "every_minutes": None, "keep_best": 0, "async": True}
    tree = engine_json(1, precision, batch=16, micro=8, chatgot={"checkpoint": saving})
    config = write_run_yaml(tmp_path / "run.yaml", max_steps=8, sample_every=3, eval_every=None)
    line = argv(write_json(tmp_path / "engine.json", tree), tmp_path / "out", config, text_file)
    ended, output = launch(LAUNCH_RUN, tmp_path, {"0": [1, place, 3]}, line)
    assert ended == (0 if place == "precision" else code), output[-4000:]
    assert said in output


def test_one_rank_ends_with_75_and_goes_on_with_half(tmp_path, text_file, monkeypatch, capsys):
    line = words(tmp_path, text_file, stage=0)
    with pytest.raises(RunAgainError, match=r"step 3: out of memory.*micro-batch 8 -> 4.*run the same command again"):
        run_out(monkeypatch, line)
    [event] = events(tmp_path / "out", "out_of_memory")
    assert (event["doing"], event["micro_batch"], event["exit_code"]) == ("step 3", 8, 75)
    assert not events(tmp_path / "out", "failed"), "its end is told once"
    assert in_process.train(line) == 0
    assert "micro-batch 4, accumulation 4: memory ran out with 8 (step 3)" in capsys.readouterr().out
    found, whole = series(tmp_path / "out", "train/loss"), uninterrupted(tmp_path, text_file, 0)
    assert max(abs(found[step] / whole[step] - 1) for step in whole) < 1e-6


def test_another_micro_batch_in_the_json_overrules_the_stored_one(tmp_path, text_file, monkeypatch, capsys):
    with pytest.raises(RunAgainError):
        run_out(monkeypatch, words(tmp_path, text_file, stage=0))
    assert in_process.train(words(tmp_path, text_file, 0, micro=16)) == 0
    assert "gradient_accumulation_steps = 1" in capsys.readouterr().out.replace('"', "").replace(": 1", " = 1")


def test_micro_batch_1_ends_with_6_and_says_what_needs_less(tmp_path, text_file, monkeypatch):
    with pytest.raises(MachineError, match=r"at micro-batch 1, the smallest.*activation_checkpointing"):
        run_out(monkeypatch, words(tmp_path, text_file, stage=1, micro=1))
    assert not (tmp_path / "out" / "micro_batch.json").exists()
    assert tags(tmp_path / "out") == [2]


def test_another_error_is_no_lack_of_memory(tmp_path, text_file, monkeypatch):
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run_out(monkeypatch, words(tmp_path, text_file, stage=0), RuntimeError("shapes do not match"))
    assert not (tmp_path / "out" / "micro_batch.json").exists()


def test_two_ranks_find_the_micro_batch_that_the_json_leaves_to_memory(tmp_path, text_file):
    line = words(tmp_path, text_file, stage=1, micro="auto", steps=2)
    run_ranks([str(ROOT / "launch" / "train.py"), *line], 2)
    assert json.loads((tmp_path / "out" / "micro_batch.json").read_text())["micro_batch"] == 8
