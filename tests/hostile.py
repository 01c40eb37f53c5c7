"""JSON files that somebody has changed, for hypothesis; and how a reader of them must behave."""

from __future__ import annotations

import copy
import datetime
import json
import math
import os
import resource
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from chatgot.errors import ChatGoTError

ODD = [-1, 2**31, 2**63, 2**64, 10**400, "", "\ud800", "a\0b", "../x", "x" * 100_000, "nan", [], {}, [[]], math.inf]
LEAVES = st.one_of(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    st.sampled_from(ODD),
)
JUNK = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NESTED = [b"[" * 200_000, b'{"a":' * 200_000]
RAW = st.sampled_from([*NESTED, b"", b"{", b"null", b"9" * 5000, b"\xff\xfe", b"\0" * 1000, b"NaN", b'"\\ud800"'])

few = settings(
    max_examples=int(os.environ.get("CHATGOT_FUZZ", "150")),
    deadline=datetime.timedelta(seconds=60),
    derandomize="CHATGOT_FUZZ" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)
"""As many cases as CHATGOT_FUZZ says."""


@st.composite
def trees(draw: st.DrawFn, tree: dict[str, Any]) -> dict[str, Any]:
    """`tree` with one to three values replaced, removed or added."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        node: Any = tree
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = draw(st.sampled_from(keys)) if keys else "new"
            inner = node[key] if keys else None
            if isinstance(inner, (dict, list)) and inner and draw(st.booleans()):
                node = inner
                continue
            break
        if isinstance(node, dict) and keys and draw(st.integers(0, 3)) == 0:
            del node[key]
        elif keys or isinstance(node, dict):
            node[key] = copy.deepcopy(draw(JUNK))
    return tree


@st.composite
def files(draw: st.DrawFn, tree: dict[str, Any]) -> bytes:
    """The file of a changed tree; some with bytes put in, or cut."""
    data = json.dumps(draw(trees(tree))).encode()
    if draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(RAW | st.binary(max_size=20)) + data[at + draw(st.integers(0, 50)) :]
    return data


def succeeds_or_refuses(read: Callable[[], object]) -> None:
    """Call it: a ChatGoTError of some thousand characters that can be printed is fine, all else is not, nor is a GB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    said = ""
    try:
        read()
    except ChatGoTError as refusal:
        said = str(refusal)
    assert len(said.encode()) < 5000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # in KiB
