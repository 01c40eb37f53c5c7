"""The random state of one rank: everything that dropout and Python code draw from.

CUDA's belongs to it where the process uses CUDA: asking for it would make a run on the CPU start CUDA on every GPU.
"""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch


def capture() -> dict[str, Any]:
    """Take the state of Python's, numpy's, torch's CPU and CUDA generators, as plain containers and tensors."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    held = torch.from_numpy(np.asarray(keys, dtype=np.int64))
    return {
        "python": random.getstate(),
        "numpy": (str(name), held, int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def fingerprint(rank: int) -> int:
    """Hash this rank's random state and number in 64 bits: exchanged states are noticed. Waits for no device."""
    version, internal, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    digest = hashlib.blake2b(repr((rank, version, gauss, name, rest)).encode(), digest_size=8)
    digest.update(np.array(internal, dtype=np.uint32).tobytes())
    digest.update(np.asarray(keys).tobytes())
    digest.update(torch.get_rng_state().numpy().tobytes())
    if torch.cuda.is_initialized():
        digest.update(torch.cuda.get_rng_state().numpy().tobytes())
    return int.from_bytes(digest.digest(), "little")


def restore(state: dict[str, Any]) -> list[str]:
    """Put a captured state back; returns notes on what could not be restored exactly (CUDA's without CUDA)."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_initialized():
        if state["cuda"] is None:
            why = "the checkpoint has no CUDA random state (it was saved on a CPU)"
            return [f"{why}: dropout continues from this process' seed"]
        torch.cuda.set_rng_state(state["cuda"])
    elif state["cuda"] is not None:
        return ["the checkpoint's CUDA random state is not used on a CPU: dropout draws from the CPU generator"]
    return []


def resume(states: list[dict[str, Any]], base: int, rank: int, world_size: int, step: int) -> list[str]:
    """Put back the state of this rank out of those of all ranks; another number of ranks than now gets new seeds.
    Returns notes.
    """
    if len(states) == world_size:
        return restore(states[rank])
    seed(base, rank, step)
    return [
        f"random state: {len(states)} rank(s) saved it, there are {world_size} now; seeded anew from seed {base}, "
        f"rank and step {step}, so that dropout is not the uninterrupted run's"
    ]


def seed(base: int, rank: int, *more: int) -> None:
    """Seed all generators from `base`, the rank, so that dropout differs, and `more`: the step of a resume."""
    mixed = int(np.random.SeedSequence([base, rank, *more]).generate_state(1, dtype=np.uint64)[0])
    random.seed(mixed)
    np.random.seed(mixed % 2**32)
    torch.manual_seed(mixed % 2**63)  # seeds every CUDA device too
