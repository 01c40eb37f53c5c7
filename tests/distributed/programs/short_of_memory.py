"""train.py on a rank whose memory is not enough at planned places; started by a launcher in train.py's place.

The plan is $SHORT_OF_MEMORY: {"0": [rank, place, step], ...} by attempt, counted in a file in $SHORT_OF_MEMORY_COUNT.
Places: forward, backward, optimizer, evaluation, sampling, saving; before the first step: precision, build. Others
fail for other reasons than memory: logits (of a sample, not finite), samples (a DataError), bug (an IndexError).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from chatgot import cli
from chatgot.errors import DataError
from chatgot.training import evaluation, run, saving
from chatgot.training import loop as loop_module

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def once(
    function: Callable[..., Any], due: Callable[[], bool] = lambda: True, error: Exception = OUT_OF_MEMORY
) -> Callable[..., Any]:
    """Call `function`, or run out of memory, or into another error, if it is due."""

    def called(*args: Any, **kwargs: Any) -> Any:
        if due():
            raise error
        return function(*args, **kwargs)

    return called


def plant(place: str, step: int) -> None:
    """Have memory run out in this process, at this place, when the optimizer step of this number is made or over."""
    prepared = run.prepare_run
    if place == "precision":
        run.check_precision = once(run.check_precision)
    elif place == "build":
        run.build = once(run.build)

    def prepare_run(*args: Any, **kwargs: Any) -> loop_module.Loop:
        loop = prepared(*args, **kwargs)
        engine = loop.engine.engine
        makes = lambda: loop.step + 1 >= step  # noqa: E731
        made = lambda: loop.step >= step  # noqa: E731
        if place == "forward":
            engine.module.forward = once(engine.module.forward, lambda: makes() and engine.module.training)
        elif place == "backward":
            engine.backward = once(engine.backward, makes)
        elif place == "optimizer":
            engine.step = once(engine.step, makes)
        elif place == "evaluation":
            evaluation.evaluate = once(evaluation.evaluate, made)
        elif place == "sampling":
            evaluation.draw = once(evaluation.draw, made)
        elif place == "logits":
            engine.module.register_forward_hook(
                lambda module, inputs, output: output if module.training or not made() else output * float("nan")
            )
        elif place == "samples":
            batches = loop.train_batches
            batches.indices = once(batches.indices, makes, DataError("the tokens are gone"))
        elif place == "bug":
            engine.step = once(engine.step, makes, IndexError("list index out of range"))
        elif place == "saving":
            saving.Saver.begin = once(saving.Saver.begin, made)
        return loop

    run.prepare_run = prepare_run


if __name__ == "__main__":
    plan = json.loads(os.environ["SHORT_OF_MEMORY"])
    count = Path(os.environ["SHORT_OF_MEMORY_COUNT"]) / os.environ["RANK"]
    attempt = int(count.read_text()) if count.exists() else 0
    count.write_text(str(attempt + 1))
    planned = plan.get(str(attempt))
    if planned is not None and str(planned[0]) == os.environ["RANK"]:
        plant(*planned[1:])
    cli.train(sys.argv[1:])
