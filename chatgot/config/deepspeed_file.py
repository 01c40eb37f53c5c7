"""From a DeepSpeed JSON on disk to a plain tree, with syntax errors that show the place.

DeepSpeed reads its files with hjson: comments, unquoted keys and trailing commas are allowed, and so they are here.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from chatgot.config.errors import ConfigError


def read_tree(path: Path) -> dict[str, Any]:
    """The file as nested dicts.

    Raises:
        ConfigError: no such file, a folder, not UTF-8, empty, not JSON (with line, column and a caret), not an object, a key given twice.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file (expected a DeepSpeed JSON; ds_configs/ has complete ones)") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder, expected a DeepSpeed JSON file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; save the file as UTF-8") from error
    return parse_tree(text, str(path))


def parse_tree(text: str, name: str) -> dict[str, Any]:
    """`text` as nested dicts; `name` is the file's name in messages. See `read_tree`."""
    import hjson

    if not text.strip():
        raise ConfigError(f"{name}: empty file, expected a JSON object {{...}}")
    try:
        tree = hjson.loads(text, object_pairs_hook=_Pairs)
    except hjson.HjsonDecodeError as error:
        raise ConfigError(_syntax_message(text, name, str(error.msg), int(error.pos))) from None
    if not isinstance(tree, _Pairs):
        raise ConfigError(f"{name}: expected a JSON object {{...}}, got {type(tree).__name__}")
    duplicates = list(_duplicates(tree, ""))
    if duplicates:
        raise ConfigError("\n".join(f"{name}: {key}: given twice in {section}; keep one of them" for section, key in duplicates))
    return plain_copy(tree)


def plain_copy(value: Any) -> Any:
    """A deep copy made of plain dicts and lists."""
    if isinstance(value, dict):
        return {key: plain_copy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_copy(item) for item in value]
    return value


class _Pairs(dict):
    """An object that remembers which of its keys were given more than once."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        names = [name for name, _ in pairs]
        self.twice = [name for name in self if names.count(name) > 1]


def _duplicates(value: Any, where: str) -> Any:
    if isinstance(value, _Pairs):
        for key in value.twice:
            yield (where or "the top level"), (f"{where}.{key}" if where else key)
        for key, item in value.items():
            yield from _duplicates(item, f"{where}.{key}" if where else key)
    elif isinstance(value, list):
        for item in value:
            yield from _duplicates(item, where)


def _syntax_message(text: str, name: str, reason: str, position: int) -> str:
    """The message with line, column, the line itself and a caret.

    hjson takes a missing comma for part of an unquoted text and complains at the end of the line or file; the strict parser points at the
    spot itself. It is believed unless it stumbles over what only hjson allows (a comment, an unquoted key, a trailing comma).
    """
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        if not re.match(r"#|//|/\*|[A-Za-z_]\w*\s*:|[}\]]", text[error.pos :]) or error.pos >= position:
            reason, position = error.msg, error.pos
    start = text.rfind("\n", 0, position) + 1
    end = text.find("\n", position)
    line = text[start : end if end >= 0 else len(text)].rstrip("\r")
    row = text.count("\n", 0, position) + 1
    column = position - start + 1
    indent = "".join("\t" if c == "\t" else " " for c in line[: column - 1])
    return f"{name}: line {row}, column {column}: not valid JSON: {reason}\n    {line}\n    {indent}^"
