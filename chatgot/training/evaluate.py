"""The loss over a whole held-out split."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from chatgot.data.loader import IGNORE_INDEX


@dataclass(frozen=True)
class Evaluation:
    """Mean over every target token of the split, all ranks."""

    loss: float
    """Nats per token."""
    tokens: int

    def bits_per_char(self, characters_per_token: float) -> float:
        """The same, per character of text."""
        return self.loss / math.log(2) / characters_per_token


def evaluate(engine, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], device: torch.device) -> Evaluation:
    """Token-weighted loss over `batches`, summed over ranks. Collective: every rank must have as many batches (ZeRO-3
    gathers in forward).

    Leaves training mode and the random state as they were: nothing is drawn in evaluation mode.
    """
    was_training = engine.training
    engine.eval()
    total = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for input_ids, targets in batches:
            loss = engine(input_ids.to(device), targets.to(device), reduction="sum")
            total += torch.tensor([float(loss), int((targets != IGNORE_INDEX).sum())], dtype=torch.float64)
    if dist.get_world_size() > 1:
        shared = total.to(device)
        dist.all_reduce(shared)
        total = shared.cpu()
    engine.train(was_training)
    return Evaluation(float(total[0] / total[1]), int(total[1]))
