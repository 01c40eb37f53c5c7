from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from chatgot.inference.sample import LoadedModel, load_run
from chatgot.training import run
from tests.support import ROOT, engine_json, environment, warm_python, write_json, write_run_yaml, write_text
from tests.training import in_process
from tests.training.in_process import argv

STREAMS, QUEUE, COPIED = 4, 6, 30


class Server(NamedTuple):
    """`chatgot serve` in a process of its own."""

    process: subprocess.Popen[str]
    url: str
    model: LoadedModel
    """The same one, here."""
    text: str
    """That it was trained on."""


def start(*arguments: str | Path, python: str = "", **variables: str) -> tuple[subprocess.Popen[str], str]:
    """The process, to be used in a `with`, and its address, once it answers."""
    program = "from chatgot.cli import main; main()"
    command = [python or warm_python(), "-c", program, "serve", *map(str, arguments), "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(**variables), cwd=ROOT)
    assert process.stdout is not None
    line = process.stdout.readline()
    address = re.search(r"http://\S+", line)
    assert address is not None, f"{line!r} has no address; exit code {process.wait()}"
    return process, address[0]


@pytest.fixture(scope="session")
def served_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder, and the text beside it."""
    path = tmp_path_factory.mktemp("serve")
    text = write_text(path / "text.txt", 4_000)
    config, engine = write_run_yaml(path / "run.yaml"), write_json(path / "engine.json", engine_json())
    run.finish(in_process.prepare(argv(engine, path / "run", config, text)))
    return path / "run"


@pytest.fixture(scope="session")
def server(served_run: Path) -> Iterator[Server]:
    """One server for all tests."""
    limits = ("--streams", str(STREAMS), "--queue", str(QUEUE), "--mark_copied", str(COPIED))
    process, url = start(served_run, *limits, python=sys.executable)
    text = (served_run.parent / "text.txt").read_text(encoding="utf-8")
    with process:
        yield Server(process, url.rstrip("/"), load_run(served_run, device="cpu"), text)
        process.terminate()
        assert process.wait(60) == 0
