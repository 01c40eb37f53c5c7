"""Read a DeepSpeed JSON from disk: its values as DeepSpeed reads them, and the place of every key and syntax error.

hjson, which DeepSpeed uses, gives the values; it allows comments, unquoted keys, trailing commas and more, which is
remarked on. It forgets where things stood, so `_Finder` looks for the places by itself.
"""

from __future__ import annotations

import base64
import json
import os
import re
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chatgot.deepspeed_json.findings import ABSENT, ConfigRefusal, Finding, Findings, Mark, meant, shortened
from chatgot.devices import DeviceFacts
from chatgot.errors import ConfigError
from chatgot.run_folder import LARGEST

AS_BASE64 = "the JSON given as base64"


@dataclass
class Document:
    """A DeepSpeed JSON as read."""

    tree: dict[str, Any]
    name: str = "ds.json"
    """The file's name in messages."""
    marks: dict[str, Mark] = field(default_factory=dict)
    """Dotted key -> its first place. Elements of lists count as parts of the list's key."""
    duplicates: list[tuple[str, Mark | None]] = field(default_factory=list)
    """Keys that were given again, with that place."""
    liberties: list[tuple[str, Mark, str]] = field(default_factory=list)
    """What hjson allows and JSON does not: its kind, its place, and the key it belongs to, if to one."""


def read_document(path: Path) -> Document:
    """Read the file, or the text that stands in the path's place as base64.

    Raises:
        ConfigError: no such file, a folder, not UTF-8, empty, not JSON (with line, column and a caret), not an object.
    """
    if path.suffix.lower() in (".yaml", ".yml"):
        raise ConfigError(f"{path}: YAML by its name, not a DeepSpeed JSON; --config takes a run YAML")
    if text := _decoded(path):
        return parse_document(text, AS_BASE64)
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file (expected a DeepSpeed JSON; ds_configs/ has complete ones)") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder, expected a DeepSpeed JSON file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > LARGEST:
        raise ConfigError(f"{path}: more than {LARGEST} bytes, which no DeepSpeed JSON has")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        raise ConfigError(f"{path}: not UTF-8: {byte}; save the file as UTF-8") from error
    return parse_document(text, str(path))


def _decoded(path: Path) -> str:
    """The JSON that a path is in URL-safe base64, as DeepSpeed takes it too where no such file exists; else empty."""
    try:
        text = base64.b64decode(str(path), altchars=b"-_", validate=True).decode()
    except ValueError:
        return ""
    return text if text.lstrip().startswith("{") and not os.path.exists(path) else ""


def name_of(path: str | os.PathLike[str]) -> str:
    """What messages call the JSON of a command line."""
    return AS_BASE64 if _decoded(Path(path)) else str(path)


def parse_document(text: str, name: str) -> Document:
    """Read a text; `name` is the file's name in messages. See `read_document`."""
    import hjson  # only whoever reads a JSON needs it

    if re.match(r"(?:\s|#.*\n)*(?:model|data|train)\s*:", text):
        raise ConfigError(f"{name}: a run YAML by its first key, not a DeepSpeed JSON; --config takes one")
    if not text.strip():
        raise ConfigError(f"{name}: empty file, expected a JSON object {{...}}")
    repeated: list[str] = []

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        tree = dict(pairs)
        names = [key for key, _ in pairs]
        repeated.extend(key for key in tree if names.count(key) > 1)
        return tree

    try:
        tree = hjson.loads(text, object_pairs_hook=members)
    except hjson.HjsonDecodeError as error:
        raise ConfigRefusal([_syntax_finding(text, name, error.msg, error.pos)]) from None
    except RecursionError:
        raise ConfigRefusal([_syntax_finding(text, name, "nested too deeply", 0)]) from None
    except (IndexError, OverflowError, ValueError) as error:  # hjson stumbles over 1e999 and quotes that never close
        raise ConfigRefusal([_syntax_finding(text, name, str(error), len(text.rstrip()) - 1)]) from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{name}: expected a JSON object {{...}}, got {type(tree).__name__}")
    document = Document(tree, name)
    _Finder(text, document).find()
    placed = [dotted for dotted, _ in document.duplicates]
    lost = [key for key in repeated if not any(dotted == key or dotted.endswith(f".{key}") for dotted in placed)]
    document.duplicates += [(key, None) for key in lost]
    return document


def check_document(document: Document, findings: Findings) -> None:
    """Note keys that were given twice as errors, and what only hjson's dialect allows once per kind."""
    for key, mark in document.duplicates:
        why = f"given twice in {key.rpartition('.')[0] or 'the top level'}; keep one of them"
        findings.add("error", key, ABSENT, why, at=mark)
    counts = Counter(kind for kind, _, _ in document.liberties)
    for kind, mark, key in {liberty[0]: liberty for liberty in reversed(document.liberties)}.values():
        often = f" ({counts[kind]} places in this file)" if counts[kind] > 1 else ""
        if kind == "unquoted text":
            why = "it runs to the end of the line, commas and comments included; put it in quotes"
            findings.add("warning", key, ABSENT, f"{kind}{often}: {why}", at=mark)
        else:
            why = "not JSON, but DeepSpeed reads it (hjson); other tools will not"
            findings.add("note", "", ABSENT, f"{kind}{often}: {why}", at=mark)


class _Finder:
    """Walk over a text that hjson has read, and note places, repeated keys and liberties in a Document.

    It changes no value. Where it loses its way, which no text is known to do, later keys have no place.
    """

    QUOTED = re.compile(r"'''.*?'''|\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'", re.DOTALL)
    COMMENT = re.compile(r"#[^\r\n]*|//[^\r\n]*|/\*.*?\*/", re.DOTALL)
    LITERAL = re.compile(
        r"(?:null|true|false|-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?)[ \t]*(?=[,}\]#\r\n]|//|/\*|\Z)"
    )

    def __init__(self, text: str, document: Document) -> None:
        self.text, self.document, self.position = text, document, 0
        self.lines = [0, *(match.end() for match in re.finditer("\n", text))]

    def find(self) -> None:
        self.skip()
        try:
            if self.text[self.position : self.position + 1] in ("{", ""):
                self.take(r"\{")
                self.elements("", "}")
            else:
                self.liberty("no braces around the whole")
                self.elements("", "")
            self.skip()
        except (LookupError, RecursionError):
            pass  # best effort: the values are hjson's

    def mark(self) -> Mark:
        line = bisect_right(self.lines, self.position)
        return Mark(line, self.position - self.lines[line - 1] + 1)

    def liberty(self, kind: str, key: str = "", at: Mark | None = None) -> None:
        self.document.liberties.append((kind, at or self.mark(), key))

    def take(self, pattern: str | re.Pattern[str]) -> str | None:
        match = re.compile(pattern).match(self.text, self.position)
        if match is None:
            return None
        self.position = match.end()
        return match.group()

    def skip(self) -> None:
        """Go behind white space and comments."""
        self.take(r"\s*")
        while self.COMMENT.match(self.text, self.position):
            self.liberty("comment")
            self.take(self.COMMENT)
            self.take(r"\s*")

    def elements(self, where: str, closing: str) -> None:
        """Walk over what stands between brackets, or, where there are none, to the text's end."""
        names: set[str] = set()
        first = True
        while True:
            end = self.mark()
            self.skip()
            mark, comma = self.mark(), self.take(",")
            self.skip()
            if self.position == len(self.text) or (closing and self.take(re.escape(closing))):
                if comma:
                    self.liberty("trailing comma", at=mark)
                return
            if not (first or comma):
                self.liberty("missing comma", at=end)
            first = False
            if closing == "]":
                self.value(where)
                continue
            mark, key = self.mark(), self.key()
            dotted = f"{where}.{key}" if where else key
            if key in names:
                self.document.duplicates.append((dotted, mark))
            names.add(key)
            self.document.marks.setdefault(dotted, mark)
            self.skip()
            if self.take(":") is None:
                raise LookupError
            self.skip()
            self.value(dotted)

    def value(self, where: str) -> None:
        if bracket := self.take(r"[{\[]"):
            self.elements(where, "}" if bracket == "{" else "]")
        elif quoted := self.QUOTED.match(self.text, self.position):
            if quoted.group()[0] == "'":
                self.liberty("text in triple quotes" if quoted.group().startswith("'''") else "single quotes", where)
            self.take(self.QUOTED)
        elif self.take(self.LITERAL) is None:
            self.liberty("unquoted text", where)
            self.take(r"[^\r\n]*")

    def key(self) -> str:
        quoted = self.QUOTED.match(self.text, self.position)
        if quoted is None:
            self.liberty("unquoted key")
            return (self.take(r"[^:{}\[\],]+") or "").rstrip()
        if quoted.group()[0] == "'":
            self.liberty("single quotes")
        self.position = quoted.end()
        inner = quoted.group()[1:-1]
        return json.loads(f'"{inner}"', strict=False) if "\\" in inner and '"' not in inner else inner


def _syntax_finding(text: str, name: str, reason: str, position: int) -> Finding:
    """With line, column, the line itself and a caret.

    hjson takes a missing comma for part of an unquoted text and complains at the end of the line or file; the strict
    parser points at the spot itself. It is believed unless it stumbles over what only hjson allows (a comment, an
    unquoted key, a trailing comma).
    """
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        if not re.match(r"#|//|/\*|[A-Za-z_]\w*\s*:|[}\]]", text[error.pos :]) or error.pos >= position:
            reason, position = error.msg, error.pos
    except (RecursionError, ValueError):
        pass  # the strict parser has no better spot
    start = text.rfind("\n", 0, position) + 1
    line = text[start:].partition("\n")[0].rstrip("\r")
    column = position - start + 1
    begin = max(0, column - 80)
    indent = "".join("\t" if c == "\t" else " " for c in line[begin : column - 1])
    mark, excerpt = Mark(text.count("\n", 0, position) + 1, column), shortened(line[begin:], 120)
    why, excerpt = f"not valid JSON: {shortened(reason)}", f"    {excerpt}\n    {indent}^"
    return Finding("error", name, mark.line, mark.column, "", ABSENT, why, excerpt=excerpt)


# --- the JSONs that ship with ChatGoT ---

PACKAGE = Path(__file__).resolve().parent.parent


def shipped_folder() -> Path:
    """The folder of the shipped JSONs: inside an installed package, or beside the package in a checkout."""
    installed = PACKAGE / "ds_configs"
    return installed if installed.is_dir() else PACKAGE.parent / "ds_configs"


def shipped_jsons() -> dict[str, Path]:
    """Path of every shipped JSON by its name (`bf16_zero2`), sorted; relative to the current folder if it is below."""
    here = Path.cwd()
    paths = {path.stem: path for path in sorted(shipped_folder().glob("*.json"))}
    return {name: path.relative_to(here) if path.is_relative_to(here) else path for name, path in paths.items()}


def find_json(name_or_path: str | os.PathLike[str]) -> Path:
    """The file that a command line means: what exists there or looks like a path, else the shipped JSON of that name.
    A JSON as base64 stays as it is.

    Raises:
        ConfigError: neither a file nor a shipped name; with the names that come close.
    """
    path = Path(name_or_path)
    if os.path.exists(path) or path.suffix or len(path.parts) != 1 or _decoded(path):
        return path  # whoever reads it says what is wrong with it
    shipped = shipped_jsons()
    if path.name in shipped:
        return shipped[path.name]
    close = meant(path.name, shipped)
    hint = f"; did you mean '{close}'?" if close else ""
    raise ConfigError(
        f"{path}: no such file, and no DeepSpeed JSON of that name ships{hint} "
        f"(`chatgot configs` lists: {', '.join(shipped)})"
    )


def default_json(facts: DeviceFacts, ranks: int) -> Path:
    """Choose the shipped JSON for a run that names none, by its device and number of ranks."""
    if facts.kind == "cpu":
        return shipped_jsons()["fp32_zero0_muon"]
    return shipped_jsons()["fp16_zero2" if not facts.bf16 else "bf16_zero1" if ranks == 1 else "bf16_zero2"]


def shipped_table() -> list[tuple[str, str, str, str]]:
    """Name, precision, ZeRO stage and use of every shipped JSON, from the table in the folder's README."""
    rows = []
    for line in (shipped_folder() / "README.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == 5 and cells[0].endswith(".json`"):
            file, precision, stage, _, use = cells
            rows.append((file.strip("`").removesuffix(".json"), precision, stage, use))
    return rows
