"""A checkpoint with values that are not finite is worth nothing, and would push one that is worth something out of its
folder.
"""

from __future__ import annotations

from typing import Any

import torch

from chatgot.distributed import ControlGroup
from chatgot.engine.zero_view import named_state
from chatgot.errors import NumericsError


def refuse_non_finite(engine: Any, ranks: ControlGroup) -> None:
    """Look at this rank's weights, fp32 masters and moments, one reduction over all of them. Collective.

    What is on NVMe is not looked at: it is not in memory.

    Raises:
        NumericsError: on all ranks, naming the first parameter or the part of the state.
    """
    bad = None
    named = list(named_state(engine))
    by_kind: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for _, tensor in named:
        by_kind.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    # The largest magnitude of many tensors is NaN or inf exactly if an element is.
    largest = [torch.nn.utils.get_total_norm(tensors, norm_type=float("inf")) for tensors in by_kind.values()]
    if not all(bool(torch.isfinite(each)) for each in largest):
        bad = next(name for name, tensor in named if not bool(torch.isfinite(tensor).all()))
    error = None
    if bad is not None:
        error = NumericsError(
            f"step {engine.global_steps}: {bad} has values that are not finite, and such a state is never saved"
        )
    ranks.agree(error)
