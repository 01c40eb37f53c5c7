"""The curves of a run, read from metrics.jsonl: what the report draws, and the terminal with the last numbers."""

from __future__ import annotations

import math
import shutil
import sys
import textwrap
import time
from array import array
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import chatgot.run_folder as run_folder
from chatgot.observe.goodput import describe
from chatgot.observe.journal import METRICS, read_lines
from chatgot.observe.progress import described
from chatgot.observe.status import EXIT_RUNNING, status

POINTS = 1000
"""Of a curve that is drawn; one of more rows is drawn in as many buckets, each with its mean, minimum and maximum."""
EVENTS = 6
"""How many of the last events are shown."""
REFRESH_SECONDS = 3.0
CURVES = (
    ("loss", (("train", "train/loss"), ("val", "val/loss"))),
    ("tokens/s", (("train", "perf/tokens_per_sec"),)),
    ("gradient norm", (("train", "optim/grad_norm"),)),
)


@dataclass
class Table:
    """Rows of one kind (training steps, evaluations, samples) of the run as it stands, by rising step."""

    steps: array[int] = field(default_factory=lambda: array("q"))
    columns: dict[str, array[float]] = field(default_factory=dict)
    """By metric, each as long as `steps`; NaN where a row lacks it."""

    def append(self, step: int, values: Mapping[str, float]) -> None:
        for name in values.keys() - self.columns.keys():
            self.columns[name] = array("d", [math.nan]) * len(self.steps)
        for name, column in self.columns.items():
            column.append(values.get(name, math.nan))
        self.steps.append(step)

    def give_up(self, step: int) -> None:
        """Forget the rows from `step` on: the run went back and trained them again."""
        keep = bisect_left(self.steps, step)
        for column in (self.steps, *self.columns.values()):
            del column[keep:]


def read_curves(journal: Path) -> dict[str, Table]:
    """Read the curves of the run as it stands, by kind: "train", "val", "sample", ...: a metric's name up to the "/"
    that is the first of its line. A run that went back, after a kill or a rollback, has only what it trained last.

    Raises:
        ConfigError: the file cannot be read.
    """
    tables: dict[str, Table] = {}
    last = -1
    for record in read_lines(journal, without=b'"digest"'):
        if record is None or not isinstance(step := record.get("step"), int):
            continue
        values = {name: _number(record[name]) for name in METRICS if name in record}
        if not values:
            continue
        table = tables.setdefault(next(iter(values)).split("/")[0], Table())
        if step < last or (table.steps and table.steps[-1] >= step):
            for one in tables.values():
                one.give_up(step)
        last = step
        table.append(step, values)
    return tables


def _number(value: Any) -> float:
    """A metric as a number; a broken one is none. Words that JSON has for what is not finite are numbers."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def drawn(table: Table, points: int = POINTS) -> dict[str, Any]:
    """What of a table is drawn: its rows as they are, or where it has more than `points`, buckets of equally many rows.

    Returns:
        {"rows": 1234, "steps": [first, last] of every bucket or [step], "metrics": {name: {"mean": [...], "min": [...],
        "max": [...], "not_finite": 0}}}: min and max only of buckets, None where a bucket has no finite number.
    """
    steps = np.frombuffer(table.steps, dtype=np.int64) if table.steps else np.empty(0, np.int64)
    rows = len(steps)
    edges = np.linspace(0, rows, min(rows, points) + 1).astype(np.int64)
    starts, ends, metrics = edges[:-1], edges[1:], {}
    for name, column in table.columns.items():
        values = np.frombuffer(column, dtype=np.float64)
        finite = np.isfinite(values)
        metrics[name] = {"not_finite": int(np.isinf(values).sum())}
        if rows <= points:
            metrics[name]["mean"] = _listed(np.where(finite, values, math.nan))
            continue
        counts = np.add.reduceat(finite.astype(np.int64), starts)
        means = np.add.reduceat(np.where(finite, values, 0.0), starts) / np.maximum(counts, 1)
        metrics[name]["mean"] = _listed(np.where(counts > 0, means, math.nan))
        metrics[name]["min"] = _listed(np.minimum.reduceat(np.where(finite, values, math.inf), starts))
        metrics[name]["max"] = _listed(np.maximum.reduceat(np.where(finite, values, -math.inf), starts))
    spans = [[int(steps[a]), int(steps[b - 1])] if b - a > 1 else [int(steps[a])] for a, b in zip(starts, ends)]
    return {"rows": rows, "steps": spans, "metrics": metrics}


def _listed(values: np.ndarray) -> list[float | None]:
    """Numbers as JSON can hold them."""
    return [value if math.isfinite(value) else None for value in values.tolist()]


def at_steps(table: Table, name: str, steps: list[int]) -> list[float | None]:
    """A metric that rises with the step (tokens, wall time) at other steps, in between by a straight line."""
    column = table.columns.get(name)
    if column is None or not steps:
        return [None] * len(steps)
    known, values = np.frombuffer(table.steps, dtype=np.int64), np.frombuffer(column, dtype=np.float64)
    finite = np.isfinite(values)
    if not finite.any():
        return [None] * len(steps)
    return np.interp(steps, known[finite], values[finite]).tolist()


def last_numbers(tables: dict[str, Table]) -> dict[str, Any]:
    """The last value of every metric, the best validation loss and its step, and the steps that were trained."""
    numbers: dict[str, Any] = {}
    for table in tables.values():
        for name, column in table.columns.items():
            last = next(filter(math.isfinite, reversed(column)), None)
            numbers |= {} if last is None else {name: last}
    if (val := tables.get("val")) is not None and "val/loss" in val.columns:
        pairs = [(loss, step) for loss, step in zip(val.columns["val/loss"], val.steps) if loss == loss]
        if pairs:
            numbers["best val/loss"], numbers["best step"] = min(pairs)
    numbers["step"] = max((table.steps[-1] for table in tables.values() if table.steps), default=0)
    return numbers


def step_of(event: Mapping[str, Any]) -> int | None:
    """The optimizer step of an event; None where it has none."""
    step = event.get("step", event.get("from_step"))
    return step if isinstance(step, int) else None


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
    import plotext

    said, code = status(run)
    tables = read_curves(run / run_folder.METRICS)
    events = [event for event in read_lines(run / run_folder.EVENTS) if event is not None]
    told = [event for event in events if event.get("event") == "goodput"]
    others = [event for event in events if event.get("event") not in ("goodput", "memory")][-EVENTS:]
    heads = [f"{run}: {said}", " | ".join(described(last_numbers(tables)))]
    heads += [f"time: {describe(told[-1])}"] if told else []
    lines = [line for text in heads for line in textwrap.wrap(text, columns)]
    lines.append("")
    lines += [f"{event.get('time', '')[:19]}  step {step_of(event)}: {event.get('event')}" for event in others]
    left = rows - len(lines) - 2
    known = {(kind, name) for kind, table in tables.items() for name in table.columns}
    curves = [(title, found) for title, parts in CURVES if (found := [part for part in parts if part in known])]
    height = max(8, left // max(1, min(len(curves), left // 8 or 1)))
    for title, parts in curves[: max(1, left // height)]:
        lines.append(_curve(title, [(name, tables[kind]) for kind, name in parts], columns, height))
    text = "\n".join(lines)
    return text if colour else plotext.uncolorize(text), code == EXIT_RUNNING


def _curve(title: str, parts: list[tuple[str, Table]], columns: int, height: int) -> str:
    import plotext

    plotext.clear_figure()
    plotext.limit_size(False, False)
    plotext.theme("clear")
    plotext.plotsize(columns, height)
    plotext.title(title)
    for (name, table), tint in zip(parts, ("blue+", "orange+")):
        curve = drawn(table, points=4 * columns)
        pairs = zip(curve["steps"], curve["metrics"][name]["mean"])
        points = [(span[-1], value) for span, value in pairs if value is not None]
        if points:
            steps, values = zip(*points)
            plotext.plot(steps, values, label=name, color=tint, marker="braille")
    return plotext.build().rstrip("\n")
