"""The command lines: --help at once, usage errors with 2, and the commands' own exit codes."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest

from chatgot import __version__, cli
from chatgot.config.run import preset_names
from chatgot.deepspeed_json.read import shipped_jsons
from chatgot.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MachineError,
    NumericsError,
)
from tests.support import ROOT, encoded, engine_json, environment

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
    "chatgot plan": (None, ("plan",)),
    "chatgot tune": (None, ("tune",)),
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
    assert exit_code(cli.main, "sing") == 2
    assert exit_code(cli.main, "help", "sing") == 2
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


def test_without_arguments_and_help_show_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(cli.main) == 0
    shown = capsys.readouterr().out
    for name in ("train", "prepare", "sample", "verify", "check", "plan", "tune", "presets", "configs"):
        assert f"\n    {name} " in shown
    assert exit_code(cli.main, "help") == 0
    assert capsys.readouterr().out == shown
    assert exit_code(cli.main, "help", "sample") == 0
    of_help = capsys.readouterr().out
    assert exit_code(cli.main, "sample", "--help") == 0
    assert capsys.readouterr().out == of_help
    assert exit_code(cli.main, "help", "train") == 0
    assert "--resume_from" in capsys.readouterr().out


def test_presets_lists_every_preset_with_its_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(cli.main, "presets") == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert set(preset_names()) <= set(lines)
    assert lines["tiny"].split()[1:] == ["modern", "877,696", "128", "x", "4", "x", "4", "128", "char"]
    assert "124,439,808" in lines["gpt2_small"]


def test_configs_lists_every_json_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(cli.main, "configs") == 0
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[1:]}
    assert set(lines) == set(shipped_jsons())
    for name, (precision, stage, *use) in lines.items():
        tree = json.loads(shipped_jsons()[name].read_text())
        enabled = [kind for kind in ("bf16", "fp16") if kind in tree]
        assert [precision] == (enabled or ["fp32"])
        assert int(stage) == tree["zero_optimization"]["stage"]
        assert use


def test_a_shipped_json_is_taken_by_name_and_a_file_of_that_name_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert exit_code(cli.main, "check", "bf16_zero2", "--config", "tiny") == 0
    assert "ds_configs/bf16_zero2.json: nothing to say" in capsys.readouterr().out
    assert exit_code(cli.main, "plan", "bf16_zero2") == 0
    assert "ZeRO stage 2" in capsys.readouterr().out
    assert exit_code(cli.main, "plan", "--sweep") == 0
    assert capsys.readouterr().out.count("_zero") == len(shipped_jsons())
    (tmp_path / "bf16_zero2").write_text("{")
    assert exit_code(cli.main, "check", "bf16_zero2") == 2
    assert "not valid JSON" in capsys.readouterr().out


@pytest.mark.parametrize("padding", range(3))
def test_check_and_plan_take_a_json_as_base64(padding: int, capsys: pytest.CaptureFixture[str]) -> None:
    words = encoded({**engine_json(), "_comment": "x" * 300 + "x" * padding})
    assert exit_code(cli.main, "check", words, "--device", "cpu", "ds.gradient_clipping=2", "--effective") == 0
    said = capsys.readouterr().out
    assert words not in said
    assert "gradient_clipping = 2.0" in said
    assert said.splitlines()[-1].startswith("the JSON given as base64: ")
    assert exit_code(cli.main, "plan", words, "--device", "cpu", "--format", "json") == 0
    assert json.loads(capsys.readouterr().out)["deepspeed_config"] == "the JSON given as base64"
    broken = base64.urlsafe_b64encode(b'{"train_batch_size": }').decode()
    assert exit_code(cli.main, "check", broken) == 2
    assert capsys.readouterr().out.startswith("the JSON given as base64:1:22: error: the file\n")


@pytest.mark.parametrize(
    "words",
    [
        ("train", "--out_dir", "run", "--deepspeed_config", "bf16_zero22"),
        ("check", "bf16_zero22"),
        ("plan", "bf16_zero22"),
        ("tune", "bf16_zero22"),
    ],
    ids=lambda words: words[0],
)
def test_an_unknown_name_of_a_json_is_refused_with_the_nearest(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert exit_code(cli.main, *words) == 2
    said = "".join(capsys.readouterr())
    assert "no DeepSpeed JSON of that name ships; did you mean 'bf16_zero2'?" in said
    assert not list(tmp_path.iterdir())


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
    of_all = DataError("no text")
    of_all.shared = True
    assert cli.guarded(program(of_all), debug=False) == 3
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


@pytest.mark.parametrize("place", range(4))
def test_overrides_stand_anywhere_among_the_flags(place: int, capsys: pytest.CaptureFixture[str]) -> None:
    def words(*flags: list[str]) -> list[str]:
        return [
            word
            for flag in (*flags[:place], ["data.tokenizer=byte", "model.n_layers=2"], *flags[place:])
            for word in flag
        ]

    asked = cli.train_parser().parse_args(words(["--out_dir", "a=b"], ["--allow_data_change"], ["--run_name", "lr=3"]))
    assert asked.overrides == ["data.tokenizer=byte", "model.n_layers=2"]
    assert (asked.out_dir, asked.run_name, asked.allow_data_change) == (Path("a=b"), "lr=3", True)
    both = cli.train_parser().parse_args(["train.seed=1", "--out_dir", "a", "nonsense", "--debug", "train.log_every=2"])
    assert sorted(both.overrides) == ["nonsense", "train.log_every=2", "train.seed=1"]
    assert exit_code(cli.main, "check", *words(["bf16_zero1"], ["--config", "tiny"], ["--device", "cuda"])) == 0
    assert "nothing to say" in capsys.readouterr().out
    assert (
        exit_code(cli.main, "plan", *words(["bf16_zero1"], ["--set", "train.max_steps=5"], ["--format", "json"])) == 0
    )
    assert json.loads(capsys.readouterr().out)["vocab_size"] == 256
    refused = ["--micro_batches", "1", "2", "data.tokeniser=byte"]
    assert exit_code(cli.main, "tune", "fp32_zero0", *refused, "--steps", "1") == 2
    assert "did you mean 'data.tokenizer'" in capsys.readouterr().err


def test_prepare_takes_overrides_after_its_flags_and_a_text_with_an_equals_sign(tmp_path: Path, text_file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.b=c").write_bytes(text_file.read_bytes())
    assert exit_code(cli.main, "prepare", str(text_file), "--out", "p", "data.tokenizer=byte", "a.b=c") == 0
    assert '"byte"' in (tmp_path / "p" / "tokenizer.json").read_text()


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name != "chatgot"])
def test_every_program_says_its_version(name: str) -> None:
    path, words = PROGRAMS[name]
    start = [path] if path else ["-c", "from chatgot.cli import main; main()", *words]
    done = subprocess.run(
        [sys.executable, *start, "--version"], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"chatgot {__version__}\n", "")


def test_a_misspelled_command_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(cli.main, "smaple", "runs/a") == 2
    assert "smaple: no such command; did you mean 'sample'?" in capsys.readouterr().err
