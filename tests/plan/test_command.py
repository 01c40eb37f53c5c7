"""`chatgot plan` as it is used: what it prints, what it proposes, what it refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from chatgot.cli import main
from chatgot.plan.command import find_remedies, read_request
from chatgot.plan.estimate import slowness
from tests.support import ROOT, engine_json, write_json

PRESETS = ("tiny", "chatgot_small_14M_clean")
SHIPPED = sorted((ROOT / "ds_configs").glob("*.json"))


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of `chatgot plan`."""
    with pytest.raises(SystemExit) as end:
        main(["plan", *words])
    streams = capsys.readouterr()
    return int(end.value.code or 0), streams.out, streams.err


def test_a_slow_step_on_a_cpu_is_said_with_what_is_faster():
    said = {}
    for name in ("bf16_zero2", "fp32_zero0_muon"):
        for config in PRESETS:
            said[name, config] = slowness(read_request(ROOT / "ds_configs" / f"{name}.json", config, 1, "cpu").plan())
    assert said["fp32_zero0_muon", "tiny"] == said["bf16_zero2", "tiny"] == []
    [slow] = said["bf16_zero2", "chatgot_small_14M_clean"]
    assert re.fullmatch(
        r"a step of 8,192 tokens takes about \d+ s on this CPU, and longer in bf16, .*; faster: .*", slow
    )
    assert slowness(read_request(SHIPPED[0], "gpt2_xl", 1, "rtx4090").plan()) == []


def test_it_says_that_a_run_fits(capsys):
    code, out, _ = run(
        capsys, str(ROOT / "ds_configs" / "bf16_zero2.json"), "--config", "gpt2_small", "--world_size", "2"
    )
    assert code == 0
    assert "fits, " in out
    assert "cheapest changes" not in out
    assert "124,439,808 parameters, vocabulary 50257" in out


@pytest.mark.parametrize(
    ("name", "config", "world_size", "device"),
    [
        ("bf16_zero2", "gpt2_xl", 2, "rtx4090"),
        ("bf16_zero1", "modern_774M", 1, "rtx4090"),
        ("fp32_zero0", "gpt2_large", 4, "a10"),
        ("fp32_zero0_muon", "modern_350M", 1, "12GiB"),
    ],
)
def test_every_proposal_fits_when_it_is_planned_again(name, config, world_size, device):
    path = ROOT / "ds_configs" / f"{name}.json"
    request = read_request(path, config, world_size, device)
    current = request.plan()
    assert not current.fits
    remedies = find_remedies(request, current)
    assert remedies
    for remedy in remedies:
        again = read_request(path, config, world_size, device, remedy.words()).plan()
        assert again.fits, remedy.words()
        assert again.needed == remedy.plan.needed
        assert again.settings.micro_batch_size * again.settings.accumulation * world_size == (
            current.settings.micro_batch_size * current.settings.accumulation * world_size
        )
    rates = [remedy.speed_ratio for remedy in remedies if remedy.speed_ratio is not None]
    assert rates == sorted(rates, reverse=True)


def test_a_proposal_keeps_the_batch_where_the_json_gives_accumulation(tmp_path):
    tree = engine_json(stage=2, precision="bf16")
    del tree["train_batch_size"]
    tree.update(train_micro_batch_size_per_gpu=64, gradient_accumulation_steps=2)
    path = write_json(tmp_path / "engine.json", tree)
    request = read_request(path, "gpt2_small", 1, "rtx4090")
    current = request.plan()
    micro = [r for r in find_remedies(request, current) if "train_micro_batch_size_per_gpu" in r.overrides]
    assert micro
    for remedy in micro:
        assert remedy.plan.settings.micro_batch_size * remedy.plan.settings.accumulation == 128


def test_nothing_helps_says_so(capsys):
    code, out, _ = run(
        capsys, str(ROOT / "ds_configs" / "fp32_zero0_muon.json"), "--config", "modern_1558M", "--device", "1GiB"
    )
    assert code == 0
    assert "DOES NOT FIT" in out
    assert "no micro batch, recomputation, stage or offload makes it fit" in out


def test_json_has_the_parts_and_they_add_up(capsys):
    path = str(ROOT / "ds_configs" / "bf16_zero3_offload.json")
    code, out, _ = run(capsys, path, "--config", "modern_774M", "--device", "rtx4090", "--format", "json")
    found = json.loads(out)
    assert code == 0
    assert sum(found["parts"].values()) == found["peak"]
    assert found["needed"] == found["peak"] + found["margin"]
    assert found["parts"]["master_weights"] == found["parts"]["optimizer_states"] == 0
    assert found["offloaded"]["optimizer_states"] > 8 * found["parameters"]
    assert found["checkpoint"] >= 12 * found["parameters"]


def test_overrides_and_vocabulary_change_the_plan():
    path = ROOT / "ds_configs" / "bf16_zero1.json"
    plain = read_request(path, "tiny", 1, "h200").plan()
    deeper = read_request(path, "tiny", 1, "h200", ["model.n_layers=8", "ds.train_micro_batch_size_per_gpu=8"]).plan()
    wider = read_request(path, "tiny", 1, "h200", vocab_size=5000).plan()
    assert len(deeper.activations.blocks) == 8
    assert deeper.activations.block == 2 * plain.activations.block
    assert wider.activations.loss_peak == 50 * plain.activations.loss_peak


def test_the_sweep_has_a_line_for_every_shipped_json(capsys):
    code, out, _ = run(capsys, "--sweep", "--config", "gpt2_small", "--device", "rtx4090")
    assert code == 0
    for path in SHIPPED:
        [line] = [line for line in out.splitlines() if line.startswith(path.name + " ")]
        assert "yes" in line or "NO" in line
    code, out, _ = run(capsys, "--sweep", "--device", "cpu")
    [line] = [line for line in out.splitlines() if line.startswith("fp16_zero2.json")]
    assert "refused" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("ds_configs/nosuch.json",), "nosuch.json"),
        (("ds_configs/bf16_zero1.json", "--device", "h2000"), "no such device"),
        (("ds_configs/bf16_zero1.json", "--world_size", "0"), "at least 1"),
        (("ds_configs/bf16_zero1.json", "--vocab_size", "0"), "at least 1"),
        (("ds_configs/bf16_zero1.json", "--set", "ds.zero_optimization.stge=2"), "did you mean"),
        (("ds_configs/bf16_zero1.json", "--world_size", "3"), "train_batch_size"),
        ((), "which JSON"),
        (("ds_configs/bf16_zero1.json", "--sweep"), "no folder"),
    ],
)
def test_refusals(words, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, _, err = run(capsys, *words)
    assert code == 2
    assert message in err


def test_the_command_needs_no_torch():
    program = "import sys; sys.argv[1:] = ['plan', '--sweep', '--config', 'gpt2_small']\n"
    program += "from chatgot.cli import main\ntry:\n    main()\n"
    program += "finally:\n    assert not {'torch', 'deepspeed', 'numpy'} & sys.modules.keys()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
