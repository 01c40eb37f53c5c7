"""`chatgot report --terminal`: the curves and last numbers of a run in a terminal, also while it trains."""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import chatgot.run_folder as run_folder
from chatgot.errors import ConfigError
from chatgot.observe.curves import Table, drawn, read_curves
from chatgot.observe.goodput import describe
from chatgot.observe.journal import read_lines
from chatgot.observe.progress import described
from chatgot.observe.report import report, step_of
from chatgot.observe.status import EXIT_RUNNING, status

EVENTS = 6
"""How many of the last events are shown."""
REFRESH_SECONDS = 3.0
CURVES = (
    ("loss", (("train", "train/loss"), ("val", "val/loss"))),
    ("tokens/s", (("train", "perf/tokens_per_sec"),)),
    ("gradient norm", (("train", "optim/grad_norm"),)),
)


def report_or_show(runs: Sequence[Path], out: Path | None, terminal: bool, follow: bool) -> None:
    """`chatgot report`: write the file, or show one run here.

    Raises:
        ConfigError: what is asked for does not go together; see `report` and `show`.
    """
    if not (terminal or follow):
        print(f"report: {report(runs, out)}")
    elif out is not None or len(runs) > 1:
        raise ConfigError("chatgot report --terminal: shows one run and writes no file; leave out --out and other runs")
    else:
        show(runs[0], follow)


def show(run: Path, follow: bool = False) -> None:
    """Print the state of a run, and with `follow` again every few seconds until it ends or Ctrl-C.

    Raises:
        ConfigError: not a run folder, or it cannot be read.
    """
    run_folder.check(run)
    colour = sys.stdout.isatty()
    try:
        while True:
            began = time.monotonic()
            text, running = page(run, *shutil.get_terminal_size((100, 40)), colour=colour)
            # Home, every line to its end, and what is below: no flicker, and nothing of a larger picture stays.
            redrawn = follow and colour
            print("\x1b[H" + text.replace("\n", "\x1b[K\n") + "\x1b[J" if redrawn else text, flush=True)
            if not (follow and running):
                return
            # A long journal takes seconds to read: the run beside it keeps most of the processor.
            time.sleep(max(REFRESH_SECONDS, 9 * (time.monotonic() - began)))
    except KeyboardInterrupt:
        return


def page(run: Path, columns: int, rows: int, colour: bool) -> tuple[str, bool]:
    """The text of one picture, at most so wide and high, and whether the run is still running."""
    said, code = status(run)
    tables = read_curves(run / run_folder.METRICS)
    events = [event for event in read_lines(run / run_folder.EVENTS) if event is not None]
    last: dict[str, Any] = {}
    for table in tables.values():
        last |= {name: column[-1] for name, column in table.columns.items() if column[-1] == column[-1]}
    told = [event for event in events if event.get("event") == "goodput"]
    others = [event for event in events if event.get("event") not in ("goodput", "memory")][-EVENTS:]
    heads = [f"{run}: {said}", " | ".join(described(last)[0])]
    heads += [f"time: {describe(told[-1])}"] if told else []
    lines = [line for text in heads for line in textwrap.wrap(text, columns)]
    lines.append("")
    lines += [f"{event.get('time', '')[:19]}  step {step_of(event)}: {event.get('event')}" for event in others]
    left = rows - len(lines) - 2
    curves = [(title, parts) for title, parts in CURVES if any(name in _columns(tables, kind) for kind, name in parts)]
    height = max(8, left // max(1, min(len(curves), left // 8 or 1)))
    for title, parts in curves[: max(1, left // height)]:
        lines.append(_curve(title, [(name, tables[kind]) for kind, name in parts if kind in tables], columns, height))
    text = "\n".join(lines)
    return text if colour else _without_colour(text), code == EXIT_RUNNING


def _columns(tables: dict[str, Table], kind: str) -> dict[str, Any]:
    return tables[kind].columns if kind in tables else {}


def _curve(title: str, parts: list[tuple[str, Table]], columns: int, height: int) -> str:
    import plotext

    plotext.clear_figure()
    plotext.limit_size(False, False)
    plotext.theme("clear")
    plotext.plotsize(columns, height)
    plotext.title(title)
    colours = ("blue+", "orange+")
    for (name, table), tint in zip(parts, colours):
        if name not in table.columns:
            continue
        curve = drawn(table, points=4 * columns)
        pairs = zip(curve["steps"], curve["metrics"][name]["mean"])
        points = [(span[-1], value) for span, value in pairs if value is not None]
        if points:
            steps, values = zip(*points)
            plotext.plot(steps, values, label=name, color=tint, marker="braille")
    return plotext.build().rstrip("\n")


def _without_colour(text: str) -> str:
    import plotext

    return plotext.uncolorize(text)
