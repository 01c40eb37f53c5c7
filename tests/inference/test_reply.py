"""What is given out of a reply is never taken back."""

from __future__ import annotations

import random

import pytest

from chatgot.data.tokenizer import ByteTokenizer
from chatgot.inference.reply import Reply


def pieces(text: str, *stops: str) -> tuple[list[str], Reply]:
    """What each token of the text gives out, and the rest at the end."""
    tokenizer = ByteTokenizer()
    reply = Reply(tokenizer, stops)
    return [*(reply.push(int(token)) for token in tokenizer.encode(text)), reply.flush()], reply


def test_what_may_become_a_stop_text_is_held_back():
    assert pieces("abc\nKI", "\nKING:")[0] == ["a", "b", "c", "", "", "", "\nKI"]
    assert pieces("abc\nKU", "\nKING:")[0] == ["a", "b", "c", "", "", "\nKU", ""]
    given, reply = pieces("abc\nKING: d", "\nKING:")
    assert ("".join(given), reply.text, reply.ended) == ("abc", "abc", True)


def test_the_first_of_several_stop_texts_ends_it_and_characters_come_whole():
    given, reply = pieces("ē’á one two", "two", "on", "xyz")
    assert given[:4] == ["", "ē", "", ""]
    assert ("".join(given), reply.ended) == ("ē’á ", True)
    given, reply = pieces("ē"[:1])
    assert (reply.ended, reply.given_out) == (False, 1)


def test_no_stop_text_is_overlooked():
    draw = random.Random(0)
    for _ in range(500):
        text = "".join(draw.choices("ab\n", k=draw.randint(0, 12)))
        stops = ["".join(draw.choices("ab\n", k=draw.randint(1, 4))) for _ in range(draw.randint(0, 3))]
        given, reply = pieces(text, *stops)
        found = [text.index(stop) for stop in stops if stop in text]
        ends = sorted(text.index(stop) + len(stop) for stop in stops if stop in text)
        # the text ends where the first stop text is complete, and before all of those that are complete there
        first = min(text.find(stop, 0, ends[0]) for stop in stops if stop in text[: ends[0]]) if found else None
        assert reply.ended == bool(found)
        assert "".join(given) == reply.text == (text if first is None else text[:first])


def test_an_empty_stop_text_is_refused():
    with pytest.raises(ValueError, match="empty"):
        Reply(ByteTokenizer(), [""])
