"""`chatgot chat` in a real terminal: a run is trained, and the program is spoken to through a pty."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from chatgot.inference.chat import Conversation, _speaker_of
from chatgot.inference.sample import DrawArguments, load_run
from chatgot.training import run
from tests.support import ROOT, engine_json, environment, warm_python, write_json, write_run_yaml, write_text
from tests.training import in_process
from tests.training.in_process import argv


class Terminal:
    """The program at the other end of a pty."""

    def __init__(self, command: list[str]) -> None:
        self.fd, slave = pty.openpty()
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env={**environment(), "TERM": "dumb"},
            cwd=ROOT, start_new_session=True,
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def until(self, pattern: str, seconds: float = 120) -> str:
        """What the program writes up to the pattern."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen)):
            assert time.monotonic() < end, f"{pattern!r} never came; seen: {self.seen!r}"
            if select.select([self.fd], [], [], 0.2)[0]:
                self.seen += os.read(self.fd, 65536).decode("utf-8", "replace").replace("\r", "")
        before, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return before

    def ask(self, line: str, answer: str = r"\n> ") -> str:
        os.write(self.fd, line.encode() + b"\n")
        return self.until(answer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("chat")
    text = write_text(path / "text.txt", 4_000)
    text.write_text(text.read_text() + "\n" + "KING: The night.\nDUKE: The wolf.\n" * 20)
    config, engine = write_run_yaml(path / "run.yaml"), write_json(path / "engine.json", engine_json())
    run.finish(in_process.prepare(argv(engine, path / "run", config, text)))
    return path / "run"


@pytest.fixture
def terminal(folder) -> Iterator[Terminal]:
    program = "from chatgot.cli import main; main()"
    arguments = [str(folder), "--device", "cpu", "--max_new_tokens", "30"]
    talk = Terminal([warm_python(), "-c", program, "chat", *arguments])
    talk.until("> ")
    yield talk
    talk.process.kill()
    talk.process.wait()
    os.close(talk.fd)


def test_a_conversation_in_a_terminal(terminal, tmp_path):
    first = terminal.ask("The night").split("\n", 1)[1]
    assert len(first) > 20
    assert "taken back" not in terminal.ask("/more")
    assert "'The night" in terminal.ask("/undo")
    assert "empty again" in terminal.ask("/undo")
    assert terminal.ask("The night").split("\n", 1)[1] != first, "another reply after /undo"
    terminal.ask("/undo")
    assert "seed is now 0" in terminal.ask("/seed 0")
    assert terminal.ask("The night").split("\n", 1)[1] == first, "the same seed draws the same reply"
    assert "temperature is now 0.0" in terminal.ask("/temperature 0")
    assert "must be a finite number" in terminal.ask("/temperature -1")
    assert "must be > 0" in terminal.ask("/top_p 0")
    assert "no such command" in terminal.ask("/hlep")
    assert "/undo" in terminal.ask("/help")
    assert "Ω" in terminal.ask("Ω"), "a character that the text never had is refused by name"
    saved = tmp_path / "saved.txt"
    assert "saved" in terminal.ask(f"/save {saved}")
    assert saved.read_text().startswith("The night")
    assert first.rsplit("\n> ", 1)[0].strip() in saved.read_text()
    assert "exists already" in terminal.ask(f"/save {saved}")
    os.write(terminal.fd, b"/sedd\x1b[D\x7fe\x01\x0b/seed\n")  # left, backspace, home, kill: lines can be edited
    assert "seed is 0" in terminal.until("\n> ")
    os.write(terminal.fd, b"\x10\n")  # Ctrl-P: the line before again
    assert "seed is 0" in terminal.until("\n> ")
    os.write(terminal.fd, b"\x04")
    assert terminal.process.wait(60) == 0


@pytest.mark.parametrize("before", ["", "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "])
def test_ctrl_c_stops_the_reply_and_not_the_program(before, folder):
    """Also where it was ignored before, as in what a script starts with &."""
    program = f"{before}from chatgot.cli import main; main()"
    arguments = [str(folder), "--device", "cpu", "--max_new_tokens", "1000000"]
    talk = Terminal([warm_python() if before else sys.executable, "-c", program, "chat", *arguments])
    talk.until("> ")
    os.write(talk.fd, b"The night\n")
    talk.until("The night\n.{5}")
    os.killpg(talk.process.pid, signal.SIGINT)  # what a terminal sends to its foreground processes
    talk.until(r"\[stopped\]\n> ")
    # At the prompt. Python does not notice one that comes between writing the prompt and waiting for a line, so that a
    # person would press it again.
    for _ in range(30):
        os.killpg(talk.process.pid, signal.SIGINT)
        if select.select([talk.fd], [], [], 2)[0]:
            break
    talk.until("\n> ")
    assert talk.process.poll() is None
    talk.ask("/quit", "/quit")
    assert talk.process.wait(60) == 0
    os.close(talk.fd)


def test_turns_of_a_scene_end_where_the_speaker_would_speak_again():
    assert _speaker_of("KING HENRY: who goes there?") == "KING HENRY"
    assert _speaker_of("He said: who goes there?") is None
    assert _speaker_of("12:30") is None


def test_undo_gives_back_the_speaker_too(folder):
    settings = DrawArguments(folder, max_new_tokens=5)
    talk = Conversation(load_run(folder, device="cpu"), settings, io.StringIO())
    talk.answer("KING: The night.")
    talk.answer("DUKE: The wolf.")
    assert talk.speaker == "DUKE"
    talk.answer("/undo")
    assert talk.speaker == "KING"
    talk.answer("/undo")
    assert (talk.speaker, talk.text) == (None, "")
