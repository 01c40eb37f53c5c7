"""The command lines: --help at once, usage errors with 2, and the commands' own exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from chatgot import __version__, cli
from chatgot.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MachineError,
    NumericsError,
)
from tests.support import ROOT, environment

HEAVY = ("torch", "deepspeed", "wandb", "numpy", "yaml", "transformers", "tqdm")
PROGRAMS = {
    "launch/train.py": ("launch/train.py", ()),
    "launch/run": ("launch/run", ()),
    "launch/bench.py": ("launch/bench.py", ()),
    "chatgot": (None, ()),
    "chatgot train": (None, ("train",)),
    "chatgot sample": (None, ("sample",)),
    "chatgot prepare": (None, ("prepare",)),
    "chatgot check": (None, ("check",)),
    "chatgot verify": (None, ("verify",)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_needs_no_heavy_import(name):
    path, words = PROGRAMS[name]
    if path is not None and not (ROOT / path).exists():
        pytest.skip(f"{path} is not there")
    start = (
        f"import runpy; sys.argv = {[path, '--help']!r}; runpy.run_path({path!r}, run_name='__main__')"
        if path
        else f"from chatgot.cli import main; main({[*words, '--help']!r})"
    )
    program = f"""
import sys
try:
    {start.replace("; ", chr(10) + "    ")}
except SystemExit as end:
    assert end.code in (0, None), end.code
    print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.stderr == "[]\n"
    assert done.stdout.startswith("usage: ")


def exit_code(program, *words: str) -> int:
    with pytest.raises(SystemExit) as end:
        program(list(words))
    return int(end.value.code or 0)


def test_usage_errors_end_with_2(capsys):
    assert exit_code(cli.train) == 2
    assert "--deepspeed_config" in capsys.readouterr().err
    assert exit_code(cli.train, "--deepspeed_config", "x.json", "--out_dir", "x", "--unknown", "1") == 2
    assert exit_code(cli.main) == 2
    assert exit_code(cli.main, "sing") == 2
    assert "sample" in capsys.readouterr().err
    assert exit_code(cli.main, "sample", "x", "--temperature", "hot") == 2


def test_usage_error_is_printed_by_rank_0_only(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert exit_code(cli.train, "--unknown") == 2
    assert capsys.readouterr() == ("", "")


def test_version_and_help_end_with_0(capsys):
    assert exit_code(cli.main, "--version") == 0
    assert capsys.readouterr().out == f"chatgot {__version__}\n"
    assert exit_code(cli.train, "--help") == 0
    text = capsys.readouterr().out
    assert all(
        word in text
        for word in ("--resume_from", "auto|must|never|PATH[@TAG]", "ds.optimizer.params.lr", "75 interrupted")
    )


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError, 2), (DataError, 3), (CheckpointError, 4), (NumericsError, 5), (MachineError, 6)],
)
def test_every_refusal_has_its_exit_code_and_one_message(error, code, capsys):
    def program() -> int:
        raise error("what, where, and what to do")

    assert cli.guarded(program, debug=False) == code
    assert capsys.readouterr().err == "chatgot: what, where, and what to do\n"
    assert cli.guarded(program, debug=True) == code
    assert "Traceback" in capsys.readouterr().err


def test_message_is_printed_by_rank_0_except_for_faults_of_one_machine(monkeypatch, capsys):
    def program(error: Exception):
        def fail() -> int:
            raise error

        return fail

    monkeypatch.setenv("RANK", "3")
    assert cli.guarded(program(DataError("no text")), debug=False) == 3
    assert capsys.readouterr().err == ""
    assert cli.guarded(program(MachineError("no device")), debug=False) == 6
    assert capsys.readouterr().err == "chatgot: no device\n"


def test_programming_errors_are_not_dressed_up():
    with pytest.raises(ZeroDivisionError):
        cli.guarded(lambda: 1 // 0, debug=False)


def test_prepare_takes_overrides_among_its_texts(tmp_path: Path, text_file, capsys):
    out = tmp_path / "prepared"
    assert (
        exit_code(
            cli.main, "prepare", str(text_file), "data.tokenizer=byte", "model.max_seq_length=32", "--out", str(out)
        )
        == 0
    )
    assert f"--data {out}" in capsys.readouterr().out
    assert '"byte"' in (out / "tokenizer.json").read_text()
    assert exit_code(cli.main, "prepare", str(tmp_path / "none.txt"), "--out", str(tmp_path / "p")) == 3
    assert exit_code(cli.main, "prepare", str(text_file), "data.tokeniser=byte", "--out", str(tmp_path / "p")) == 2
    assert not (tmp_path / "p").exists()
