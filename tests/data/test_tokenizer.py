"""Tokenizers: lossless, complete on disk, and exact about what they cannot encode."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatgot.data.tokenizer import (
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    StreamDecoder,
    Tokenizer,
    load_tokenizer,
)
from chatgot.errors import ConfigError, DataError
from tests import hostile

ROUGH = "The night is dark…\n\tJon said: ‘né à Ravenna’ – “ēā”, \r lone, \0 nul, 🐉 dragon, é as e\u0301, \u2028 \ufeff end  \n\n"  # noqa: E501
ENGLISH = "the night is dark and full of terrors, the night is long and the wall is cold\n" * 30


def make(kind: str, text: str = ROUGH) -> Tokenizer:
    if kind == "char":
        return CharTokenizer(sorted(set(text)))
    if kind == "byte":
        return ByteTokenizer()
    pytest.importorskip("tokenizers")
    return BpeTokenizer.train([ENGLISH, text], 300)


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_invariant_02_decode_of_encode_is_the_text(kind):
    tokenizer = make(kind)
    ids = tokenizer.encode(ROUGH)
    assert tokenizer.decode(ids) == ROUGH
    assert tokenizer.decode(tokenizer.encode("")) == ""
    assert int(ids.max()) < tokenizer.vocab_size
    assert ids.dtype == tokenizer.dtype


@given(text=st.text(st.characters(codec="utf-8"), max_size=60), kind=st.sampled_from(["char", "byte", "bpe"]))
@settings(max_examples=60, deadline=None)
def test_invariant_02_any_text_survives(text, kind):
    tokenizer = make(kind, text + "x")
    assert tokenizer.decode(tokenizer.encode(text)) == text
    decoder = StreamDecoder(tokenizer)
    assert "".join([decoder.push(i) for i in tokenizer.encode(text)]) + decoder.flush() == text


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_saved_tokenizer_is_the_same_tokenizer(kind, tmp_path):
    tokenizer = make(kind)
    tokenizer.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert (again.kind, again.vocab_size, again.fingerprint) == (kind, tokenizer.vocab_size, tokenizer.fingerprint)
    np.testing.assert_array_equal(again.encode(ROUGH), tokenizer.encode(ROUGH))


def test_vocabulary_is_in_code_point_order_and_readable(tmp_path):
    CharTokenizer(sorted(set("éab\n…"))).save(tmp_path / "t.json")
    tree = json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))
    assert tree["characters"] == ["\n", "a", "b", "é", "…"]
    assert "é" in (tmp_path / "t.json").read_text(encoding="utf-8")


def test_other_vocabulary_has_another_fingerprint():
    assert CharTokenizer("abc").fingerprint != CharTokenizer("abd").fingerprint


def test_more_than_256_characters_become_uint16():
    text = "".join(chr(0x4E00 + i) for i in range(300))
    tokenizer = CharTokenizer(text)
    assert tokenizer.encode(text).dtype == np.uint16
    assert tokenizer.decode(tokenizer.encode(text + "\u4e00")) == text + "\u4e00"


def test_more_than_65536_characters_become_uint32(tmp_path):
    text = "".join(map(chr, [*range(0x20, 0xD800), *range(0xE000, 0x14000)]))
    tokenizer = CharTokenizer(text)
    assert tokenizer.encode(text).dtype == np.uint32
    tokenizer.save(tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path / "tokenizer.json").decode(tokenizer.encode(text[::-1])) == text[::-1]


def test_prompt_with_unseen_characters_names_each_of_them():
    tokenizer = CharTokenizer("abc")
    with pytest.raises(ConfigError, match=r"2 characters .*'z' \(U\+007A\), 'ē' \(U\+0113\)"):
        tokenizer.encode_prompt("abzēza")
    with pytest.raises(ConfigError, match=r"U\+007A"):
        tokenizer.encode_prompt("abz")


def test_text_with_unseen_characters_is_a_data_error():
    for text in ("abz", "abē", "ab🐉"):
        with pytest.raises(DataError, match="not in the vocabulary of 3"):
            CharTokenizer("abc").encode(text)
    with pytest.raises(DataError, match="U\\+0080"):
        CharTokenizer("abcē").encode("a\u0080ē")


def test_prompt_that_is_not_unicode_is_refused():
    with pytest.raises(ConfigError, match="character 1"):
        ByteTokenizer().encode_prompt("a\udc80")


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_stream_gives_a_character_when_its_last_byte_comes(kind):
    tokenizer = make(kind, "plain")
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(i) for i in tokenizer.encode("a🐉")]
    assert pieces[0] == "a"
    assert pieces[1:] == ["", "", "", "🐉"]
    assert decoder.flush() == ""
    decoder.push(int(tokenizer.encode("é")[0]))
    assert decoder.flush() == "\ufffd"


def test_ids_outside_the_vocabulary_are_refused():
    for tokenizer in (CharTokenizer("abc"), ByteTokenizer()):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            tokenizer.decode([tokenizer.vocab_size])
        with pytest.raises(ValueError, match="outside the vocabulary"):
            tokenizer.decode([-1])


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"format": "chatgot-tokenizer", "format_version": 1, "kind": "word"}',
        '{"format": "chatgot-tokenizer", "format_version": 9, "kind": "byte", "vocab_size": 256}',
        '{"format": "chatgot-tokenizer", "format_version": 1, "kind": "byte", "vocab_size": 255}',
        '{"format": "chatgot-tokenizer", "format_version": 1, "kind": "char", "vocab_size": 2, "characters": ["b", "a"]}',  # noqa: E501
        '{"format": "chatgot-tokenizer", "format_version": 1, "kind": "char", "vocab_size": 2, "characters": ["a", "bc"]}',  # noqa: E501
        '{"format": "chatgot-tokenizer", "format_version": 1, "kind": "char", "vocab_size": 1, "characters": [7]}',
        '{"format": "chatgot-tokenizer", "format_version": 1, "kind": "bpe", "vocab_size": 1, "tokenizers": {"model": 1}}',  # noqa: E501
    ],
)
def test_damaged_tokenizer_file_is_a_data_error_that_names_it(text, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        load_tokenizer(path)


def test_bpe_without_its_library_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match="pip install tokenizers"):
        BpeTokenizer.train(["a"], 300)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, list[dict]]:
    """Where a tokenizer.json may be written, and what one of each kind says."""
    path = tmp_path_factory.mktemp("saved") / "tokenizer.json"
    tokenizers = [CharTokenizer(sorted(set("éab\n…"))), ByteTokenizer()]
    if importlib.util.find_spec("tokenizers"):
        tokenizers.append(BpeTokenizer.train(["the night is dark and the night is long"] * 20, 270))
    said = []
    for tokenizer in tokenizers:
        tokenizer.save(path)
        said.append(json.loads(path.read_text(encoding="utf-8")))
    return path, said


@hostile.few
@given(data=st.data())
def test_any_tokenizer_json_is_read_or_refused(saved, data):
    path, said = saved
    path.write_bytes(data.draw(hostile.files(data.draw(st.sampled_from(said)))))

    def read() -> None:
        tokenizer = load_tokenizer(path)
        tokenizer.decode(tokenizer.encode_prompt("a night"))

    hostile.succeeds_or_refuses(read)
