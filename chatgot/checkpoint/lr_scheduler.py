"""A stock `scheduler` section across a resume: where it was, at the rates that the JSON says now."""

from __future__ import annotations

import warnings
from typing import Any


def moved(engine: Any) -> set[str]:
    """Keys of an optimizer group that some schedule sets, so that their saved values say nothing about the JSON's."""
    momentum = {"betas", "momentum"} if getattr(engine.lr_scheduler, "cycle_momentum", False) else set()
    return {"lr", "initial_lr"} | momentum


def go_on(engine: Any) -> None:
    """Bring a new engine's scheduler, if it has one, to the step that the engine has been brought to.

    It is stepped as often as the optimizer has been. Its saved state is not used: torch's schedulers keep the JSON's
    numbers in it, so that it would undo a change of them, and go on from the optimizer's rate, which is the JSON's
    after a resume; DeepSpeed's own set the rate only after the next step.
    """
    if engine.lr_scheduler is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch expects a step of the optimizer before
        for _ in range(engine.global_steps - engine.skipped_steps):
            engine.lr_scheduler.step()
