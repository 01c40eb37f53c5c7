"""python launch/bench.py --suite SUITE: the figures of BENCHMARKS.md; --help names the suites."""

import argparse
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, installed or not

from chatgot.version import __version__

SUITES = {
    "train": ("speed", "the whole program against a plain PyTorch loop of the same model, interleaved"),
    "checkpoint": ("checkpoint", "saving and loading against torch.save and the disk, and the stall of training"),
    "act_ckpt": ("memory", "activation checkpointing: bytes kept for backward, peak memory and step time of every way"),
    "plan": ("memory", "the memory that `chatgot plan` predicts against what runs take, on a grid of configurations"),
    "generate": ("speed", "sampling against transformers' generate, and many streams at once against one by one"),
    "prepare": ("text", "text to tokens: MB/s and peak memory against a list comprehension"),
    "launch": ("speed", "the launchers' thread settings at two ranks, and what the heartbeat costs"),
    "copies": ("text", "what a sample has verbatim from its training text, found in 100 MB"),
}
"""Suite -> its module, and what it measures."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure ChatGoT.",
        epilog="suites: "
        + "; ".join(f"{name}: {what}" for name, (_, what) in SUITES.items())
        + ". What follows belongs to the suite.",
    )
    parser.add_argument("--version", action="version", version=f"chatgot {__version__}")
    parser.add_argument("--suite", required=True, choices=list(SUITES))
    arguments, rest = parser.parse_known_args()
    module = importlib.import_module(f"chatgot.bench.{SUITES[arguments.suite][0]}")
    getattr(module, arguments.suite)(rest)


if __name__ == "__main__":
    main()
