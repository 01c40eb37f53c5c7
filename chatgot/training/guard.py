"""When a run has diverged. Every rank decides the same: from counters and losses that all of them share already."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from chatgot.deepspeed_json.chatgot_section import GuardConfig

SPIKE_WINDOW = 50
"""Steps that a loss is compared with; before there are as many, none is a spike."""


@dataclass
class Guard:
    """chatgot.guard at work.

    The losses are sums over ranks in fp64 of fp32 numbers: exact whatever the order of the ranks, so that all of them
    see the same bits.
    """

    config: GuardConfig
    rollbacks: list[dict[str, Any]] = field(default_factory=list)
    """Of the whole run, in order: from_step, to_step, first_sample and samples that were left out, why."""
    _losses: deque[float] = field(default_factory=lambda: deque(maxlen=SPIKE_WINDOW))

    def divergence(self, step: int, skips_in_a_row: int, losses: Iterable[tuple[int, float]]) -> str | None:
        """Why the run has diverged, or None.

        Args:
            step: optimizer steps done.
            losses: (step, mean over ranks) of the steps whose losses have become known since the last call; on a GPU
                they come a step late.
        """
        spike = None
        for at, loss in losses:
            spike = spike or self._spike(at, loss)
        if skips_in_a_row >= self.config.max_consecutive_skips:
            return (
                f"step {step}: loss or gradients were not finite for {skips_in_a_row} steps in a row "
                f"(chatgot.guard.max_consecutive_skips = {self.config.max_consecutive_skips})"
            )
        return spike

    def _spike(self, step: int, loss: float) -> str | None:
        if not math.isfinite(loss):
            return None  # skipped, and counted as such
        limit = self.config.spike_zscore
        if limit is not None and len(self._losses) == SPIKE_WINDOW:
            mean, deviation = statistics.fmean(self._losses), statistics.pstdev(self._losses)
            if loss > mean + limit * deviation:
                return (
                    f"step {step}: train/loss {loss:.4f} lies more than {limit:g} standard deviations "
                    f"({deviation:.4f}) above the mean of "
                    f"the {SPIKE_WINDOW} steps before it, {mean:.4f} (chatgot.guard.spike_zscore = {limit:g})"
                )
        self._losses.append(loss)
        return None

    def state(self, skips_in_a_row: int) -> dict[str, Any]:
        """For the client state of a checkpoint."""
        return {
            "skips_in_a_row": skips_in_a_row,
            "losses": list(self._losses),
            "rollbacks": [dict(one) for one in self.rollbacks],
        }

    def restore(self, state: dict[str, Any] | None) -> int:
        """Counterpart of `state` (None: a checkpoint from before there was one); returns the skips in a row."""
        state = state or {"skips_in_a_row": 0, "losses": [], "rollbacks": []}
        self.rollbacks = [dict(one) for one in state["rollbacks"]]
        self._losses = deque(state["losses"], maxlen=SPIKE_WINDOW)
        return int(state["skips_in_a_row"])
