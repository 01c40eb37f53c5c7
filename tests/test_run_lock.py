"""One run per run folder."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from chatgot import run_folder
from chatgot.errors import ConfigError
from tests.support import ROOT, engine_json, environment, run_ranks, write_json, write_run_yaml
from tests.training import in_process
from tests.training.in_process import argv, contents

HOLDER = """
import sys, time
from pathlib import Path
from chatgot import run_folder
run_folder.acquire_lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path) -> Iterator[subprocess.Popen]:
    """Another process that holds the lock of tmp_path/out."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "out")]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def words(tmp_path, text_file) -> list[str]:
    engine = write_json(tmp_path / "engine.json", engine_json(micro=2))
    return argv(engine, tmp_path / "out", write_run_yaml(tmp_path / "run.yaml", max_steps=2), text_file)


def test_second_run_is_refused_and_named_the_holder(holder, words, tmp_path, capsys):
    before = contents(tmp_path / "out")
    assert in_process.refused(words) == 2
    said = capsys.readouterr().err
    assert (
        f"--out_dir {tmp_path / 'out'}: another run is writing there: pid {holder.pid} on host "
        f"{socket.gethostname()}, since 2" in said
    )
    ranks = run_ranks([str(ROOT / "launch" / "train.py"), *words], 2, timeout=60, check=False)
    assert [done.returncode for done in ranks] == [2, 2]
    assert f"pid {holder.pid} on host" in ranks[0].stderr
    assert ranks[1].stderr == ""
    assert contents(tmp_path / "out") == before


def test_lock_of_a_run_that_is_gone_is_taken_over_with_a_note(holder, words, tmp_path, capsys):
    holder.kill()
    holder.wait()
    assert (tmp_path / "out" / ".lock").exists()
    assert in_process.train(words) == 0
    assert f"was left by a run that is gone (pid {holder.pid} on host" in capsys.readouterr().out
    assert not (tmp_path / "out" / ".lock").exists()


def test_refused_run_leaves_no_lock_and_no_folder(words, tmp_path):
    assert in_process.refused([*words, "--resume_from", "must"]) == 4
    assert not (tmp_path / "out").exists()


def test_lock_is_free_again_after_release(tmp_path):
    folder = tmp_path / "a" / "out"
    assert run_folder.acquire_lock(folder) is None
    assert run_folder.acquire_lock(folder) is None, "the runs of one process follow each other"
    run_folder.release_lock(folder)
    run_folder.release_lock(folder)
    assert list(tmp_path.iterdir()) == []
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ConfigError, match="its lock cannot be taken"):
        run_folder.acquire_lock(blocked)


def test_lock_with_unreadable_text_is_taken_over_too(tmp_path):
    (tmp_path / ".lock").write_text("junk")
    note = run_folder.acquire_lock(Path(tmp_path))
    run_folder.release_lock(tmp_path)
    assert note is not None
    assert "junk" in note
