"""The reader of DeepSpeed JSONs: what hjson accepts is read with its values, we know where everything stood, and no
text makes the finder of places fail or change a value.
"""

from __future__ import annotations

import json
import math
from typing import Any

import hjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chatgot.deepspeed_json.findings import ConfigRefusal, Mark
from chatgot.deepspeed_json.read import Document, parse_document
from chatgot.errors import ConfigError

# Pieces that make and break JSON; joined at random they are nearly JSON often enough.
PIECES = [
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    '"a"',
    '"b c"',
    "'d'",
    "e",
    "f g",
    "true",
    "null",
    "false",
    "1",
    "-2.5e3",
    "5e8",
    "0x1",
    "# c\n",
    "// c\n",
]
PIECES += [
    "/* c */",
    "\n",
    " ",
    "\t",
    "\r\n",
    '"\\u00e9\\n"',
    '"\\x"',
    "1e999",
    "text, # and more",
    "1 2",
    "-",
    "01",
    "'",
    '"',
    "'''",
    "\n  '''\n  x\n  '''",
]

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def theirs(text: str) -> Any:
    """hjson's reading, duplicates resolved as `dict` does; None where it refuses, crashes, or reads no object."""
    try:
        tree = hjson.loads(text, object_pairs_hook=dict)
    except (hjson.HjsonDecodeError, IndexError, OverflowError, ValueError):
        return None
    return tree if isinstance(tree, dict) else None


def ours(text: str) -> Any:
    try:
        return parse(text).tree
    except ConfigError:
        return None


def parse(text: str) -> Document:
    return parse_document(text, "ds.json")


def same(a: Any, b: Any) -> bool:
    """Equal in value and in type, nan included."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from(PIECES), max_size=9)
    .map("".join)
    .flatmap(lambda t: st.sampled_from([t, "{a:" + t, "{a:" + t + "}", "{b:[" + t + "]}"]))
)
@example('{"a": 1 /* never closed')
@example("a: 1\nb: {c: [1 2\n3]}\n")
@example("{a: 'x'b: \"y\"}")
@example('{"a": \'it"s\', b: "it\'s"}')
@example("{a: -0.0, b: 1e10, c: 9999999999.0, d: 1E+2}")
@example("hello")
@example('{"a":"\\ud83d\\ude00", "b":"\\ud83d"}')
@example("{a:\n  '''\n  one\n    two\n  '''}")
def test_reads_what_hjson_reads(text: str) -> None:
    expected, got = theirs(text), ours(text)
    if not text.strip():
        return  # an empty file is refused
    assert (got is None) == (expected is None), f"{text!r}: hjson {expected}, we {got}"
    assert got is None or same(got, expected), f"{text!r}: hjson {expected}, we {got}"


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.dictionaries(st.text(max_size=5), PLAIN, max_size=4), st.sampled_from([None, 1, 4]))
def test_plain_json_is_read_as_by_hjson_and_without_remarks(tree: dict[str, Any], indent: int | None) -> None:
    text = json.dumps(tree, indent=indent, ensure_ascii=indent is None)
    document = parse(text)
    assert same(document.tree, theirs(text))
    assert document.liberties == []
    assert document.duplicates == []


def test_every_key_has_its_place() -> None:
    text = '{\n  "a": {"b": 1,\n    "c": [{"d": 2}, {"d": 3}]},\n\t"e": 4, "a": 5\n}'
    document = parse(text)
    assert document.marks == {
        "a": Mark(2, 3),
        "a.b": Mark(2, 9),
        "a.c": Mark(3, 5),
        "a.c.d": Mark(3, 12),
        "e": Mark(4, 2),
    }
    assert document.duplicates == [("a", Mark(4, 10))]
    assert document.tree["a"] == 5


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ('{"a": 1}', []),
        ('# c\n{"a": 1} // d', ["comment", "comment"]),
        ('{"a": 1,}', ["trailing comma"]),
        ('{"a": [1,]}', ["trailing comma"]),
        ("{a: 1}", ["unquoted key"]),
        ("{\"a\": 'b'}", ["single quotes"]),
        ('{"a": b c\n}', ["unquoted text"]),
        ('{"a": 1\n"b": 2}', ["missing comma"]),
        ('"a": 1', ["no braces around the whole"]),
    ],
)
def test_what_json_does_not_allow_is_remembered(text: str, kinds: list[str]) -> None:
    assert [kind for kind, _, _ in parse(text).liberties] == kinds


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ('{"a" 1}', 5),
        ('{"a": }', 6),
        ('{"a": "b', 6),
        ('{"a": "b\nc"}', 8),
        ('{"a": "\\q"}', 7),
        ('{"a": 1} x', 9),
        ("{a b: 1}", 1),
        ('{"a": 1 /* b', 11),
        ('{"a": 1', 7),
        ("[1", 2),
        ('{"a": 1e999}', 6),
    ],
)
def test_syntax_error_has_its_position(text: str, position: int) -> None:
    with pytest.raises(ConfigRefusal if text != "[1" else ConfigError) as caught:
        parse(text)
    if text not in ("[1", '{"a": 1', '{"a": }', '{"a": 1e999}'):
        assert isinstance(caught.value, ConfigRefusal)
        (finding,) = caught.value.findings
        line, column = text.count("\n", 0, position) + 1, position - text.rfind("\n", 0, position)
        assert (finding.line, finding.column) == (line, column)
    assert theirs(text) is None


def test_a_file_that_is_nested_too_deeply_is_an_error() -> None:
    with pytest.raises(ConfigRefusal, match="nested too deeply"):
        parse("[" * 100_000)


def test_only_a_comment_is_an_empty_object() -> None:
    assert parse("  # only a comment").tree == theirs("  # only a comment") == {}
