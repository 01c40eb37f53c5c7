"""The journal's account of a step that was skipped: which ranks, which text, which samples, which layers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from chatgot.engine.step import diagnose

if TYPE_CHECKING:
    from chatgot.training.loop import Loop

TEXTS = 4
"""Samples whose text is journaled, those with the worst losses first."""
CHARACTERS = 200
"""Of each text."""


def report(loop: Loop, step: int, loss: torch.Tensor, first_sample: int) -> None:
    """Write the event `skipped_step`. Collective: the batch is computed again, but for the steps of fp16's search for a
    loss scale.

    Fields: ranks whose loss (in the step itself) or own gradients (computed again) were not finite; repeated, whether
        the second time
    found anything; losses by sample index; layer_grad_norms of the averaged gradients that were thrown away; texts by
    sample index.

    Args:
        loss: this rank's, of the step.
        first_sample: of the step's global batch.
    """
    engine, batches = loop.engine, loop.train_batches
    common: dict[str, Any] = {
        "step": step,
        "loss_scale": engine.loss_scale,
        "skipped_steps": engine.engine.skipped_steps,
        "in_a_row": engine.skips_in_a_row,
    }
    if engine.skips_in_a_row == 0:
        loop.records.event("skipped_step", searches_loss_scale=True, **common)
        return
    trained_on = batches.batch_hash
    with loop.meter.paused("diagnose"):
        diagnosis = diagnose(
            engine, ((x.to(loop.device), y.to(loop.device)) for x, y in batches.micro_batches(first_sample))
        )
    batches.batch_hash = trained_on
    indices = batches.indices(first_sample).tolist()
    mine = (math.isfinite(float(loss)), diagnosis.gradients_finite, dict(zip(indices, diagnosis.losses, strict=True)))
    shares = loop.ranks.gather(mine)
    if loop.records.events is None:
        return
    losses = {index: value for share in shares for index, value in share[2].items()}
    worst = sorted(losses, key=lambda index: (math.isfinite(losses[index]), -losses[index], index))[:TEXTS]
    tokenizer = loop.data.tokenizer
    loop.records.event(
        "skipped_step",
        **common,
        ranks=[
            rank for rank, (loss_fine, gradients_fine, _) in enumerate(shares) if not (loss_fine and gradients_fine)
        ],
        repeated=not all(
            gradients_fine and all(map(math.isfinite, found.values())) for _, gradients_fine, found in shares
        ),
        first_sample=first_sample,
        losses=dict(sorted(losses.items())),
        layer_grad_norms=engine.layer_grad_norms,
        texts={index: tokenizer.decode(batches.tokens(index).tolist())[:CHARACTERS] for index in worst},
    )
