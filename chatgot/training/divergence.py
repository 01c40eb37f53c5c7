"""When a run has diverged, where it can go back to, and what was wrong with a skipped step. Knows no loop.

Every rank decides the same: counters and losses are shared already, as sums over ranks in fp64 of fp32 numbers, which
are exact whatever the order of the ranks.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chatgot.checkpoint import manifest
from chatgot.checkpoint.load import Found, examine, find
from chatgot.checkpoint.save import Saver
from chatgot.data.loader import Batch, TrainBatches
from chatgot.data.tokenizer import Tokenizer
from chatgot.deepspeed_json.settings import GuardConfig
from chatgot.devices import is_out_of_memory
from chatgot.distributed import ControlGroup
from chatgot.engine.precision_check import autocast
from chatgot.engine.step import TrainingEngine
from chatgot.errors import CheckpointError, NumericsError
from chatgot.proof.compare import KnownLoss

logger = logging.getLogger(__name__)

SPIKE_WINDOW = 50
"""Steps that a loss is compared with; before there are as many, none is a spike."""
TEXTS = 4
"""Samples of a skipped step whose text is journaled, those with the worst losses first."""
CHARACTERS = 200
"""Length of each of these texts."""


class Divergence(NamedTuple):
    """Why a run has diverged."""

    why: str
    first_step: int
    """The first step whose loss was bad: what has been saved from then on is suspect."""
    several: bool = False
    """The losses of several batches in a row were bad: what was saved right before is suspect, too."""
    spike_above: float | None = None
    """Nats above which a loss is a spike, where it was one."""


@dataclass
class Guard:
    """chatgot.guard at work: says why a run has diverged, and counts its rollbacks."""

    config: GuardConfig
    rollbacks: list[dict[str, Any]] = field(default_factory=list)
    """Of the whole run, in order: from_step, to_step, first_sample and samples that were left out, why."""
    _losses: deque[float] = field(default_factory=lambda: deque(maxlen=SPIKE_WINDOW))

    def divergence(self, step: int, skips_in_a_row: int, known: KnownLoss | None) -> Divergence | None:
        """Why the run has diverged, or None.

        Args:
            step: optimizer steps done.
            known: the step and loss that have become known since the last call; on a GPU they come a step late.
        """
        spike = self._spike(*known) if known is not None else None
        if skips_in_a_row >= self.config.max_consecutive_skips:
            why = (
                f"step {step}: loss or gradients were not finite for {skips_in_a_row} steps in a row "
                f"(chatgot.guard.max_consecutive_skips = {self.config.max_consecutive_skips})"
            )
            return Divergence(why, step - skips_in_a_row + 1, several=skips_in_a_row > 1)
        return spike

    def _spike(self, step: int, loss: float) -> Divergence | None:
        if not math.isfinite(loss):
            return None  # skipped, and counted as such
        limit = self.config.spike_zscore
        if limit is not None and len(self._losses) == SPIKE_WINDOW:
            mean, deviation = statistics.fmean(self._losses), statistics.pstdev(self._losses)
            above = mean + max(limit * deviation, self.config.spike_min_rise)
            if loss > above:
                why = (
                    f"step {step}: train/loss {loss:.4f} lies more than {limit:g} standard deviations "
                    f"({deviation:.4f}) above the mean of the {SPIKE_WINDOW} steps before it, {mean:.4f} "
                    f"(chatgot.guard.spike_zscore = {limit:g})"
                )
                return Divergence(why, step, spike_above=above)
        self._losses.append(loss)
        return None

    def checkpoint_to_go_back_to(self, found: Divergence, saver: Saver, ranks: ControlGroup) -> Found:
        """The newest good checkpoint, where a rollback is allowed. Nothing may be pending in `saver`. Collective.

        What was saved after the first bad loss is marked as suspect; and what was saved right before it, if more than
        that batch speaks against it: several in a row, the one after a rollback to it, or a person will look into it.

        Raises:
            NumericsError: on all ranks; the run shall stop, has no rollback left, or there is no checkpoint.
        """
        why, before = found.why, found.first_step - 1
        again = bool(self.rollbacks) and self.rollbacks[-1]["to_step"] == before
        since = before if found.several or again or self.config.on_diverge == "stop" else found.first_step
        ranks.on_rank_0(lambda: mark_suspects(saver, since, why))
        done, limit = len(self.rollbacks), self.config.max_rollbacks
        if self.config.on_diverge == "stop":
            why += "; chatgot.guard.on_diverge = stop"
        elif done >= limit:
            why += f", after {done} rollback(s); chatgot.guard.max_rollbacks = {limit}"
        elif (good := last_good(saver, ranks)[0]) is not None:
            return good
        raise stopped(f"{why}. Try a lower lr or tighter clipping", saver, ranks)

    def state(self, skips_in_a_row: int) -> dict[str, Any]:
        """For the client state of a checkpoint."""
        return {"skips_in_a_row": skips_in_a_row, "losses": list(self._losses), "rollbacks": list(self.rollbacks)}

    def restore(self, state: dict[str, Any] | None) -> int:
        """Counterpart of `state` (None: a checkpoint from before there was one); returns the skips in a row."""
        state = state or {"skips_in_a_row": 0, "losses": [], "rollbacks": []}
        self.rollbacks = list(state["rollbacks"])
        self._losses = deque(state["losses"], maxlen=SPIKE_WINDOW)
        return int(state["skips_in_a_row"])


def mark_suspects(saver: Saver, since_step: int, why: str) -> None:
    """Mark the checkpoints of steps from `since_step` on, so that none is taken unless by name. Rank 0 only."""
    path = saver.folder
    try:
        for checkpoint in examine(saver.folder, saver.damaged).good:
            if checkpoint.step >= since_step:
                path = saver.folder / checkpoint.tag
                saver.damaged.add(checkpoint.tag)
                manifest.mark_suspect(path, why)
                logger.warning(f"checkpoint {path} is suspect now, and used by name only")
    except (OSError, CheckpointError) as error:
        logger.warning(f"{path}: cannot be marked as suspect: {error}")


def last_good(saver: Saver, ranks: ControlGroup) -> tuple[Found | None, str]:
    """The newest good checkpoint of this run, and a word on it, also where there is none. Collective."""

    def look() -> tuple[Found | None, str]:
        try:
            good = find(saver.folder)
        except CheckpointError as error:
            logger.warning(str(error))
            return None, "there is no good checkpoint"
        return good, f"the last good checkpoint is {good.path}" if good is not None else "there is no checkpoint yet"

    return ranks.on_rank_0(look)


def stopped(why: str, saver: Saver, ranks: ControlGroup) -> NumericsError:
    """The error that ends the run, with the checkpoint that can be resumed. Collective."""
    error = NumericsError(f"{why}; {last_good(saver, ranks)[1]}")
    error.shared = True
    return error


def describe_spike(
    engine: TrainingEngine,
    batches: TrainBatches,
    tokenizer: Tokenizer,
    ranks: ControlGroup,
    found: Divergence,
    first_sample: int,
) -> dict[str, Any]:
    """The fields of the event `spike`: the losses of the batch's samples, computed again without dropout, which of them
    are spikes, and their texts. A few of many speak for garbage in the text, all of them for the weights. Collective.
    """
    assert found.spike_above is not None
    own, module = list[float](), engine.engine.module
    was_training = module.training
    module.eval()
    with torch.no_grad(), autocast(engine.config.precision, engine.device):
        for input_ids, targets in batches.micro_batches(first_sample):
            by_token = module(input_ids.to(engine.device), targets.to(engine.device), reduction="none")  # (B, T)
            own += by_token.mean(dim=1).tolist()
    module.train(was_training)
    shares = ranks.gather(dict(zip(batches.indices(first_sample).tolist(), own, strict=True)))
    losses: dict[int, float] = {index: value for share in shares for index, value in share.items()}
    outliers = sorted((index for index in losses if losses[index] > found.spike_above), key=lambda i: -losses[i])
    return {
        "step": found.first_step,
        "outliers": f"{len(outliers)} of {len(losses)} samples",
        "losses": dict(sorted(losses.items())),
        "texts": _texts(batches, tokenizer, outliers),
    }


def _texts(batches: TrainBatches, tokenizer: Tokenizer, samples: list[int]) -> dict[int, str]:
    """The beginnings of the first few."""
    return {one: tokenizer.decode(batches.tokens(one).tolist())[:CHARACTERS] for one in samples[:TEXTS]}


def diagnose(engine: TrainingEngine, micro_batches: Iterable[Batch]) -> tuple[list[float], bool]:
    """Compute this rank's share of a skipped batch again, without dropout. Collective.

    Averaged gradients do not tell whose they were. Weights, counters, random state and parameters' .grad stay: the
    engine's own backward would count and reduce, so gradients are asked of torch directly. Each is looked at as it
    comes and given up at once: at ZeRO 2-3 there is no room for all.

    Returns:
        The loss of each sample, in nats per token, and whether this rank's own gradients are finite.
    """
    module, device = engine.engine.module, engine.device
    losses: list[float] = []
    finite: list[Tensor] = []

    def look(gradient: Tensor) -> Tensor:
        finite.append(torch.isfinite(gradient).all())
        return gradient.new_zeros(()).expand_as(gradient)  # takes no memory

    parameters = [p for p in module.parameters() if p.requires_grad]
    hooks = [parameter.register_hook(look) for parameter in parameters]
    was_training = module.training
    module.eval()
    try:
        for input_ids, targets in micro_batches:
            with autocast(engine.config.precision, device):
                by_token = module(input_ids.to(device), targets.to(device), reduction="none")  # (B, T)
            losses += by_token.detach().mean(dim=1).tolist()
            torch.autograd.grad(by_token.mean(), parameters, allow_unused=True)
    finally:
        module.train(was_training)
        for hook in hooks:
            hook.remove()
    return losses, all(map(bool, finite))


def describe_skip(
    engine: TrainingEngine,
    batches: TrainBatches,
    tokenizer: Tokenizer,
    ranks: ControlGroup,
    step: int,
    loss: Tensor,
    first_sample: int,
    fits: bool,
) -> dict[str, Any]:
    """The fields of the event `skipped_step`: which ranks, samples, texts and layers a step was skipped for.

    Collective: the batch is computed again, but for the steps of fp16's search for a loss scale. Fields: ranks whose
    loss (in the step itself) or own gradients (computed again) were not finite; repeated, whether the second time found
    anything; losses and texts by sample index; layer_grad_norms of the averaged gradients that were thrown away;
    out_of_memory, the ranks on which memory ended this look, which costs no run. At ZeRO 3, where they could not end it
    alone, it is not taken unless the run `fits` by its plan: not_computed_again says so.

    Args:
        loss: this rank's, of the step.
        first_sample: of the step's global batch.
    """
    common: dict[str, Any] = {
        "step": step,
        "loss_scale": engine.loss_scale,
        "skipped_steps": engine.engine.skipped_steps,
        "in_a_row": engine.skips_in_a_row,
    }
    if engine.skips_in_a_row == 0:
        return {"searches_loss_scale": True, **common}
    if engine.config.zero_stage == 3 and not fits:
        why = "chatgot plan says that memory may not be enough, and at ZeRO 3 that would end the run"
        return {**common, "not_computed_again": why, "layer_grad_norms": engine.layer_grad_norms}
    own_losses, gradients_finite, ran_out = list[float](), True, False
    try:
        own_losses, gradients_finite = diagnose(engine, batches.micro_batches(first_sample))
    except (RuntimeError, MemoryError) as error:
        if engine.config.zero_stage == 3 or not is_out_of_memory(error):
            raise
        ran_out = True
        logger.warning(f"step {step}: memory ran out in a second look at the skipped batch ({error}); training goes on")
    by_index = dict(zip(batches.indices(first_sample).tolist(), own_losses))
    shares = ranks.gather((math.isfinite(float(loss)), gradients_finite, by_index, ran_out))
    losses: dict[int, float] = {index: value for share in shares for index, value in share[2].items()}
    worst = sorted(losses, key=lambda index: (math.isfinite(losses[index]), -losses[index], index))
    finite = [gradients_fine and all(map(math.isfinite, values.values())) for _, gradients_fine, values, _ in shares]
    out_of_memory = [rank for rank, share in enumerate(shares) if share[3]]
    return {
        **common,
        **({"out_of_memory": out_of_memory} if out_of_memory else {}),
        "ranks": [rank for rank, share in enumerate(shares) if not all(share[:2])],
        "repeated": not all(finite),
        "first_sample": first_sample,
        "losses": dict(sorted(losses.items())),
        "layer_grad_norms": engine.layer_grad_norms,
        "texts": _texts(batches, tokenizer, worst),
    }
