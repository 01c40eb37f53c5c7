"""The speed of GPT-2's size class: the training program as a user starts it, and what its journal says."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from pathlib import Path

import pytest

from chatgot.devices import device_facts, peak_flops
from tests.gpu import program
from tests.gpu.machine import DRY_RUN
from tests.support import ROOT, live_metrics, write_text

pytestmark = pytest.mark.gpu

STEPS, WARM = (50, 20) if not DRY_RUN else (10, 4)
"""Steps up to WARM compile, allocate and warm up; they are left out of the medians."""
MICRO_BATCH = 32
SMALLER = ["model.d_model=64", "model.n_layers=2", "model.n_head=2", "model.d_hid=128", "model.max_seq_length=64"]
"""The large model in a dry run."""


@pytest.fixture(scope="module")
def long_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three megabytes, on which a first loss well above the last one is certain."""
    return write_text(tmp_path_factory.mktemp("long") / "long.txt", characters=100_000 if DRY_RUN else 3_000_000)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("preset", ["modern_124M", "gpt2_small"])
def test_tokens_per_second_of_the_124M_size_class(preset, compiled, device, tmp_path: Path, long_text: Path, record):
    """bf16, ZeRO-1, blocks of 1024 bytes. The byte vocabulary makes the model smaller than its name: its parameters are
    in the figures.
    """
    out = tmp_path / "run"
    micro = 2 if DRY_RUN else MICRO_BATCH
    arguments = program.argv(ROOT / "ds_configs" / "bf16_zero1.json", out, preset, long_text)
    overrides = [
        "data.tokenizer=byte",
        f"train.max_steps={STEPS}",
        f"train.log_every={2 if DRY_RUN else 5}",
        "train.eval_every=null",
        "train.sample_every=null",
        "train.sample_max_new_tokens=8",
        f"ds.train_batch_size={micro}",
        f"ds.train_micro_batch_size_per_gpu={micro}",
        "ds.wandb.enabled=false",
        "ds.chatgot.schedule.warmup_steps=10",
        "ds.chatgot.checkpoint.every_steps=null",
        "ds.chatgot.checkpoint.every_minutes=null",
        *(["ds.chatgot.compile.enabled=true"] if compiled else []),
        *(SMALLER if DRY_RUN else []),
    ]
    done = program.start(
        [str(ROOT / "launch" / "train.py"), *arguments, *overrides], OMP_NUM_THREADS="1" if DRY_RUN else "4"
    )
    rows = [row for row in live_metrics(out / "metrics.jsonl") if "train/loss" in row]
    manifest = json.loads((out / "checkpoints" / f"step-{STEPS:08d}" / "manifest.json").read_text())
    shutil.rmtree(out / "checkpoints")
    warm = [row for row in rows if row["step"] > WARM]
    parameters = re.search(r"\(([\d,]+)\), vocabulary", done.stdout + done.stderr)
    assert parameters is not None
    mfu = [row["perf/mfu"] for row in warm if row.get("perf/mfu") is not None]
    record(
        parameters=int(parameters.group(1).replace(",", "")),
        micro_batch=micro,
        block=manifest["model"]["max_seq_length"],
        tokens_per_sec=statistics.median(row["perf/tokens_per_sec"] for row in warm),
        step_ms=statistics.median(row["perf/step_ms"] for row in warm),
        mfu=statistics.median(mfu) if mfu else None,
        run_peak_gib=max(row["mem/peak_gib"] for row in rows),
        first_step_ms=rows[0]["perf/step_ms"],
        first_loss=rows[0]["train/loss"],
        last_loss=rows[-1]["train/loss"],
    )
    assert rows[-1]["step"] == STEPS
    assert len(warm) >= 3
    assert rows[-1]["train/loss"] < rows[0]["train/loss"] - 0.3
    assert rows[-1]["optim/skipped_steps"] == 0
    assert len(mfu) == (len(warm) if peak_flops(device_facts().name, "bf16") is not None else 0)
