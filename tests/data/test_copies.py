"""Copies: the passages that brute force finds, with the file and line in which they stand."""

from __future__ import annotations

import random

import pytest

from chatgot.config.run import DataConfig
from chatgot.data import copies
from chatgot.data.copies import Places, covered, find_copies, search
from chatgot.data.prepare import prepare

KINDS = ["char", "byte", "bpe"]


def words(n: int, seed: int, letters: str = "abcdefgéā’𝄞") -> str:
    rng = random.Random(seed)
    return "".join("".join(rng.choices(letters, k=rng.randint(1, 7))) + rng.choice("    \n") for _ in range(n))


@pytest.fixture(params=KINDS)
def prepared(request, tmp_path, monkeypatch):
    if request.param == "bpe":
        pytest.importorskip("tokenizers")
    monkeypatch.setattr(copies, "_WINDOW", 500)
    for name in "abc":
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{name}.txt").write_text(words(700, ord(name)), encoding="utf-8")
    config = DataConfig(tokenizer=request.param, bpe_vocab_size=300, split_by="position")
    return prepare(str(tmp_path / "texts"), tmp_path / "out", config)


def by_force(text: str, whole: str, least: int) -> dict[tuple[int, int], list[int]]:
    """Begin and end of every passage that is part of no longer one -> where it stands."""
    longest, found = 0, {}
    for begin in range(len(text)):
        end = begin
        while end < len(text) and text[begin : end + 1] in whole:
            end += 1
        if end - begin >= least and end > longest:
            at = [i for i in range(len(whole)) if whole.startswith(text[begin:end], i)]
            found[begin, end], longest = at, end
    return found


def test_finds_what_brute_force_finds_with_file_and_line(prepared, tmp_path):
    whole = prepared.tokenizer.decode(prepared.train)
    rng = random.Random(5)
    for _ in range(8):
        text = ""
        for _ in range(rng.randint(1, 6)):
            begin = rng.randrange(len(whole) - 90)
            text += whole[begin : begin + rng.randint(3, 90)] + words(rng.randint(0, 4), rng.randrange(999))
        expected = by_force(text, whole, 12)
        found = find_copies(text, prepared, 12)
        assert {(one.begin, one.end): one.count for one in found} == {key: len(at) for key, at in expected.items()}
        for one in found:
            for place, at in zip(one.places, expected[one.begin, one.end]):
                assert text[one.begin : one.end] in prepared.tokenizer.decode(prepared.train[place.begin : place.end])
                line = (
                    (tmp_path / "texts" / str(place.file))
                    .read_text(encoding="utf-8")
                    .split("\n")[(place.line or 0) - 1]
                )
                assert text[one.begin : one.end].split("\n")[0] in line
                assert len(prepared.tokenizer.decode(prepared.train[: place.begin])) <= at
        assert covered((one.begin, one.end) for one in found) == len(set().union(*(range(*key) for key in expected)))
    assert find_copies(words(200, 77, "mnopqrstu"), prepared, 8) == []


def test_every_token_has_its_file_and_line(prepared, tmp_path):
    for split, tokens in (("train", prepared.train), ("val", prepared.val)):
        where = Places(prepared, split).read()
        for token in random.Random(1).sample(range(len(tokens) - 1), 60):
            place = where.of_token(token)
            lines = [*(tmp_path / "texts" / str(place.file)).read_text(encoding="utf-8").split("\n"), "", "", ""]
            shown = prepared.tokenizer.decode(tokens[token : token + 1]).split("\n")[0].strip("\ufffd")
            assert shown in lines[(place.line or 0) - 1]


def test_one_file_repeating_itself_is_counted_and_kept_in_part(tmp_path, monkeypatch):
    monkeypatch.setattr(copies, "KEPT_PLACES", 3)
    (tmp_path / "t.txt").write_text("a line that stands there again\n" * 50 + words(400, 1))
    data = prepare(str(tmp_path / "t.txt"), tmp_path / "out", DataConfig())
    [one] = find_copies("x a line that stands there again x", data, 20)
    assert (one.count, [str(place) for place in one.places]) == (50, ["t.txt:1", "t.txt:2", "t.txt:3"])


def test_texts_that_repeat_themselves_cost_no_more_than_the_effort(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(copies, "_WINDOW", 1000)
    (tmp_path / "t.txt").write_text(words(800, 1).strip() + " " * 4000 + words(800, 2))
    data = prepare(str(tmp_path / "t.txt"), tmp_path / "out", DataConfig(val_fraction=0.1))
    found, searched = search(" " * 300, data, 20)
    assert [(one.begin, one.end, one.count) for one in found] == [(0, 300, 3701)]
    assert searched == len(data.train)
    _, cut = search(" " * 300, data, 20, effort=100_000)
    assert 0 < cut < len(data.train)
    monkeypatch.setattr(copies, "EFFORT", 100_000)
    find_copies(" " * 300, data, 20)
    assert f"looked for in {cut} of {len(data.train)} tokens only" in caplog.text
