"""A text written in turns, you and the model: `chatgot chat`."""

from __future__ import annotations

import contextlib
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from chatgot.errors import ConfigError
from chatgot.files import write_atomically
from chatgot.inference.copied import TrainingText, listed, marked
from chatgot.inference.sample import DrawArguments, LoadedModel, Reply, check_drawing

HELP = """The model continues text: what you type is added to it, and it goes on from there.
A line such as "HENRY: Who goes there?" is a turn of a scene: it gets a line of
its own, and the reply ends where HENRY would speak again. An empty line does
the same as /more. Ctrl-C stops a reply, Ctrl-D ends the program.
  /more             go on from where the text ends
  /undo             take back your last line and its reply; the next is another
  /temperature X    0 is greedy
  /top_p X          draw from the likeliest tokens of this probability; 1: all
  /seed N           begin to draw anew
  /save PATH        write the text so far to a new file
  /help             this
  /quit"""

_BEFORE = 1000
"""Characters before a reply in which a copied passage may begin."""
_TURN = re.compile(r"\s*([^\s:][^:]{0,40}):")
"""The speaker of a turn stands before the first colon."""


def chat(arguments: DrawArguments) -> None:
    """Read lines from stdin until it ends or says /quit, and write replies to stdout.

    Raises:
        ConfigError: a setting out of range.
        CheckpointError, DataError: see `RunArguments.open`.
    """
    check_drawing(**arguments.drawing)
    with contextlib.suppress(ImportError):  # some builds of Python lack it
        import readline  # noqa: F401  (input() then edits lines and remembers them)
    model, source = arguments.open()
    talk = Conversation(model, arguments, sys.stdout, source)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a script starts with &
    try:
        _talk(talk)
    finally:
        signal.signal(signal.SIGINT, before)


def _talk(talk: Conversation) -> None:
    """Read and answer lines until there are no more."""
    talk.say("/help explains, Ctrl-C stops a reply, Ctrl-D ends.")
    while True:
        try:
            line = input("> ")
        except EOFError:
            talk.say("")
            return
        except KeyboardInterrupt:  # at the prompt: forget the line, as shells do
            talk.say("")
            continue
        if line.strip() in ("/quit", "/exit"):
            return
        try:
            talk.answer(line)
        except ConfigError as error:
            talk.say(str(error))


class Conversation:
    """The text so far, and the settings that the next reply is drawn with."""

    def __init__(
        self, model: LoadedModel, settings: DrawArguments, out: TextIO, source: TrainingText | None = None
    ) -> None:
        self.model = model
        self._source = source
        self.settings = settings
        self.text = ""
        self._out = out
        self._before: list[tuple[str, str | None]] = []  # text and speaker before each turn that can be undone
        self._drawn = 0  # replies since the seed was set: each draws from a seed of its own
        self.speaker: str | None = None

    def say(self, line: str) -> None:
        print(line, file=self._out, flush=True)

    def answer(self, line: str) -> None:
        """Do what a line asks for: a command, or a turn and the reply to it.

        Raises:
            ConfigError: a command or value that is not understood, or characters that the model never saw.
        """
        if not line.startswith("/"):
            self._turn(line)
            return
        name, _, value = line[1:].strip().partition(" ")
        if name == "help":
            self.say(HELP)
        elif name == "more":
            self._turn("")
        elif name == "undo":
            if not self._before:
                raise ConfigError("/undo: there is nothing to take back")
            self.text, self.speaker = self._before.pop()
            self.say(f"taken back; the text now ends: {self.text[-60:]!r}" if self.text else "the text is empty again")
        elif name in ("temperature", "top_p", "seed"):
            self._set(name, value.strip())
        elif name == "save":
            self._save(value.strip())
        else:
            raise ConfigError(f"/{name}: no such command; /help lists them")

    def _turn(self, line: str) -> None:
        before, speaker = self.text, self.speaker
        if name := _speaker_of(line):
            speaker = name
            added = ("\n" if before and not before.endswith("\n") else "") + line.strip() + "\n"
        else:
            added = line
        text = before + added
        if not text:
            raise ConfigError("there is no text to go on from: type its beginning")
        reply = self._reply(text, f"\n{speaker}:" if speaker else None)  # refuses before anything is changed
        self._before.append((before, self.speaker))
        self.text, self.speaker = text + reply, speaker
        self._show_copies(len(text))

    def _show_copies(self, begin: int) -> None:
        """Mark what is copied of the text from `begin` on, if that is asked for; a passage may begin before it."""
        least = self.settings.mark_copied
        if self._source is None or least is None or begin == len(self.text):
            return
        recent = self.text[max(0, begin - _BEFORE) :]
        drawn = len(self.text) - begin
        spans = self._source.spans(recent, least, after=len(recent) - drawn)
        first = min(spans[0].begin, len(recent) - drawn) if spans else 0
        spans = [replace(span, begin=span.begin - first, end=span.end - first) for span in spans]
        if spans:
            self.say(marked(recent[first:], spans, self._out) + "\n")
        self.say(listed(recent[first:], spans, least, drawn) + "\n")

    def _reply(self, before: str, end: str | None) -> str:
        """Stream the continuation of a text up to `end`, which is left out, and return it; Ctrl-C ends it sooner."""
        reply = Reply(self.model.tokenizer, [end] if end else [])

        def show(text: str) -> None:
            self._out.write(text)
            self._out.flush()

        drawing = replace(self.settings, seed=(self.settings.seed + self._drawn) % 2**63).drawing
        stopped = False
        try:
            self.model.continuations(
                before, **drawing, stop=lambda _: reply.ended, on_token=lambda row, token: show(reply.push(token))
            )
        except KeyboardInterrupt:
            stopped = True
        self._drawn += 1
        show(reply.flush())
        text = reply.text
        if reply.ended:
            show("\n")
            text += "\n"
        self.say("\n[stopped]" if stopped else "" if text.endswith("\n") else "\n")
        return text

    def _set(self, name: str, value: str) -> None:
        if not value:
            self.say(f"{name} is {getattr(self.settings, name)}")
            return
        try:
            number = int(value) if name == "seed" else float(value)
        except ValueError:
            raise ConfigError(f"/{name} {value}: is no {'whole ' if name == 'seed' else ''}number") from None
        changed = replace(self.settings, **{name: number})
        check_drawing(**changed.drawing)
        self.settings = changed
        if name == "seed":
            self._drawn = 0
        self.say(f"{name} is now {number}")

    def _save(self, name: str) -> None:
        if not name:
            raise ConfigError("/save: give the path of a new file")
        path = Path(name).expanduser()
        if path.exists():
            raise ConfigError(f"/save {path}: exists already; give another name")
        try:
            write_atomically(path, self.text)
        except OSError as error:
            raise ConfigError(f"/save {path}: {error.strerror or error}") from error
        self.say(f"saved {len(self.text)} characters to {path}")


def _speaker_of(line: str) -> str | None:
    """Who speaks in a line like "KING HENRY: Who goes there?"; None for a line that is no turn of a scene."""
    match = _TURN.match(line)
    return match[1].strip() if match and match[1].upper() == match[1] and match[1].lower() != match[1] else None
