"""What `chatgot status` says of a run folder, for each way in which a run can end. A run that is running, one that was
stopped and one that is complete are in tests/distributed/test_launchers.py.
"""

from __future__ import annotations

import ast
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import chatgot.run_folder as run_folder
from chatgot.errors import ConfigError
from chatgot.observe.journal import Events, Journal
from chatgot.observe.status import holder_of_lock, status
from tests.support import ROOT, environment

MEMORY = {"doing": "step 7", "micro_batch": 4}


def written(folder: Path, *events: tuple[str, dict[str, Any]]) -> Path:
    """A run folder with these events, and a journal up to step 7."""
    folder.mkdir(exist_ok=True)
    writer, journal = Events(folder / run_folder.EVENTS), Journal(folder / run_folder.METRICS)
    for kind, fields in events:
        writer.event(kind, **fields)
    journal.append({"step": 7, "train/loss": 1.0})
    writer.close()
    journal.close()
    return folder


@pytest.mark.parametrize(
    ("events", "code", "said"),
    [
        ([("started", {"step": 0})], 75, "ended without a word at step 7 or later"),
        ([("started", {"step": 0}), ("saved", {"step": 5})], 75, "saved at step 5: run the same command again"),
        ([("started", {"step": 0}), ("failed", {"step": 6, "exit_code": 5, "error": "diverged"})], 5, "code 5: div"),
        ([("started", {"step": 0}), ("out_of_memory", {**MEMORY, "exit_code": 75}),
          ("failed", {"step": 7, "exit_code": 6, "error": "x"})], 75, "memory ran out in step 7; nothing"),
        ([("started", {"step": 0}), ("preempted", {"step": 7, "signal": "SIGHUP"}), ("resumed", {"step": 7}),
          ("finished", {"step": 9, "val/loss": 1.25})], 0, "finished at step 9, val/loss 1.2500"),
        ([("finished", {"step": 9}), ("resumed", {"step": 9})], 75, "ended without a word"),
        ([("started", {"step": 0}), ("failed", {"step": 6, "exit_code": "x"})], 1, "failed with exit code 1"),
    ],
    ids=range(7),
)  # fmt: skip
def test_the_last_start_decides(tmp_path: Path, events: Any, code: int, said: str) -> None:
    found = status(written(tmp_path, *events))
    assert (found[1], said in found[0]) == (code, True), found


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError, match="no run has started here"):
            status(folder)


def test_a_start_that_was_refused_is_known_though_it_has_changed_nothing(tmp_path: Path) -> None:
    """Otherwise a script that starts a run again on 75 would do so for ever."""
    out, cache = tmp_path / "out", {"CHATGOT_CACHE": str(tmp_path / "cache")}

    def command(*words: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-c", "from chatgot.cli import main; main()", *words]
        return subprocess.run(line, env=environment(**cache), cwd=ROOT, capture_output=True, text=True)

    def refused() -> subprocess.CompletedProcess[str]:
        done = command("train", "--out_dir", str(out), "train.max_step=3")
        assert done.returncode == 2
        return command("status", str(out))

    assert refused().returncode == 2
    assert not out.exists()
    assert command("status", str(tmp_path / "other")).stderr.startswith(f"chatgot: {tmp_path / 'other'}: no run has")
    written(out, ("started", {"step": 0}), ("preempted", {"step": 7, "signal": "SIGTERM"}))
    assert command("status", str(out)).returncode == 75
    said = refused()
    assert said.returncode == 2, said
    assert "the last start ended before its first step, with exit code 2: override train.max_step=3" in said.stdout
    written(out, ("resumed", {"step": 7}), ("finished", {"step": 9}))
    assert command("status", str(out)).returncode == 0


def test_a_start_that_is_killed_is_known_and_one_that_goes_on_too(tmp_path: Path) -> None:
    out, cache = tmp_path / "out", {"CHATGOT_CACHE": str(tmp_path / "cache")}
    program = "from chatgot.training.stop import StopSignals; import pathlib, sys; "
    program += (
        "s = StopSignals(True, pathlib.Path(sys.argv[1])); s.__enter__(); print(flush=True); input(); s.started()"
    )

    def said() -> tuple[str, int]:
        code = (
            "from chatgot.observe.status import status; import pathlib, sys; print(status(pathlib.Path(sys.argv[1])))"
        )
        line = [sys.executable, "-c", code, str(out)]
        return ast.literal_eval(subprocess.check_output(line, env=environment(**cache), text=True))

    def start() -> subprocess.Popen[str]:
        line = [sys.executable, "-c", program, str(out)]
        run = subprocess.Popen(line, env=environment(**cache), stdin=-1, stdout=-1, text=True)
        assert run.stdout is not None
        run.stdout.readline()
        return run

    killed = start()
    assert said() == (f"starting, pid {killed.pid}: before its first step", 10)
    killed.kill()
    killed.communicate()
    assert (said()[1], "with exit code 75: without a word (killed, or" in said()[0]) == (75, True)
    start().communicate("\n")
    assert not list((tmp_path / "cache" / "starts").iterdir())


def test_a_lock_counts_as_long_as_somebody_holds_it(tmp_path: Path) -> None:
    written(tmp_path, ("started", {"step": 0}))
    lock = "import sys, pathlib, chatgot.run_folder as r; r.acquire_lock(pathlib.Path(sys.argv[1])); print(); input()"
    run = subprocess.Popen([sys.executable, "-c", lock, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert run.stdout is not None
    run.stdout.readline()
    assert status(tmp_path) == (
        f"running, {holder_of_lock(tmp_path)}: at step 7, nothing is saved",
        10,
    )
    assert holder_of_lock(tmp_path) is not None
    run.kill()
    run.communicate()
    assert status(tmp_path)[1] == 75  # the file is still there
    lock_file = tmp_path / run_folder.LOCK
    lock_file.write_text(lock_file.read_text().replace(json.dumps(socket.gethostname()), '"elsewhere"'))
    assert status(tmp_path)[1] == 75
