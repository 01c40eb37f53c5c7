"""Parsers of command lines: overrides anywhere, --version everywhere, and one rank that speaks."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from inspect import signature
from typing import Any, NoReturn, Protocol, TypeVar, get_type_hints

from chatgot.errors import EXIT_CONFIG
from chatgot.version import __version__

T = TypeVar("T")
Add = Callable[..., argparse.Action]
"""`add_argument` of a parser."""
Program = Callable[[argparse.Namespace], int | None]
"""What runs after the command line has been read; its exit code, None for 0."""


class Command(Protocol):
    """Adds a command to the parser; what it returns adds arguments to it."""

    def __call__(self, name: str, program: Program | str, help: str) -> Add: ...


def on_rank_0() -> bool:
    """Whether this process is the one that speaks, as far as the launcher's variables tell."""
    return (os.environ.get("RANK") or "0") == "0"


class Parser(argparse.ArgumentParser):
    """Takes KEY=VALUE anywhere among the flags, where it has an argument `overrides`; has --version."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_argument("--version", action="version", version=f"chatgot {__version__}")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take overrides out, and parse the rest, positional arguments too anywhere among the flags."""
        words = list(sys.argv[1:] if args is None else args)
        if not any(action.dest == "overrides" for action in self._actions):
            return self.parse_intermixed_args(words, namespace)
        with_value = {option for action in self._actions if action.nargs is None for option in action.option_strings}
        others, overrides, before = list[str](), list[str](), ""
        for word in words:
            is_one = re.match(r"(?!\w{16,}==?$)[A-Za-z_][\w.]*=", word) and before not in with_value
            (overrides if is_one and not os.path.exists(word) else others).append(word)  # 16 letters are base64's
            before = word
        found = self.parse_intermixed_args(others, namespace)
        found.overrides = [*(found.overrides or ()), *overrides]
        return found


class RankParser(Parser):
    """Every rank refuses a wrong command line, and rank 0 says why."""

    def error(self, message: str) -> NoReturn:
        if not on_rank_0():
            sys.exit(EXIT_CONFIG)
        super().error(message)


def whole(low: int, high: int | None = None, auto: bool = False) -> Callable[[str], Any]:
    """Make a reader of whole numbers from `low` to `high`, and perhaps of "auto", which is None, for add_argument."""
    allowed = f"a whole number from {low} {'on' if high is None else f'to {high}'}{', nor auto' if auto else ''}"

    def number(text: str) -> int | None:
        if auto and text == "auto":
            return None
        if not text.isdecimal() or int(text) < low or (high is not None and int(text) > high):
            raise argparse.ArgumentTypeError(f"{text!r} is not {allowed}")
        return int(text)

    return number


count = whole(1)


def duration(text: str) -> float:
    """Read a number of seconds or minutes from 0 on, for add_argument."""
    if not re.fullmatch(r"\d+(\.\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on")
    return float(text)


def config_argument(add: Add, what: str) -> None:
    """Add --config to a parser."""
    add("--config", default="tiny", metavar="NAME|YAML", help=f"{what} (default: tiny)")


def overrides_argument(add: Add) -> None:
    """Add --set to a parser that takes overrides among its flags too."""
    what = "overrides, as for train.py; they may stand without --set too"
    add("--set", nargs="*", action="extend", default=[], metavar="KEY=VALUE", dest="overrides", help=what)


def given_to(kind: Callable[..., T], arguments: argparse.Namespace) -> T:
    """Make the arguments of a room's function from those of a command line, lists as tuples."""
    given = {name: value for name, value in vars(arguments).items() if name in signature(kind).parameters}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def imported(name: str) -> Program:
    """Make a program of a function, "chatgot.room.module:function", which is imported when it runs.

    It gets what of the command line it has parameters for, or its type has, if its only one is named `arguments`.
    """

    def program(arguments: argparse.Namespace) -> int | None:
        module, _, function = name.partition(":")
        work = getattr(import_module(module), function)
        kind = get_type_hints(work).get("arguments")
        code = given_to(work, arguments) if kind is None else work(given_to(kind, arguments))
        return code if isinstance(code, int) else None

    return program
