"""The tiny GPT on the device: through the engine, and in a plain PyTorch loop."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from chatgot.checkpoint import rng
from chatgot.config.run import ModelConfig
from chatgot.data.loader import DataOrder, TrainBatches
from chatgot.devices import device_facts
from chatgot.engine.build import build
from chatgot.engine.optimizer import schedule_factor
from chatgot.engine.step import TrainingEngine
from chatgot.model.gpt import GPT
from chatgot.model.shapes import count_parameters
from tests.distributed.programs.plain import tokens
from tests.gpu.machine import KIND
from tests.support import TINY_MODEL, engine_json, read_engine_config, write_json

VOCABULARY = 64
BATCH = 8
LR = 3e-3
CLIP = 0.1
"""Below the norm of every step's gradients, so that clipping is seen to work."""
ADAMW: dict[str, Any] = {
    "type": "AdamW",
    "params": {"lr": LR, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "torch_adam": True, "fused": True},
}


@dataclass
class Trained:
    """What a run of some steps gave, one entry per step."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float | None] = field(default_factory=list)
    loss_scales: list[float | None] = field(default_factory=list)
    """After the step."""
    applied: list[bool] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)


def model_config(**changes: Any) -> ModelConfig:
    return ModelConfig(**{**TINY_MODEL, **changes})


def json_tree(offload_param: bool = False, zero: dict[str, Any] | None = None, **case: Any) -> dict[str, Any]:
    """engine_json with torch's fused AdamW, and with pinned memory where there is a CUDA device to copy to."""
    usual: dict[str, Any] = {"optimizer": ADAMW, "batch": BATCH, "micro": BATCH // 2, "gradient_clipping": CLIP}
    tree = engine_json(**{**usual, **case})
    section = tree["zero_optimization"]
    section.update(zero or {})
    if offload_param:
        section["offload_param"] = {"device": "cpu"}
    for name in ("offload_optimizer", "offload_param"):
        if name in section:
            section[name]["pin_memory"] = KIND == "cuda"
    return tree


@contextlib.contextmanager
def tiny_engine(
    folder: Path, device: torch.device, model: dict[str, Any] | None = None, **case: Any
) -> Iterator[TrainingEngine]:
    """An engine on the tiny model with its seeded weights; gone afterwards."""
    shape = model_config(**(model or {}))
    path = write_json(folder / "engine.json", json_tree(**case))
    config = read_engine_config(
        str(path), {}, world_size=1, facts=device_facts(), n_params=count_parameters(shape, VOCABULARY)
    )
    net = GPT(shape, VOCABULARY)
    rng.seed(1, 0)
    net.init_weights(1)
    engine = build(net, config, device)
    try:
        yield engine
    finally:
        engine.engine.destroy()


def micro_batches(
    step: int, device: torch.device, block: int, batch: int, micro: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The micro batches of one optimizer step, on the device."""
    batches = TrainBatches(tokens(), DataOrder(len(tokens()), block, seed=1), batch, micro, 0, 1)
    for input_ids, targets in batches.micro_batches(step * batch):
        yield input_ids.to(device), targets.to(device)


def train(
    engine: TrainingEngine, device: torch.device, steps: int, total: int | None = None, block: int | None = None
) -> Trained:
    """Train from the engine's step on, for `steps` steps of a schedule over `total` (default: `steps`)."""
    config, found = engine.config, Trained()
    assert config.chatgot.schedule is not None
    for _ in range(steps):
        step = engine.engine.global_steps
        engine.set_learning_rate(schedule_factor(step, total or steps, config.chatgot.schedule))
        loss = engine.train_step(
            micro_batches(
                step, device, block or TINY_MODEL["max_seq_length"], config.train_batch_size, config.micro_batch_size
            )
        )
        found.losses.append(float(loss))
        found.grad_norms.append(engine.grad_norm)
        found.loss_scales.append(engine.loss_scale)
        found.applied.append(engine.engine.was_step_applied())
        found.lrs.append(engine.learning_rate)
    return found


def plain_losses(device: torch.device, steps: int, max_norm: float = CLIP, lr: float = LR) -> list[float]:
    """The same training in fp32 without DeepSpeed and without chatgot.engine: the whole batch at once, the schedule
    written out.
    """
    net = GPT(model_config(), VOCABULARY)
    net.init_weights(1)
    net.to(device)
    groups = [
        {"params": [p for p in net.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in net.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for step in range(steps):
        rate = (step + 1) / 2 if step < 2 else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 2) / (steps - 3)))
        for group in optimizer.param_groups:
            group["lr"] = lr * rate
        [(input_ids, targets)] = micro_batches(step, device, TINY_MODEL["max_seq_length"], BATCH, BATCH)
        loss = net(input_ids, targets)
        loss.backward()
        if max_norm:
            torch.nn.utils.clip_grad_norm_(net.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def worst(losses: list[float], reference: list[float]) -> float:
    """Largest relative difference; nan where a loss is."""
    differences = [abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True)]
    return math.nan if any(math.isnan(d) for d in differences) else max(differences)


def fp32_parameters(engine: TrainingEngine) -> dict[str, torch.Tensor]:
    """The fp32 weights by name, on the CPU, whatever the stage."""
    from deepspeed.utils import safe_get_full_fp32_param

    named = engine.engine.module.named_parameters()
    if engine.config.zero_stage == 0:
        return {name: p.detach().float().cpu().clone() for name, p in named}
    found = {name: safe_get_full_fp32_param(p) for name, p in named}
    return {name: weight.detach().float().cpu().clone() for name, weight in found.items() if weight is not None}
