"""The same training as a plain PyTorch loop, without DeepSpeed and without chatgot.engine: the reference."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch

from chatgot.config.run import ModelConfig
from chatgot.data.loader import DataOrder, TrainBatches
from chatgot.model.gpt import GPT
from tests.support import TINY_MODEL


@functools.cache
def tokens() -> np.ndarray:
    """A learnable sequence over 64 symbols."""
    draw = np.random.default_rng(0)
    return ((np.arange(6000) * 7 % 61 + draw.integers(0, 3, 6000)) % 64).astype(np.uint8)


def plain_losses(
    steps: int, batch: int, lr: float = 3e-3, model: dict | None = None, max_norm: float = 1.0
) -> list[float]:
    """Losses of `steps` AdamW steps over the whole global batch at once."""
    net = GPT(ModelConfig(**{**TINY_MODEL, **(model or {})}), 64)
    net.init_weights(1)
    groups = [
        {"params": [p for p in net.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in net.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8)
    order = DataOrder(len(tokens()), TINY_MODEL["max_seq_length"], seed=1)
    batches = TrainBatches(tokens(), order, batch, batch, 0, 1)
    losses = []
    for step in range(steps):
        warm = 2
        rate = (
            (step + 1) / warm
            if step < warm
            else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - 1 - warm)))
        )
        for group in optimizer.param_groups:
            group["lr"] = lr * rate
        [(input_ids, targets)] = batches.micro_batches(step * batch)
        loss = net(input_ids, targets)
        loss.backward()
        if max_norm:
            torch.nn.utils.clip_grad_norm_(net.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses
