"""Recomputation on the device: the same bits with both backends and every key of the section, and less memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from chatgot.model import gpt
from tests.gpu import machine
from tests.gpu.tiny import fp32_parameters, micro_batches, tiny_engine, train
from tests.support import TINY_MODEL

pytestmark = pytest.mark.gpu

DEEPSPEED = {"activation_checkpointing": {"backend": "deepspeed"}}
SECTIONS: dict[str, dict[str, Any]] = {
    "torch": {"activation_checkpointing": {}},
    "torch, every 2nd": {
        "activation_checkpointing": {},
        "chatgot": {"activation_checkpointing": {"every_n_layers": 2}},
    },
    "deepspeed": {"activation_checkpointing": {}, "chatgot": DEEPSPEED},
    "partition_activations": {"activation_checkpointing": {"partition_activations": True}},
    "cpu_checkpointing": {"activation_checkpointing": {"cpu_checkpointing": True}},
    "partition_activations and cpu_checkpointing": {
        "activation_checkpointing": {"partition_activations": True, "cpu_checkpointing": True}
    },
}
ENGINES = {
    "fp32-stage0": (0, "fp32"),
    "bf16-stage1": (1, "bf16"),
    "bf16-stage2": (2, "bf16"),
    "fp32-stage3": (3, "fp32"),
}
STEPS = 3
MODEL = {"dropout": 0.1, "n_layers": 3}


def outcome(folder: Path, device: torch.device, stage: int, precision: str, section: dict[str, Any]) -> dict[str, Any]:
    """Losses and weights of a few steps, the gradients before the first of them at stage 0, and how often a block
    ran.
    """
    with tiny_engine(folder, device, MODEL, stage=stage, precision=precision, **section) as engine:
        calls: list[int] = []
        for block in engine.engine.module.layers:
            block.register_forward_pre_hook(lambda *_: calls.append(1))
        trained = train(engine, device, STEPS)
        found = {
            "losses": trained.losses,
            "grad_norms": trained.grad_norms,
            "weights": fp32_parameters(engine),
            "calls": len(calls),
        }
        if stage == 0:
            [batch] = micro_batches(STEPS, device, TINY_MODEL["max_seq_length"], 4, 4)
            loss = engine.engine(*batch)
            engine.engine.backward(loss)
            found["gradients"] = {name: p.grad.cpu().clone() for name, p in engine.engine.module.named_parameters()}
    return found


@pytest.fixture(scope="module")
def without(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """The same trainings without recomputation, each done once."""
    done: dict[str, dict[str, Any]] = {}

    def of(name: str) -> dict[str, Any]:
        if name not in done:
            stage, precision = ENGINES[name]
            done[name] = outcome(tmp_path_factory.mktemp("without"), device, stage, precision, {})
        return done[name]

    return of


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("section", SECTIONS)
def test_recomputation_changes_no_bit_and_leaves_the_rotary_tables_alone(
    section, name, device, tmp_path, without, record, request, monkeypatch
):
    if "cpu_checkpointing" in section:
        request.getfixturevalue("cuda_only")
    expected = without(name)
    tables: list[tuple[tuple[Any, ...], gpt.Rope]] = []
    original = gpt.rope_tables

    def remembered(*arguments: Any) -> gpt.Rope:
        tables.append((arguments, original(*arguments)))
        return tables[-1][1]

    monkeypatch.setattr(gpt, "rope_tables", remembered)
    stage, precision = ENGINES[name]
    found = outcome(tmp_path, device, stage, precision, SECTIONS[section])

    per_forward = MODEL["n_layers"]
    forwards = expected["calls"] // per_forward
    recomputed = 2 if "every 2nd" in section else per_forward  # of three blocks, the first and the third
    difference = max(float((found["weights"][n] - w).abs().max()) for n, w in expected["weights"].items())
    record(
        loss=found["losses"][-1],
        weight_difference=difference,
        recomputed=(found["calls"] - expected["calls"]) / forwards,
    )
    assert found["calls"] == expected["calls"] + recomputed * forwards
    assert found["losses"] == expected["losses"]
    assert found["grad_norms"] == expected["grad_norms"]
    assert found["weights"].keys() == expected["weights"].keys()
    assert difference == 0
    for parameter, gradient in expected.get("gradients", {}).items():
        assert torch.equal(found["gradients"][parameter], gradient), parameter
    assert len(tables) >= forwards
    for arguments, kept in tables:
        for table, again in zip(kept, original(*arguments)):
            assert torch.equal(table, again)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("stage", range(4))
def test_recomputation_keeps_autocast(stage, device, tmp_path, record):
    """DeepSpeed's own checkpoint() would recompute in fp32; the JSON asks for nothing that only DeepSpeed does, so
    torch's is taken.
    """
    off = outcome(tmp_path, device, stage, "autocast_bf16", {})
    on = outcome(tmp_path, device, stage, "autocast_bf16", SECTIONS["torch"])
    record(loss=on["losses"][-1])
    assert on["losses"] == off["losses"]
    assert all(torch.equal(on["weights"][n], w) for n, w in off["weights"].items())


@pytest.mark.usefixtures("cuda_only")
def test_recomputation_needs_less_memory(device, tmp_path, record):
    shape = {"d_model": 256, "n_layers": 8, "n_head": 4, "d_hid": 704, "max_seq_length": 512}

    def peak_mib(section: dict[str, Any]) -> float:
        with tiny_engine(tmp_path, device, shape, stage=1, precision="bf16", micro=8, **section) as engine:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            [batch] = micro_batches(0, device, shape["max_seq_length"], 8, 8)
            engine.engine.backward(engine.engine(*batch))
            torch.cuda.synchronize()
            return (torch.cuda.max_memory_allocated() - before) / 2**20

    off = peak_mib({})
    peaks = {name: peak_mib(SECTIONS[name]) for name in ("torch", "deepspeed", "cpu_checkpointing")}
    record(off_mib=off, **{f"{name}_mib": peak for name, peak in peaks.items()})
    assert machine.KIND == "cuda"
    assert max(peaks.values()) < off
