"""Copies of the training text, looked for while a server answers others."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.concurrency import run_in_threadpool

from chatgot.inference.copied import TrainingText
from chatgot.inference.requests import RefusedError

MOST_SEARCHED = 20_000
"""Characters, the last ones of a text, in which copies are looked for."""
MOST_SEARCHES = 8
"""Texts that may be searched or wait for it."""


class CopyFinder:
    """Looks for what stands in the training text word for word, one text after another."""

    def __init__(self, source: TrainingText, min_characters: int) -> None:
        self._source, self.min_characters = source, min_characters
        self._one, self._waiting = asyncio.Lock(), 0

    async def find(self, text: str, after: int = 0) -> dict[str, Any]:
        """The passages of a text that end beyond its first `after` characters, with where they stand.

        Raises:
            RefusedError: too many texts are waiting (429).
        """
        if self._waiting >= MOST_SEARCHES:
            raise RefusedError(429, "too many texts are being searched for copies; try again in a while")
        self._waiting += 1
        try:
            async with self._one:
                left_out = max(0, len(text) - MOST_SEARCHED)
                search = self._source.spans, text[left_out:], self.min_characters, max(0, after - left_out)
                spans = await run_in_threadpool(*search)
        finally:
            self._waiting -= 1
        copies = [
            {
                **{"begin": span.begin + left_out, "end": span.end + left_out, "count": span.count},
                "where": span.where,
                "places": [
                    {
                        **{"file": one.place.file, "line": one.place.line, "token": one.place.begin},
                        **{"fed_in_steps": one.fed.whole, "fed_in_part_in_steps": one.fed.part},
                    }
                    for one in span.places
                ],
            }
            for span in spans
        ]
        return {"min_characters": self.min_characters, "searched_from": left_out, "copies": copies}
