"""Reading a checkpoint's pickles without running code: tensors, plain containers and the few classes below, nothing
else.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def weights_only() -> Iterator[None]:
    """Within it every torch.load is restricted, also those of DeepSpeed, which ask for the opposite
    (weights_only=False).

    torch's own switch for that is an environment variable (torch/serialization.py, load). The classes are those that
    DeepSpeed 0.19.8 puts into its optimizer files; none of them does anything when it is made.
    """
    import torch
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def read(path: Path) -> dict[str, Any]:
    """One file of a checkpoint. Its tensors are on the CPU and memory-mapped: their elements are read from the file
    when they are used.

    Only torch's zip format can be mapped; with checkpoint.checkpoint_serialization = false in the JSON, DeepSpeed
    writes the older one, which is read as a whole.
    """
    import torch

    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"  # as torch/serialization.py, _is_zipfile
    with weights_only():
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def explained(error: Exception) -> str:
    """What went wrong, without torch's advice to load the file with weights_only=False."""
    message = str(error)
    if "weights_only" in message or "Weights only" in message:
        name = re.search(r"(?:GLOBAL|class|function|global) ([\w.]+)", message)
        what = f" ({name.group(1)})" if name else f": {message.splitlines()[-1]}"
        return f"refused: it holds more than tensors and plain values{what}; a checkpoint never needs that, and loading it could run code"
    return f"{type(error).__name__}: {message}"
