"""What every program does before torch: threads and allocator, and refusals of a wrong configuration."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from chatgot.distributed import find_place
from tests.support import ROOT, encoded, engine_json, environment, write_json, write_text

CHATGOT = ["-c", "from chatgot.cli import main; main()"]
SETTINGS = ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


def starts_of(words: list[str], folder: Path, **given: str) -> list[dict[str, str]]:
    """SETTINGS as every interpreter of this command had them at its start."""
    log = folder / "starts.jsonl"
    had = f"{{n: os.environ[n] for n in {SETTINGS!r} if n in os.environ}}"
    note = f"import json, os\nprint(json.dumps({had}), file=open({str(log)!r}, 'a'))\n"
    (folder / "sitecustomize.py").write_text(note)
    own = {name: value for name, value in environment(**given).items() if name not in SETTINGS or name in given}
    own["PYTHONPATH"] = f"{folder}:{ROOT}"
    done = subprocess.run([sys.executable, *words], cwd=folder, env=own, capture_output=True, text=True, timeout=300)
    assert done.returncode in (2, 4), done.stderr
    assert "Traceback" not in done.stderr
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize(
    "words",
    [
        [str(ROOT / "launch" / "train.py"), "--out_dir", "run", "train.max_stepz=1"],
        [*CHATGOT, "train", "--out_dir", "run", "train.max_stepz=1"],
        [*CHATGOT, "sample", "nowhere"],
        [*CHATGOT, "verify", "nowhere"],
        [*CHATGOT, "tune", "nowhere.json"],
    ],
    ids=["train.py", "train", "sample", "verify", "tune"],
)
def test_every_program_that_computes_has_the_settings_of_launch_run(words: list[str], tmp_path: Path) -> None:
    first, second = starts_of(words, tmp_path)
    assert first == {}
    assert int(second["OMP_NUM_THREADS"]) >= 1
    assert second["GOMP_SPINCOUNT"] == "10000"
    assert int(second["MALLOC_TRIM_THRESHOLD_"]) == int(second["MALLOC_MMAP_THRESHOLD_"]) == 10**10


def test_what_the_user_has_set_stays_and_nothing_starts_twice_for_it(tmp_path: Path) -> None:
    words = [str(ROOT / "launch" / "train.py"), "--out_dir", "run", "train.max_stepz=1"]
    mine = dict.fromkeys(SETTINGS, "7")
    assert starts_of(words, tmp_path, **mine) == [mine]


REFUSED = {
    "an override": (["train.max_step=1"], "did you mean 'train.max_steps'"),
    "a value": (["model.d_model=many"], "override model.d_model"),
    "a preset": (["--config", "tinny"], "did you mean 'tiny'"),
    "the JSON": (["--deepspeed_config", "wrong.json"], "did you mean 'gradient_clipping'"),
    "its name": (["--deepspeed_config", "bf16_zero22"], "did you mean 'bf16_zero2'"),
    "a batch": (["ds.train_micro_batch_size_per_gpu=7"], "train_micro_batch_size_per_gpu"),
    "an encoding": (["data.encoding=utf-9"], "unknown encoding"),
    "the text": (["--data", "my_bock.txt"], "did you mean 'my_book.txt'"),
    "the run folder": (["--out_dir", "my_book.txt"], "--out_dir my_book.txt"),
    "base64": (["--deepspeed_config", encoded({"gradient_cliping": 10})], "JSON given as base64:1: gradient"),
    "a warning": (["--deepspeed_config", "warned.json"], "does ChatGoT (a warning, refused because of --strict)"),
    "a warning about steps": (["ds.chatgot.schedule.warmup_steps=99", "train.max_steps=9"], "warmup_steps = 99"),
    "a launcher's variable": ([], "MASTER_PORT = 'x'"),
}


CALLS = """
import contextlib, io, json, os, sys
import chatgot
from chatgot import cli
outcomes = {}
for case, (folder, variables, call) in json.load(open("calls.json")).items():
    before, said = dict(os.environ), io.StringIO()
    os.chdir(folder)
    os.environ.update(variables)
    code = None
    with contextlib.redirect_stderr(said):
        try:
            exec(call)
        except SystemExit as end:
            code = end.code
        except chatgot.ChatGoTError as error:
            print(error, file=sys.stderr)
            code = error.exit_code
    os.environ.clear()
    os.environ.update(before)
    heavy = [name for name in ("torch", "deepspeed") if name in sys.modules]
    outcomes[case] = [code, said.getvalue(), heavy]
print(json.dumps(outcomes))
"""


@pytest.mark.parametrize("entry", ["train", "api"])
def test_a_wrong_configuration_is_refused_before_torch_is_imported(entry: str, tmp_path: Path) -> None:
    """All cases in one process, which torch would stay in."""
    calls = {}
    for number, (case, (words, _)) in enumerate(REFUSED.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_json(folder / "wrong.json", engine_json(gradient_cliping=1.0))
        write_json(folder / "warned.json", engine_json(author="x"))
        write_text(folder / "my_book.txt", 2000)
        strict = ["--strict"] if "warning" in case else []
        given = {"--data": "my_book.txt", "--out_dir": "run"} | dict(zip(words[::2], words[1::2], strict=False))
        overrides = [word for word in words if "=" in word]
        if entry == "train":
            flags = [word for pair in given.items() if "=" not in pair[0] for word in pair]
            call = f"cli.train({[*flags, *strict, *overrides]!r})"
        else:
            arguments = {name.removeprefix("--"): value for name, value in given.items() if "=" not in name}
            arguments.setdefault("deepspeed_config", "fp32_zero0_muon")
            call = f"chatgot.train(**{arguments!r}, overrides={overrides!r}, strict={bool(strict)})"
        port = {"MASTER_PORT": "x", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"} if "variable" in case else {}
        calls[case] = str(folder), port, call
    write_json(tmp_path / "calls.json", calls)
    words = [sys.executable, "-c", CALLS]
    settled = environment(**dict.fromkeys(SETTINGS, "7"))  # so that no call begins the process anew
    done = subprocess.run(words, cwd=tmp_path, env=settled, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert outcomes.keys() == REFUSED.keys()
    for case, (code, said, heavy) in outcomes.items():
        assert code, case
        assert REFUSED[case][1] in said, case
        assert heavy == [], case
        assert not Path(calls[case][0], "run").exists(), case


def test_a_variable_that_is_empty_is_as_if_unset() -> None:
    place = find_place(None, {"RANK": "", "LOCAL_RANK": "", "WORLD_SIZE": "", "MASTER_ADDR": "", "MASTER_PORT": ""})
    assert (place.rank, place.world_size, place.launcher) == (0, 1, "python")


def test_names_that_are_no_utf_8_are_written_with_escapes(tmp_path: Path) -> None:
    words = [sys.executable, *CHATGOT, "check", b"j\xff.json"]
    strict = {**environment(), "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(words, cwd=tmp_path, env=strict, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (2, "")
    assert done.stdout.startswith("j\\udcff.json: error: the file\n")
