"""Which passages of what a model wrote stand verbatim in its training text, where, and which steps had fed them."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from chatgot.checkpoint.load import Found
from chatgot.data.copies import MIN_CHARACTERS, Place, covered, find_copies
from chatgot.data.prepare import recorded_data
from chatgot.errors import DataError
from chatgot.proof.fed import Fed, Feed

PLACES = 10
"""Places of a passage that are given with their steps; all are counted."""
_LISTED = 3


@dataclass(frozen=True)
class FedPlace:
    """One place of a passage, and the steps that had fed it when the checkpoint was saved."""

    place: Place
    fed: Fed

    def __str__(self) -> str:
        return f"{self.place}, {self.fed}"


@dataclass(frozen=True)
class Span:
    """A passage text[begin:end], in characters, that stands `count` times in the training text, and is part of no
    longer one.
    """

    begin: int
    end: int
    count: int
    places: tuple[FedPlace, ...]
    """The first PLACES, in reading order."""

    @property
    def where(self) -> str:
        """'stands 2 times, in first.txt:5, fed in step 7; second.txt:5, fed in step 8'."""
        times = "" if self.count == 1 else f"{self.count} times, "
        return f"stands {times}in " + "; ".join(map(str, self.places[:_LISTED])) + "; ..." * (self.count > _LISTED)


class TrainingText:
    """The text that a checkpoint was trained on. Opened once, searched as often as wanted."""

    def __init__(self, run: Path, checkpoint: Found, spec: str | None = None) -> None:
        """Open the text of a run's checkpoint, and warn of steps of which is not known what they were fed.

        Args:
            spec: the text, as for --data; None: where the run had it.

        Raises:
            DataError: it is not there any more, or gives other tokens.
            ConfigError: not a run folder.
        """
        try:
            _, self._data = recorded_data(run, checkpoint.manifest["data"], spec)
        except DataError as error:
            hint = "the tokens are kept in the cache and not in the run folder; name the same text with --data"
            raise DataError(f"the training text of {run} is not at hand: {error}; {hint}") from error
        self._feed = Feed.of(run, checkpoint.manifest["step"], checkpoint.tag)
        for line in self._feed.unknown(self._data.fingerprint):
            print(f"WARNING: not known whether fed: {line}", file=sys.stderr)

    def spans(self, text: str, min_characters: int = MIN_CHARACTERS, after: int = 0) -> list[Span]:
        """Find all longest passages of at least `min_characters`, in their order in `text`. One pass over the text.

        Args:
            after: leave out what ends within the first so many characters, which the model did not write.

        Raises:
            ConfigError: fewer than one character asked for, or the library ahocorasick_rs is missing.
        """
        data, fingerprint, n_tokens = self._data, self._data.fingerprint, len(self._data.train)
        spans = []
        for one in find_copies(text, data, min_characters):
            if one.end > after:
                fed = [self._feed.fed(fingerprint, n_tokens, at.begin, at.end) for at in one.places[:PLACES]]
                spans.append(Span(one.begin, one.end, one.count, tuple(map(FedPlace, one.places, fed))))
        return spans


def marked(text: str, spans: list[Span], out: TextIO) -> str:
    """`text` with its copied passages in colour where `out` is a terminal, else in «», each with its number."""
    begin_mark, end_mark = ("\x1b[30;43m", "\x1b[0m") if _coloured(out) else ("«", "»")
    runs: list[tuple[int, int, list[int]]] = []  # passages that overlap are one mark
    for number, span in enumerate(spans, start=1):
        if runs and span.begin < runs[-1][1]:
            begin, end, numbers = runs[-1]
            runs[-1] = (begin, max(end, span.end), [*numbers, number])
        else:
            runs.append((span.begin, span.end, [number]))
    shown, last = "", 0
    for begin, end, numbers in runs:
        lines = text[begin:end].replace("\n", f"{end_mark}\n{begin_mark}") if _coloured(out) else text[begin:end]
        shown += f"{text[last:begin]}{begin_mark}{lines}{end_mark}[{','.join(map(str, numbers))}]"
        last = end
    return shown + text[last:]


def listed(text: str, spans: list[Span], min_characters: int, drawn: int) -> str:
    """A line for each passage: its beginning, where it stands, and what fed it.

    Args:
        drawn: characters, the last ones of the text, that the model wrote.
    """
    if not spans:
        return f"copied: no passage of {min_characters} characters or more stands in the training text"
    first = len(text) - drawn
    total = covered(((span.begin, span.end) for span in spans), since=first)
    lines = [f"copied: {total} of {drawn} characters ({total / drawn:.0%}) stand in the training text word for word"]
    for number, span in enumerate(spans, start=1):
        begins = text[span.begin : min(span.end, span.begin + 40)]
        lines.append(f"  [{number}] {span.end - span.begin} characters, {begins!r}: {span.where}")
    return "\n".join(lines)


def _coloured(out: TextIO) -> bool:
    return out.isatty() and not os.environ.get("NO_COLOR")
