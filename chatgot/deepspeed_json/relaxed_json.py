"""JSON as DeepSpeed reads it, which is hjson's dialect, with the place of every key.

hjson (the package that DeepSpeed uses) allows comments, unquoted keys and texts, single quotes, triple-quoted texts,
missing commas, trailing commas and a missing pair of outer braces, and it forgets where things stood. This reader
accepts the same texts, gives the same values, and remembers the places; tests/deepspeed_json/test_relaxed_json.py compares the
two.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

_SPACE = " \t\n\r"
_PUNCTUATION = "{}[],:"
_NUMBER = re.compile(r"[\t ]*(-?(?:0|[1-9]\d*))(\.\d+)?([eE][-+]?\d+)?[\t ]*")
_ESCAPES = {'"': '"', "'": "'", "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_WORDS = {"null": None, "true": True, "false": False}


@dataclass(frozen=True)
class Mark:
    """A place in a text, both counted from 1."""

    line: int
    column: int


@dataclass(frozen=True)
class Liberty:
    """Something that hjson allows and JSON does not."""

    kind: str
    mark: Mark
    key: str = ""
    """The key it belongs to, where it belongs to one."""


class JsonSyntaxError(ValueError):
    """The text is not even hjson's JSON."""

    def __init__(self, reason: str, position: int) -> None:
        super().__init__(reason)
        self.reason, self.position = reason, position


@dataclass
class Document:
    """A parsed text."""

    tree: Any = None
    marks: dict[str, Mark] = field(default_factory=dict)
    """Dotted key -> its first place. Elements of lists count as parts of the list's key."""
    duplicates: list[tuple[str, Mark]] = field(default_factory=list)
    """Dotted keys that were given again, with that place."""
    liberties: list[Liberty] = field(default_factory=list)


def parse(text: str) -> Document:
    """Parse `text`.

    Raises:
        JsonSyntaxError: hjson would not read it either (or would crash on it).
    """
    reader = _Reader(text)
    try:
        reader.document.tree = reader.root()
    except RecursionError:
        raise JsonSyntaxError("nested too deeply", 0) from None
    return reader.document


class _Reader:
    """Recursive descent over one text; every method takes a position and returns what it read with the position behind
    it.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.document = Document()
        self.line_starts = [0, *(match.end() for match in re.finditer("\n", text))]

    def mark(self, position: int) -> Mark:
        line = bisect_right(self.line_starts, position)
        return Mark(line, position - self.line_starts[line - 1] + 1)

    def liberty(self, kind: str, position: int, key: str = "") -> None:
        self.document.liberties.append(Liberty(kind, self.mark(position), key))

    def root(self) -> Any:
        start = self.skip(1 if self.text.startswith("\ufeff") else 0)
        if self.at(start) == "":
            return {}
        if self.at(start) in "{[":
            value, end = self.value(start, "")
        else:
            value, end = self._without_braces(start)
        end = self.skip(end)
        if end != len(self.text):
            raise JsonSyntaxError("Extra data", end)
        return value

    def _without_braces(self, start: int) -> tuple[Any, int]:
        try:
            value, end = self.object(start, "", braces=False)
        except JsonSyntaxError as error:
            self.document = Document()
            try:
                return self.value(start, "")
            except JsonSyntaxError:
                raise error from None
        self.liberty("no braces around the whole", start)
        return value, end

    def at(self, position: int) -> str:
        return self.text[position : position + 1]

    def skip(self, position: int) -> int:
        """Behind white space and comments."""
        text = self.text
        while True:
            while position < len(text) and text[position] in _SPACE:
                position += 1
            if text.startswith(("#", "//"), position):
                self.liberty("comment", position)
                ends = [end for end in (text.find("\n", position), text.find("\r", position)) if end >= 0]
                position = min(ends, default=len(text))
            elif text.startswith("/*", position):
                self.liberty("comment", position)
                end = text.find("*/", position + 2)
                if end < 0:
                    raise JsonSyntaxError("the comment is never closed", position)
                position = end + 2
            else:
                return position

    def value(self, position: int, where: str) -> tuple[Any, int]:
        start = self.at(position)
        if start == "":
            raise JsonSyntaxError("Expecting value", position)
        if self.text.startswith("'''", position):
            self.liberty("text in triple quotes", position, where)
            return self.long_text(position)
        if start in "\"'":
            if start == "'":
                self.liberty("single quotes", position, where)
            return self.quoted(position)
        if start == "{":
            return self.object(position + 1, where)
        if start == "[":
            return self.array(position + 1, where)
        return self.bare(position, where)

    def object(self, position: int, where: str, braces: bool = True) -> tuple[dict[str, Any], int]:
        tree: dict[str, Any] = {}
        position = self.skip(position)
        if braces and self.at(position) == "}":
            return tree, position + 1
        while True:
            begin = position
            key, position = self.key(position)
            dotted = f"{where}.{key}" if where else key
            position = self.skip(position)
            if self.at(position) != ":":
                raise JsonSyntaxError("Expecting ':' delimiter", position)
            if key in tree:
                self.document.duplicates.append((dotted, self.mark(begin)))
            self.document.marks.setdefault(dotted, self.mark(begin))
            tree[key], position = self.value(self.skip(position + 1), dotted)
            position, done = self._behind(position, "}" if braces else "")
            if done:
                return tree, position

    def array(self, position: int, where: str) -> tuple[list[Any], int]:
        items: list[Any] = []
        position = self.skip(position)
        if self.at(position) == "]":
            return items, position + 1
        if self.at(position) == "":
            raise JsonSyntaxError("End of input while parsing an array (did you forget a closing ']'?)", position)
        while True:
            item, position = self.value(position, where)
            items.append(item)
            position, done = self._behind(position, "]")
            if done:
                return items, position

    def _behind(self, position: int, closing: str) -> tuple[int, bool]:
        """Behind an element: the next one, or behind the bracket."""
        end = position
        position = self.skip(position)
        comma = self.at(position) == ","
        if comma:
            end = position
            position = self.skip(position + 1)
        if self.at(position) == closing:
            if comma:
                self.liberty("trailing comma", end)
            return position + len(closing), True
        if not comma and self.at(position) != "":
            self.liberty("missing comma", end)
        return position, False

    def key(self, position: int) -> tuple[str, int]:
        if self.at(position) in ('"', "'"):
            if self.at(position) == "'":
                self.liberty("single quotes", position)
            return self.quoted(position)
        begin, space = position, -1
        while True:
            character = self.at(position)
            if character == "":
                raise JsonSyntaxError("the file ends where a key or a closing bracket was expected", position)
            if character == ":":
                if begin == position:
                    raise JsonSyntaxError("Found ':' but no key name (for an empty key name use quotes)", begin)
                if space >= 0 and space != position - 1:
                    raise JsonSyntaxError("Found whitespace in your key name (use quotes to include)", space)
                self.liberty("unquoted key", begin)
                return self.text[begin:position].rstrip(), position
            if character in _SPACE:
                if space < 0 or space == position - 1:
                    space = position
            elif character in "{}[],":
                raise JsonSyntaxError(f"Found '{character}' where a key name was expected", begin)
            position += 1

    def quoted(self, position: int) -> tuple[str, int]:
        quote, begin, parts = self.text[position], position, []
        position += 1
        while True:
            character = self.at(position)
            if character == "":
                raise JsonSyntaxError("Unterminated string starting at", begin)
            if character == quote:
                return "".join(parts), position + 1
            if character == "\\":
                part, position = self.escape(position + 1, begin)
                parts.append(part)
            elif character < " ":
                raise JsonSyntaxError(f"Invalid control character {character!r} at", position)
            else:
                parts.append(character)
                position += 1

    def escape(self, position: int, begin: int) -> tuple[str, int]:
        character = self.at(position)
        if character == "":
            raise JsonSyntaxError("Unterminated string starting at", begin)
        if character != "u":
            if character not in _ESCAPES:
                raise JsonSyntaxError(f"Invalid \\X escape sequence {character!r}", position)
            return _ESCAPES[character], position + 1
        code = self._code_unit(position + 1)
        position += 5
        if (
            code & 0xFC00 == 0xD800
            and self.text.startswith("\\u", position)
            and len(self.text[position + 2 : position + 6]) == 4
        ):
            low = self._code_unit(position + 2)
            if low & 0xFC00 == 0xDC00:
                return chr(0x10000 + (((code - 0xD800) << 10) | (low - 0xDC00))), position + 6
        return chr(code), position

    def _code_unit(self, position: int) -> int:
        digits = self.text[position : position + 4]
        if not re.fullmatch("[0-9a-fA-F]{4}", digits):
            raise JsonSyntaxError("Invalid \\uXXXX escape sequence", position - 2)
        return int(digits, 16)

    def long_text(self, position: int) -> tuple[str, int]:
        """A text in triple quotes: the indentation of its first line is taken off the others, and the last line break
        too.
        """
        text = self.text
        line_break = text.rfind("\n", 0, position)
        if line_break < 0:  # hjson looks for the line break before the quotes, and goes round the beginning of the text
            line_break = text.rfind("\n") - len(text)
        if line_break == -1 - len(text):
            raise JsonSyntaxError("a text in triple quotes needs a line break in the file", position)
        indent = position - line_break - 1
        begin = position
        position = self._skip_indent(position + 3, len(text))
        if self.at(position) == "\n":
            position = self._skip_indent(position + 1, indent)
        end = text.find("'''", position)
        if end < 0:
            raise JsonSyntaxError("the text in triple quotes is never closed", begin)
        parts = []
        while position < end:
            if text[position] == "\n":
                parts.append("\n")
                position = min(self._skip_indent(position + 1, indent), end)
            else:
                parts.append("" if text[position] == "\r" else text[position])
                position += 1
        return "".join(parts).removesuffix("\n"), end + 3

    def _skip_indent(self, position: int, most: int) -> int:
        while most > 0 and self.at(position) in (" ", "\t", "\r"):
            position += 1
            most -= 1
        return position

    def bare(self, position: int, where: str) -> tuple[Any, int]:
        """null, true, false, a number, or a text that runs to the end of the line, commas and comments included."""
        if self.at(position) in _PUNCTUATION:
            raise JsonSyntaxError(f"Expecting a value, found '{self.at(position)}'", position)
        begin, text = position, self.text
        for end in self._ends(position):
            word = text[begin:end].strip()
            if word in _WORDS:
                return _WORDS[word], end
            match = _NUMBER.match(text, begin) if text[begin] in "-0123456789" else None
            if match and match.end() == end:
                return self._number(*match.groups(), position=begin), end
        end = min((e for e in (text.find("\n", begin), text.find("\r", begin)) if e >= 0), default=len(text))
        self.liberty("unquoted text", begin, where)
        return text[begin:end].strip(), end

    def _ends(self, position: int) -> Iterator[int]:
        """Where a word or number may end: before a comma, a bracket or a comment, and at the end of the line."""
        text = self.text
        while position < len(text) and text[position] not in "\r\n":
            if text[position] in ",}]#" or text.startswith(("//", "/*"), position):
                yield position
            position += 1
        yield position

    def _number(self, whole: str, fraction: str | None, exponent: str | None, position: int) -> int | float:
        try:
            if not (fraction or exponent):
                return int(whole)
            number = float(whole + (fraction or "") + (exponent or ""))
            return (
                int(number) if int(number) == number and abs(number) < 1e10 else number
            )  # hjson: 5e8 is a whole number
        except (OverflowError, ValueError):
            raise JsonSyntaxError("the number is too large", position) from None
