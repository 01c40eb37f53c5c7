"""python launch/bench.py --suite train | prepare: the figures of BENCHMARKS.md."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, installed or not

SUITES = {
    "train": "the whole program against a plain PyTorch loop of the same model, interleaved",
    "prepare": "text to tokens: MB/s and peak memory against a list comprehension",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure ChatGoT.",
        epilog="suites: " + "; ".join(f"{name}: {what}" for name, what in SUITES.items()) + ". What follows belongs to the suite.",
    )
    parser.add_argument("--suite", required=True, choices=list(SUITES))
    arguments, rest = parser.parse_known_args()
    if arguments.suite == "train":
        from chatgot.bench.train import main as suite
    else:
        from chatgot.bench.prepare import main as suite
    sys.exit(suite(rest))


if __name__ == "__main__":
    main()
