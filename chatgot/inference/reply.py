"""The text of tokens as they are drawn, up to a text that ends it."""

from __future__ import annotations

from collections.abc import Sequence

from chatgot.data.tokenizer import StreamDecoder, Tokenizer


class Reply:
    """Gives out text once it is sure that it stays: what may become a stop text is held back.

    Raises:
        ValueError: a stop text that is empty.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        if "" in stops:
            raise ValueError("a text that ends the reply is empty")
        self._decoder = StreamDecoder(tokenizer)
        self._stops = tuple(stops)
        self.text = ""
        """All text so far, without the stop text and what follows it."""
        self.given_out = 0
        """Characters of it that `push` and `flush` have returned."""
        self.decoded = 0
        """Characters of all tokens so far, those behind a stop text too."""
        self.ended = False
        """Whether a stop text has come."""

    def push(self, token: int) -> str:
        """Take the next token; returns the text that is sure since the last call."""
        self._add(self._decoder.push(token))
        return self._sure(len(self.text) if self.ended else self._unsure())

    def flush(self) -> str:
        """At the end of the tokens: the rest of the text."""
        self._add(self._decoder.flush())
        return self._sure(len(self.text))

    def _add(self, more: str) -> None:
        self.decoded += len(more)
        if self.ended:
            return
        before = len(self.text)
        self.text += more
        found = (self.text.find(stop, max(0, before - len(stop) + 1)) for stop in self._stops)
        if places := [place for place in found if place >= 0]:
            self.text, self.ended = self.text[: min(places)], True

    def _unsure(self) -> int:
        """Where the longest end of the text begins that is the beginning of a stop text."""
        lengths = (n for stop in self._stops for n in range(len(stop) - 1, 0, -1) if self.text.endswith(stop[:n]))
        return len(self.text) - max(lengths, default=0)

    def _sure(self, end: int) -> str:
        more, self.given_out = self.text[self.given_out : end], max(self.given_out, end)
        return more
