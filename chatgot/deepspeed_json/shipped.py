"""The DeepSpeed JSONs that ship with ChatGoT, and how a command line names one."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from chatgot.errors import ConfigError

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

    Raises:
        ConfigError: neither a file nor a shipped name; with the names that come close.
    """
    path = Path(name_or_path)
    if path.exists() or path.suffix or len(path.parts) != 1:
        return path  # whoever reads it says what is wrong with it
    shipped = shipped_jsons()
    if path.name in shipped:
        return shipped[path.name]
    close = difflib.get_close_matches(path.name, shipped, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    raise ConfigError(
        f"{path}: no such file, and no DeepSpeed JSON of that name ships{hint} (`chatgot configs` lists: "
        f"{', '.join(shipped)})"
    )


def shipped_table() -> list[tuple[str, str, str, str]]:
    """Name, precision, ZeRO stage and use of every shipped JSON, from the table in the folder's README."""
    rows = []
    for line in (shipped_folder() / "README.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == 5 and cells[0].endswith(".json`"):
            file, precision, stage, _, use = cells
            rows.append((file.strip("`").removesuffix(".json"), precision, stage, use))
    return rows
