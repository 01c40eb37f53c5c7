"""The programs behind BENCHMARKS.md measure what they say; how fast this machine is asserts nothing."""

from __future__ import annotations

import subprocess

import pytest

from tests.support import ROOT, environment, warm_python, write_text

RECOMPUTED = (
    "off",
    "torch, every layer",
    "torch, every 2nd layer",
    "deepspeed, every layer",
    "deepspeed, every 2nd layer",
    "deepspeed, partition_activations",
    "deepspeed, contiguous_memory_optimization",
)


@pytest.fixture(scope="module")
def act_ckpt(tmp_path_factory: pytest.TempPathFactory) -> str:
    text = write_text(tmp_path_factory.mktemp("bench") / "text.txt")
    shape = ["--layers", "6", "--d_model", "64", "--max_seq_length", "64", "--batch", "4"]
    command = [
        warm_python(),
        "launch/bench.py",
        "--suite",
        "act_ckpt",
        *shape,
        "--turns",
        "1",
        "--turn_seconds",
        "0.001",
    ]
    done = subprocess.run(
        [*command, "--data", str(text)], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def cells(table: str) -> dict[tuple[str, str], list[float]]:
    """Kept MiB, kept / off, peak MiB, peak / off, by architecture and what is recomputed."""
    rows = [
        [cell.strip() for cell in line.strip("|\n ").split("|")]
        for line in table.splitlines()
        if line.startswith(("| modern", "| gpt2"))
    ]
    return {(row[0], row[1]): [float(cell) for cell in row[2:6]] for row in rows}


@pytest.mark.parametrize("architecture", ["modern", "gpt2"])
def test_act_ckpt_measures_what_every_way_to_recompute_saves(act_ckpt: str, architecture: str):
    rows = {recomputed: row for (which, recomputed), row in cells(act_ckpt).items() if which == architecture}
    assert tuple(rows) == RECOMPUTED
    inputs = 6 * 4 * 64 * 64 * 4 / 2**20  # of six blocks, in fp32
    for name, (kept, kept_ratio, _, peak_ratio) in rows.items():
        if name == "off":
            assert kept_ratio == peak_ratio == 1
        elif "2nd" in name:
            assert 0.4 <= kept_ratio <= 0.7, name
            assert peak_ratio < 0.85, name
        else:
            assert inputs <= kept, name
            assert kept_ratio <= 0.4, name
            assert peak_ratio < 0.85, name
    assert (
        len({row[0] for name, row in rows.items() if "every layer" in name or "_" in name}) == 1
    )  # wherever the inputs are kept


def test_act_ckpt_says_what_it_left_out_and_why(act_ckpt: str):
    assert (
        "left out: deepspeed, cpu_checkpointing: DeepSpeed's cpu_checkpointing fails on the CPU accelerator" in act_ckpt
    )


def test_copies_are_searched_for_in_every_kind_of_tokens():
    command = [warm_python(), "launch/bench.py", "--suite", "copies", "--megabytes", "1", "--rounds", "2"]
    done = subprocess.run(
        [*command, "--tokenizers", "char", "byte"], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [line.split("|")[1].strip() for line in done.stdout.splitlines()[4:]] == ["char", "byte"]


def test_sampling_is_held_against_transformers_on_the_same_weights(capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("transformers", reason="transformers is not installed: it needs Python 3.11")
    from chatgot.bench.speed import generate

    shape = ["--layers", "1", "--d_model", "16", "--n_head", "2", "--max_seq_length", "32", "--vocab_size", "30"]
    small = ["--prompt", "3", "--new_tokens", "4", "--batches", "1", "2", "--streams", "3", "--turns", "1"]
    for architecture in ("gpt2", "modern"):
        generate([*shape, *small, "--architecture", architecture])
        lines = capsys.readouterr().out.splitlines()
        assert [line for line in lines if "equal" in line] == [f"batch {n}: greedy tokens equal: True" for n in (1, 2)]
        names = [line.split("|")[2].strip() for line in lines if line.startswith("| ")][1:]
        assert names == [
            *("1 transformers", "1 chatgot", "2 transformers", "2 chatgot"),
            *("streams one by one", "streams at once"),
        ]
