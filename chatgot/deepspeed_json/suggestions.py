"""Which known word was probably meant by an unknown one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def meant(word: object, known: Iterable[str]) -> str:
    """The nearest known word, or an empty string.

    One slip of the finger (a character too many, too few, another one, or two swapped) is always taken for the word;
    beyond that difflib must see a likeness of 0.6. Upper and lower case count as equal.
    """
    if not isinstance(word, str):
        return ""
    folded = {name.lower(): name for name in known}
    word = word.lower()
    slips = [name for name in folded if one_slip_apart(word, name)]
    if len(slips) > 1:
        slips = [max(slips, key=lambda name: (difflib.SequenceMatcher(None, word, name).ratio(), name))]
    close = slips or difflib.get_close_matches(word, folded, n=1, cutoff=0.6)
    return folded[close[0]] if close else ""


def one_slip_apart(one: str, other: str) -> bool:
    """Whether one insertion, deletion, replacement or swap of neighbours turns one word into the other, or nothing has
    to.
    """
    if abs(len(one) - len(other)) > 1:
        return False
    start = 0
    while start < min(len(one), len(other)) and one[start] == other[start]:
        start += 1
    end = 0
    while end < min(len(one), len(other)) - start and one[-1 - end] == other[-1 - end]:
        end += 1
    a, b = one[start : len(one) - end], other[start : len(other) - end]
    return (len(a) <= 1 and len(b) <= 1) or (len(a) == 2 and a == b[::-1])
