"""What the configuration has to know of the device it will run on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DeviceFacts:
    """Found out by the engine, which may import torch; a check for another machine states them by hand."""

    kind: Literal["cpu", "cuda"]
    bf16: bool
    """Whether bfloat16 training is supported."""
    fp16: bool
    """Whether float16 training is supported."""
    name: str = ""
    """For messages: 'NVIDIA H100 80GB HBM3'."""
    certain: bool = True
    """False: a guess about another machine, so that what the device lacks is a warning and no refusal."""
