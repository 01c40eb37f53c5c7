"""What a person sees while it trains: a bar on a terminal, plain lines in a log. Output never stops training."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any, TextIO

from tqdm import tqdm

from chatgot.observe.journal import finite


class _Bar(tqdm):
    # tqdm's watcher thread serves bars whose updates are skipped; ours skips none, and a thread is in the way of fork
    monitor_interval = 0


class Progress:
    """Rank 0's voice; every other rank constructs it with enabled=False and stays silent.

    A stream that is gone (closed pipe, vanished terminal, full disk behind a redirect) makes it quiet for good: the
    file descriptor is pointed at the null device, so that a library's print does not raise either.
    """

    def __init__(
        self,
        max_steps: int,
        *,
        enabled: bool = True,
        stream: TextIO | None = None,
        log_format: str = "text",
    ) -> None:
        """Args: log_format: "text", or "json": an object a line instead, for programs, and no bar."""
        self.max_steps = max_steps
        self._bar: _Bar | None = None
        self._closed = False
        stream = sys.stdout if stream is None else stream
        self._stream: TextIO | None = stream if enabled else None
        self._json = log_format == "json"
        self._on_terminal = False
        with self._quiet_if_gone():
            self._on_terminal = self._stream is not None and self._stream.isatty() and not self._json
        self._colour = self._on_terminal and not os.environ.get("NO_COLOR")

    def step(self, step: int) -> None:
        """Optimizer step `step` is done: moves the bar. Prints nothing in a log."""
        if self._stream is None or not self._on_terminal or self._closed:
            return
        with self._quiet_if_gone():
            if self._bar is None:
                sized = os.get_terminal_size(self._stream.fileno()).columns > 0
                self._bar = _Bar(
                    total=self.max_steps,
                    file=self._stream,
                    # rate and time to go are the meter's
                    bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
                    miniters=1,
                    dynamic_ncols=sized,
                    # A pseudo-terminal that nobody gave a size has 0 columns and 0 rows, and tqdm then shows nothing.
                    ncols=None if sized else 120,
                    nrows=None if sized else 24,
                )
            self._bar.update(step - self._bar.n)

    def line(
        self,
        step: int,
        metrics: Mapping[str, float | int | None],
        eta_seconds: float | None = None,
        next_save: str | None = None,
    ) -> None:
        """Show a step's metrics (names of observe.journal.METRICS): those of training beside the bar, or as one line in
        a log, whose numbers stand below each other.

        Args:
            eta_seconds: what is left of the run.
            next_save: when it is saved next, for the bar.
        """
        if self._json:
            self._object(step=step, of=self.max_steps, **metrics, eta_seconds=eta_seconds)
            return
        bar = self._on_terminal and not self._closed and "train/loss" in metrics
        if bar:  # the rest is in the journal
            parts = described({name: metrics.get(name) for name in ("train/loss", "perf/tokens_per_sec")})
        else:
            parts = described(metrics, in_columns=True)
        if eta_seconds is not None:
            parts.append(f"ETA {human_seconds(eta_seconds)}")
        if not bar:
            done = f"step {step:>{len(str(self.max_steps))}}/{self.max_steps}"
            self.say(" | ".join([done, *parts]))
            return
        self.step(step)
        if next_save is not None:
            parts.append(f"save {next_save}")
        if self._bar is not None:
            with self._quiet_if_gone():
                self._bar.set_postfix_str(" | ".join(parts))

    def _object(self, **fields: Any) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        fields = {name: value for name, value in fields.items() if value is not None}
        self._print(json.dumps(finite({"time": now, **fields})))

    def say(self, message: str, warning: bool = False) -> None:
        """Print one message above the bar, or as a line. Characters that the terminal lacks are escaped."""
        if self._json:
            self._object(level="warning" if warning else "info", message=message)
        elif warning:
            self._print(f"\x1b[33mWARNING:\x1b[0m {message}" if self._colour else f"WARNING: {message}")
        else:
            self._print(message)

    def _print(self, message: str) -> None:
        if self._stream is None:
            return
        try:
            with self._quiet_if_gone():
                if self._bar is not None:
                    self._bar.write(message, file=self._stream)
                else:
                    self._stream.write(message + "\n")
                self._stream.flush()
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            self._print(message.encode(encoding, "backslashreplace").decode(encoding))

    def close(self) -> None:
        """Leave the bar as it stands. Messages may follow as plain lines."""
        self._closed = True
        bar, self._bar = self._bar, None
        if bar is not None and self._stream is not None:
            with self._quiet_if_gone():
                bar.close()

    @contextmanager
    def _quiet_if_gone(self) -> Iterator[None]:
        try:
            yield
        except UnicodeEncodeError:
            raise
        except (OSError, ValueError):  # ValueError: the stream object itself is closed
            self._go_quiet()

    def _go_quiet(self) -> None:
        stream, self._stream = self._stream, None
        if self._bar is not None:
            self._bar.disable = True
            self._bar = None
        if stream is not None:
            try:
                descriptor = stream.fileno()
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, descriptor)
                os.close(null)
            except (OSError, ValueError):
                pass  # no descriptor behind it (io.UnsupportedOperation is both): then nothing is left to flush


class _LogHandler(logging.Handler):
    """Prints records as lines of the progress, warnings with "WARNING: " before them."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self.progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        self.progress.say(record.getMessage(), warning=record.levelno >= logging.WARNING)


def show_log(progress: Progress | None = None) -> None:
    """Print what the package logs through this progress (default: on stdout), and no longer through an earlier one."""
    progress = progress or Progress(0)
    package = logging.getLogger("chatgot")
    package.handlers = [handler for handler in package.handlers if not isinstance(handler, _LogHandler)]
    package.addHandler(_LogHandler(progress))
    package.setLevel(logging.INFO)


_SHOWN: dict[str, tuple[int, Callable[[float], str]]] = {
    "train/loss": (12, lambda v: f"loss {v:.4f}"),
    "val/loss": (0, lambda v: f"val {v:.4f} nats"),
    "val/bits_per_char": (0, lambda v: f"{v:.3f} bits/char"),
    "optim/lr": (0, lambda v: f"lr {v:.2e}"),
    "optim/grad_norm": (9, lambda v: f"grad {v:.2f}"),
    "optim/loss_scale": (0, lambda v: f"scale {v:g}"),
    "optim/skipped_steps": (0, lambda v: f"skipped {v:g}" if v else ""),
    "perf/tokens_per_sec": (11, lambda v: f"{human_count(v)} tok/s"),
    "perf/step_ms": (12, lambda v: f"{v:.0f} ms/step" if v >= 10 else f"{v:.2g} ms/step"),
    "perf/mfu": (10, lambda v: f"mfu {100 * v:.1f} %"),
    "mem/peak_gib": (9, lambda v: f"{v:.2f} GiB"),
}
"""How wide a metric is in a column of a log, where its width changes from line to line, and how it is written."""


def described(metrics: Mapping[str, float | int | None], in_columns: bool = False) -> list[str]:
    """The metrics that there are as parts of a progress line: ['loss 1.4821', 'lr 3.00e-04', '41.2k tok/s', ...]."""
    values = ((metrics.get(name), width * in_columns, text) for name, (width, text) in _SHOWN.items())
    return [f"{part:>{width}}" for value, width, text in values if value is not None and (part := text(value))]


def human_seconds(seconds: float) -> str:
    """0.4 -> '0s', 192 -> '3m12s', 3700 -> '1h01m', 180000 -> '2d02h'. Not a number or infinite: '?'."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 0:
        return "-" + human_seconds(-seconds)
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h:02d}h"
    if hours:
        return f"{hours}h{m:02d}m"
    return f"{m}m{s:02d}s" if minutes else f"{s}s"


def human_count(count: float) -> str:
    """950 -> '950', 41234 -> '41.2k', 1.5e6 -> '1.50M', 2.3e9 -> '2.30B', 4e12 -> '4.00T'."""
    if not math.isfinite(count):
        return "?"
    if abs(count) < 999.5:
        return f"{count:.0f}" if abs(count) >= 10 or count == int(count) else f"{count:.1f}"
    for unit in ("k", "M", "B", "T"):
        count /= 1000
        if abs(count) < 999.5 or unit == "T":
            break
    return f"{count:.{2 if abs(count) < 10 else 1}f}{unit}"
