"""--init_from: a new run starts from a folder in transformers' layout, and a resume needs nothing of it."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from chatgot import cli
from chatgot.errors import CheckpointError, DataError
from chatgot.exchange.export import ExportArguments, export
from chatgot.inference.sample import load_run
from chatgot.observe.journal import read_journal
from chatgot.training import initial
from tests.exchange import folders
from tests.exchange.llama import llama_continues
from tests.support import ROOT, engine_json, run_ranks, write_json, write_run_yaml, write_text
from tests.training import in_process

pytest.importorskip("transformers", reason="transformers is not installed: it needs Python 3.11")
pytestmark = pytest.mark.launches


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A text, a folder of each kind, a run YAML whose model is another one, and a JSON for each stage."""
    here = tmp_path_factory.mktemp("init")
    text = write_text(here / "text.txt").read_text("utf-8")
    for kind in ("gpt2", "qwen3"):
        folders.make(kind, here / kind, text)
    write_run_yaml(here / "run.yaml", max_steps=3)
    for stage in range(4):
        write_json(here / f"stage{stage}.json", engine_json(stage))
    return here


def command(place: Path, out: Path, init: Path | None, stage: int = 0, *more: str) -> list[str]:
    start = ("--init_from", str(init)) if init is not None else ()
    given = (place / f"stage{stage}.json", out, place / "run.yaml", place / "text.txt")
    return in_process.argv(*given, *start, "data.val_fraction=0.1", *more)


def val_losses(out: Path) -> dict[int, float]:
    return {line["step"]: line["val/loss"] for line in read_journal(out / "metrics.jsonl")[0] if "val/loss" in line}


@pytest.mark.parametrize(("kind", "stage"), [("gpt2", 0), ("qwen3", 3)])
def test_train_export_and_train_again_from_it(kind, stage, place, tmp_path, capsys):
    first, second, gone = tmp_path / "first", tmp_path / "second", tmp_path / "gone"
    shutil.copytree(place / kind, gone)
    assert in_process.train(command(place, first, gone, stage)) == 0
    said = capsys.readouterr().out
    assert f"{gone} in our model and in transformers': max |Δlogits|" in said
    assert "AutoTokenizer: the same tokens" in said
    shutil.rmtree(gone)
    moved = tmp_path / "moved"
    first.rename(moved)
    assert in_process.train(command(place, moved, gone, stage, "train.max_steps=4")) == 0
    assert "is not read, the run goes on from its checkpoint" in capsys.readouterr().out
    own = command(place, moved, None, stage, "train.max_steps=5")
    own[own.index("--config") + 1] = str(moved / "run.yaml")
    assert in_process.train(own) == 0
    assert list(val_losses(moved)) == [0, 3, 4, 5]

    export(ExportArguments(moved, tmp_path / "exported"))
    assert in_process.train(command(place, second, tmp_path / "exported", 1)) == 0
    assert val_losses(second)[0] == pytest.approx(val_losses(moved)[5], abs=1e-5)
    before, after = (json.loads((one / "tokenizer.json").read_text()) for one in (moved, second))
    assert before == after
    config, card = json.loads((tmp_path / "exported" / "config.json").read_text()), tmp_path / "exported" / "README.md"
    loaded = load_run(moved, device="cpu")
    assert loaded.tokenizer.decode([config["eos_token_id"]]) == "<|endoftext|>"
    assert "trained further with ChatGoT" in card.read_text()
    if importlib.util.find_spec("xllamacpp") is None:
        return
    export(ExportArguments(moved, tmp_path / "gguf", format="gguf"))
    theirs = llama_continues(tmp_path / "gguf" / "model.gguf", "The night", 40)
    assert theirs == loaded.continuations("The night", 40, temperature=0.0)[0].removeprefix("The night")


def test_weights_that_compute_something_else_start_no_run(place, tmp_path, monkeypatch):
    """The control: weights that were read wrongly."""
    right = initial.fill

    def wrong(model, folder) -> None:
        right(model, folder)
        model.norm.weight.data[3] += 0.1

    monkeypatch.setattr(initial, "fill", wrong)
    with pytest.raises(CheckpointError, match="the run is not started"):
        in_process.train(command(place, tmp_path / "out", place / "qwen3"))
    assert not (tmp_path / "out").exists()


def test_every_number_of_ranks_starts_from_the_same_weights(place, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    cut = "model.max_seq_length=16"
    assert in_process.train(command(place, one, place / "qwen3", 1, cut)) == 0
    run_ranks([str(ROOT / "launch" / "train.py"), *command(place, two, place / "qwen3", 2, cut)], 2)
    assert val_losses(two)[0] == pytest.approx(val_losses(one)[0], abs=1e-5)
    assert val_losses(two)[3] == pytest.approx(val_losses(one)[3], abs=1e-3)


REFUSED: list[tuple[str, dict[str, Any], int, str]] = [
    ("another shape", {"more": ["model.n_layers=5"]}, 2, "override model.n_layers = 5"),
    ("a longer context", {"more": ["model.max_seq_length=65"]}, 2, "has 64, and may be cut only"),
    ("another tokenizer", {"more": ["data.tokenizer=char"]}, 2, "brings its tokenizer"),
    ("no folder", {"init": "nowhere"}, 4, "no such folder"),
    ("a pickle", {"init": "pickled"}, 4, "a pickle, which can run code"),
    ("a vocabulary without its folder", {"init": None, "more": ["data.tokenizer=given"]}, 2, "the vocabulary is given"),
    ("a text prepared otherwise", {"data": "prepared"}, 3, "another vocabulary than the model's"),
]


@pytest.mark.parametrize(("given", "code", "said"), [one[1:] for one in REFUSED], ids=[one[0] for one in REFUSED])
def test_what_is_refused_before_anything_is_written(given, code, said, place, tmp_path, capfd):
    from chatgot.config.run import DataConfig
    from chatgot.data.prepare import prepare

    if given.get("init") == "pickled" and not (place / "pickled").exists():
        shutil.copytree(place / "gpt2", place / "pickled", ignore=shutil.ignore_patterns("*.safetensors*"))
        (place / "pickled" / "pytorch_model.bin").write_bytes(b"")
    init = given.get("init", "gpt2")
    words = command(place, tmp_path / "out", None if init is None else place / init, 0, *given.get("more", ()))
    if "data" in given:
        prepare(place / "text.txt", tmp_path / "prepared", DataConfig(tokenizer="byte"))
        words[words.index("--data") + 1] = str(tmp_path / "prepared")
    assert in_process.refused(words) == code
    assert said in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_text_is_prepared_with_the_tokenizer_of_a_folder(place, tmp_path, capsys):
    prepared, text = tmp_path / "prepared", str(place / "text.txt")
    given = ["--config", str(place / "run.yaml"), "data.val_fraction=0.1"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["prepare", text, "--out", str(prepared), "--init_from", str(place / "gpt2"), *given])
    assert ended.value.code == 0
    assert str(prepared) in capsys.readouterr().out
    argv = command(place, tmp_path / "run", place / "gpt2", 0, "train.max_steps=1")
    argv[argv.index("--data") + 1] = str(prepared)
    assert in_process.train(argv) == 0
    argv[argv.index("--init_from") + 1] = str(place / "qwen3")
    argv[argv.index("--out_dir") + 1] = str(tmp_path / "other")
    with pytest.raises(DataError, match="was prepared with another vocabulary"):
        in_process.train(argv)
