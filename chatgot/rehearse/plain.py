"""The same training as a plain PyTorch loop on one device: what a rehearsed run's losses are held against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from chatgot.config.run import RunConfig
from chatgot.data.loader import DataOrder, TrainBatches
from chatgot.data.prepared import PreparedData
from chatgot.deepspeed_json.resolve import EngineConfig
from chatgot.engine.optimizer import parameter_groups, schedule_factor, weight_decay
from chatgot.model.gpt import GPT

BOUNDS = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}
"""Largest relative difference of a loss: roundings of 30 steps, in 16 bit those of the weights too."""


def no_plain_loop(config: EngineConfig) -> str | None:
    """Why there is no plain loop of a JSON's training; None: there is one."""
    kind = "none" if config.optimizer is None else config.optimizer.type
    if kind.lower() not in ("adam", "adamw", "sgd"):
        return f"optimizer {kind}, whose update is DeepSpeed's own"
    if config.scheduler is not None:
        return f"scheduler {config.scheduler.get('type')}, whose rates are DeepSpeed's own"
    if str(config.deepspeed.get("gradient_allreduce_op", "mean")).lower() == "sum":
        return 'gradient_allreduce_op "sum", which depends on the number of ranks'
    return None


def plain_losses(config: RunConfig, engine: EngineConfig, data: PreparedData, steps: int) -> list[float]:
    """Loss of each of the first `steps` optimizer steps, in nats per token, on the CPU in fp32 without DeepSpeed."""
    model = GPT(config.model, data.tokenizer.vocab_size)
    model.init_weights(config.train.seed)
    optimizer = _optimizer(model, engine)
    peaks = [group["lr"] for group in optimizer.param_groups]
    order = DataOrder(len(data.train), config.model.max_seq_length, config.train.seed)
    batch = engine.train_batch_size
    batches = TrainBatches(data.train, order, batch, engine.micro_batch_size, rank=0, world_size=1)
    losses = []
    for step in range(steps):
        if (schedule := engine.chatgot.schedule) is not None:
            factor = schedule_factor(step, config.train.max_steps, schedule)
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = factor * peak
        total = 0.0
        for input_ids, targets in batches.micro_batches(step * batch):
            loss = model(input_ids, targets)
            (loss / batches.accumulation).backward()
            total += loss.item() / batches.accumulation
        if engine.gradient_clipping:
            torch.nn.utils.clip_grad_norm_(model.parameters(), engine.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def deviation(plain: Sequence[float], run: Sequence[float]) -> tuple[float, int]:
    """Largest relative difference of two runs' losses, and the step of it, counted from 1; not a number is infinite."""
    relative = [abs(one - other) / abs(one) for one, other in zip(plain, run, strict=True)]
    relative = [value if value == value else float("inf") for value in relative]
    largest = max(relative)
    return largest, relative.index(largest) + 1


def _optimizer(model: GPT, engine: EngineConfig) -> torch.optim.Optimizer:
    """torch's own, not fused, from what the JSON's section says of it."""
    assert engine.optimizer is not None
    params, kind = engine.optimizer.params, engine.optimizer.type.lower()
    known = ("lr", "betas", "eps", "amsgrad") if kind != "sgd" else ("lr", "momentum", "dampening", "nesterov")
    used: dict[str, Any] = {
        name: tuple(params[name]) if name == "betas" else params[name] for name in known if name in params
    }
    if kind == "sgd":
        return torch.optim.SGD(parameter_groups(model, weight_decay(engine)), **used)
    coupled = kind == "adam" and params.get("adam_w_mode") is False
    kind_of = torch.optim.Adam if coupled else torch.optim.AdamW
    return kind_of(parameter_groups(model, weight_decay(engine)), **used)
