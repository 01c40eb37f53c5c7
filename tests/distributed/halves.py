"""How a grid of cases is shared out: half of it stands, the rest is slow."""

from __future__ import annotations

import pytest

HALVES = [
    pytest.param((ranks, rest), marks=pytest.mark.slow if rest else (), id=f"{ranks} rank(s){', the rest' * rest}")
    for rest in (False, True)
    for ranks in (1, 2)
]
"""Of a grid of cases on one and two ranks: half of it, in which there is every pair, and the rest, which is slow."""
