"""`chatgot plan`: one JSON, or all of a folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from chatgot.errors import ConfigError
from chatgot.plan import report
from chatgot.plan.estimate import Estimate
from chatgot.plan.remedies import find_remedies
from chatgot.plan.request import read_request

SHIPPED = Path(__file__).resolve().parent.parent.parent / "ds_configs"


@dataclass(frozen=True)
class PlanArguments:
    """The command line."""

    deepspeed_config: Path | None
    config: str
    world_size: int
    device: str
    overrides: tuple[str, ...] = ()
    vocab_size: int | None = None
    sweep: bool = False
    format: str = "text"


def plan(arguments: PlanArguments) -> str:
    """What the command prints.

    Raises:
        ConfigError: files, names or numbers are wrong, or the JSON is refused.
    """
    if arguments.sweep:
        return _sweep(arguments)
    if arguments.deepspeed_config is None:
        raise ConfigError("chatgot plan: which JSON? Give one, or --sweep for all of ds_configs/")
    request = _request(arguments, arguments.deepspeed_config)
    found = request.plan()
    remedies = [] if found.fits else find_remedies(request, found)
    if arguments.format == "json":
        return json.dumps(report.tree(request, found, remedies), indent=2)
    return report.text(request, found, remedies)


def _sweep(arguments: PlanArguments) -> str:
    folder = arguments.deepspeed_config or SHIPPED
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise ConfigError(
            f"--sweep: {folder} is no folder with JSON files; name the one that holds them: chatgot plan FOLDER --sweep"
        )
    rows: list[tuple[str, Estimate | str]] = []
    trees = []
    for path in paths:
        request = _request(arguments, path)
        try:
            found = request.plan()
        except ConfigError as error:
            rows.append((path.name, str(error).splitlines()[0]))
            trees.append({"deepspeed_config": str(path), "refused": str(error)})
        else:
            rows.append((path.name, found))
            trees.append(report.tree(request, found, []))
    if arguments.format == "json":
        return json.dumps(trees, indent=2)
    head = f"{arguments.config}, {arguments.world_size} x {request.device.name}, of {request.device.memory / 2**30:.1f} GiB"
    return "\n".join([head, report.table(rows), *(f"note: {note}" for note in request.notes)])


def _request(arguments: PlanArguments, path: Path):
    return read_request(
        path, arguments.config, arguments.world_size, arguments.device, list(arguments.overrides), arguments.vocab_size
    )
