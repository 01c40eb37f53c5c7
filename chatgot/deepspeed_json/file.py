"""From a DeepSpeed JSON on disk to a plain tree and the place of every key; syntax errors show the spot.

DeepSpeed's dialect (comments, unquoted keys, trailing commas) is accepted as DeepSpeed accepts it, and remarked on.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from chatgot.deepspeed_json import schema
from chatgot.deepspeed_json.findings import (
    ABSENT,
    ConfigRefusal,
    Finding,
    Findings,
)
from chatgot.deepspeed_json.relaxed_json import Document, JsonSyntaxError, parse
from chatgot.errors import ConfigError


def read_document(path: Path) -> Document:
    """The file as nested dicts, with places.

    Raises:
        ConfigError: no such file, a folder, not UTF-8, empty, not JSON (with line, column and a caret), not an object.
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
        raise ConfigError(
            f"{path}: not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; save the file as UTF-8"
        ) from error
    return parse_document(text, str(path))


def parse_document(text: str, name: str) -> Document:
    """`text` as nested dicts, with places; `name` is the file's name in messages. See `read_document`."""
    if not text.strip():
        raise ConfigError(f"{name}: empty file, expected a JSON object {{...}}")
    try:
        document = parse(text)
    except JsonSyntaxError as error:
        raise ConfigRefusal([_syntax_finding(text, name, error)]) from None
    if not isinstance(document.tree, dict):
        raise ConfigError(f"{name}: expected a JSON object {{...}}, got {type(document.tree).__name__}")
    return document


def check_document(document: Document, findings: Findings) -> None:
    """Keys that were given twice are errors; what only hjson's dialect allows is a note, once per kind."""
    for key, mark in document.duplicates:
        section = key.rpartition(".")[0] or "the top level"
        why = f"given twice in {section}; keep one of them"
        findings.all.append(Finding("error", findings.file, mark.line, mark.column, key, ABSENT, why))
    seen: dict[str, int] = {}
    for liberty in document.liberties:
        seen[liberty.kind] = seen.get(liberty.kind, 0) + 1
    for kind, times in seen.items():
        first = next(liberty for liberty in document.liberties if liberty.kind == kind)
        often = f" ({times} places in this file)" if times > 1 else ""
        if kind == "unquoted text":
            why = f"{kind}{often}: it runs to the end of the line, commas and comments included; put it in quotes"
            findings.all.append(
                Finding("warning", findings.file, first.mark.line, first.mark.column, first.key, ABSENT, why)
            )
        else:
            why = f"{kind}{often}: not JSON, but DeepSpeed reads it (hjson); other tools will not"
            findings.all.append(Finding("note", findings.file, first.mark.line, first.mark.column, "", ABSENT, why))


def plain_copy(value: Any) -> Any:
    """A deep copy made of plain dicts and lists."""
    if isinstance(value, dict):
        return {key: plain_copy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_copy(item) for item in value]
    return value


def _syntax_finding(text: str, name: str, fault: JsonSyntaxError) -> Finding:
    """With line, column, the line itself and a caret.

    hjson takes a missing comma for part of an unquoted text and complains at the end of the line or file; the strict
    parser points at the spot itself. It is believed unless it stumbles over what only hjson allows (a comment, an
    unquoted key, a trailing comma).
    """
    reason, position = fault.reason, fault.position
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        if not re.match(r"#|//|/\*|[A-Za-z_]\w*\s*:|[}\]]", text[error.pos :]) or error.pos >= position:
            reason, position = error.msg, error.pos
    except (RecursionError, ValueError):
        pass  # the strict parser has no better spot
    start = text.rfind("\n", 0, position) + 1
    end = text.find("\n", position)
    line = text[start : end if end >= 0 else len(text)].rstrip("\r")
    row = text.count("\n", 0, position) + 1
    column = position - start + 1
    indent = "".join("\t" if c == "\t" else " " for c in line[: column - 1])
    excerpt = f"    {line}\n    {indent}^"
    return Finding("error", name, row, column, "", ABSENT, f"not valid JSON: {reason}", excerpt=excerpt)


def apply_overrides(tree: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """The JSON's tree with overrides put in, under the spelling that the file uses. A section set to null is taken
    out.
    """
    for dotted, value in overrides.items():
        section: schema.Section | None = schema.ROOT
        here = tree
        *parents, last = dotted.split(".")
        for parent in parents:
            name, node = _spelling(parent, here, section)
            below = here.get(name)
            if not isinstance(below, dict):
                below = here[name] = {}
            here = below
            section = node if isinstance(node, schema.Section) else None
        name, node = _spelling(last, here, section)
        if value is None and isinstance(node, schema.Section):
            here.pop(name, None)
        else:
            here[name] = value
    return tree


def _spelling(
    name: str, here: dict[str, Any], section: schema.Section | None
) -> tuple[str, schema.Key | schema.Section | None]:
    """How the file spells a key, and its node."""
    if section is None:
        return name, None
    documented = schema.spellings(section).get(name, name)
    node = section.keys.get(documented)
    if node is not None and name not in here:
        name = next((other for other in (documented, node.alias) if other and other in here), name)
    return name, node
