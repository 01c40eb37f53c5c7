"""Samples that a model cannot bear: its loss on them is not finite, or too high, as often as it is computed."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

import torch

from chatgot.data.loader import Batch
from chatgot.training.loop import Loop


class Poison:
    """Multiplies the loss of the steps whose global batch begins at one of `samples`, on one rank."""

    def __init__(self, loop: Loop, samples: Collection[int], factor: float = math.nan, rank: int = 0) -> None:
        self.samples, self.factor = samples, factor
        self.fed: list[int] = []
        """First sample of every batch that was asked for."""
        self._batches = loop.train_batches.micro_batches
        loop.train_batches.micro_batches = self.micro_batches
        if loop.ranks.rank == rank:
            loop.engine.engine.module.register_forward_hook(self.hook)

    def micro_batches(self, first_sample: int) -> Iterator[Batch]:
        """In place of TrainBatches'."""
        self.fed.append(first_sample)
        return self._batches(first_sample)

    def hook(self, module: torch.nn.Module, _arguments: object, loss: torch.Tensor) -> torch.Tensor:
        """Evaluation is spared; a skipped batch that is looked at again, with gradients, is not."""
        bad = torch.is_grad_enabled() and self.fed[-1] in self.samples
        return loss * self.factor if bad else loss
