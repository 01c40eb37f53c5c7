"""Copies of the training text in what a model wrote: a run that knows its text by heart, and what it says of itself."""

from __future__ import annotations

import io
import os
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from chatgot import cli
from chatgot.data.loader import DataOrder
from chatgot.errors import DataError
from chatgot.inference.copied import TrainingText
from chatgot.inference.sample import LoadedModel, SampleArguments, load_run, sample
from chatgot.training import run
from tests.inference.test_chat import Terminal
from tests.support import engine_json, warm_python, write_json, write_run_yaml
from tests.training import in_process
from tests.training.in_process import argv, events, series

STEPS, BATCH, BLOCK, SAVED = 160, 16, 32, 80
PLANTED = "Zounds! the quick brown vixen jumped over nine lazy kings, and then no more"
DRAWN = len(PLANTED) - len("Zounds!")
MODEL = {"d_model": 64, "d_hid": 96, "max_seq_length": BLOCK}


def gibberish(n: int, seed: int) -> str:
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 7))) for _ in range(60)]
    return "\n".join(" ".join(rng.choices(words, k=6)) for _ in range(n))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run on two files that hold little but PLANTED, once each; stopped at SAVED and resumed."""
    path = tmp_path_factory.mktemp("copied")
    (path / "texts").mkdir()
    for seed, name in enumerate(("first.txt", "second.txt")):
        lines = gibberish(4, seed).split("\n")
        (path / "texts" / name).write_text("\n".join([*lines, PLANTED, *lines[:1], ""]), encoding="utf-8")
    (path / "texts" / "third.txt").write_text(gibberish(3, 7), encoding="utf-8")
    train = {"max_steps": STEPS, "log_every": 50, "sample_every": 40, "sample_max_new_tokens": DRAWN}
    sampling = {"sample_prompts": ["Zounds!", "a"], "sample_temperature": 0.0}
    config = write_run_yaml(path / "run.yaml", model=MODEL, **train, **sampling)
    saving = {"every_steps": SAVED, "every_minutes": None, "keep_best": 0, "keep_last": 9}
    tree = engine_json(batch=BATCH, micro=BATCH, chatgot={"checkpoint": saving, "schedule": {"type": "constant"}})
    tree["optimizer"]["params"]["lr"] = 1e-2
    line = argv(write_json(path / "engine.json", tree), path / "run", config, path / "texts")
    line.append("data.val_fraction=0.1")
    in_process.abandon_after(SAVED + 5, line)
    run.finish(in_process.prepare(line))
    return path


@pytest.fixture(scope="module")
def model(folder) -> LoadedModel:
    return load_run(folder / "run", device="cpu")


def drawn(folder: Path, **settings) -> str:
    out = io.StringIO()
    arguments = {"device": "cpu", "greedy": True, "max_new_tokens": DRAWN, "prompt": "Zounds!", "mark_copied": 40}
    sample(SampleArguments(folder, **{**arguments, **settings}), out)
    return out.getvalue()


def by_force(data, begin: int, end: int, last: int) -> list[int]:
    """Steps in which a sample held all the tokens begin..end - 1."""
    order = DataOrder(len(data.train), BLOCK, 1337)
    starts = order.starts(np.arange(last * BATCH))
    return sorted({i // BATCH + 1 for i, at in enumerate(starts) if at <= begin and at + BLOCK + 1 >= end})


def test_a_model_that_knows_its_text_by_heart_is_found_out(folder):
    shown = drawn(folder / "run")
    assert re.search(r"«Zounds![^»]{33,}»\[1\]", shown)
    assert re.search(rf"copied: \d+ of {DRAWN} characters \(\d+%\) stand in the training text word for word", shown)
    assert "stands 2 times, in first.txt:5, fed in " in shown
    assert "second.txt:5, " in shown


def test_the_steps_are_those_of_brute_force_up_to_the_checkpoint(folder, model):
    passage = PLANTED[3:28]
    for tag, last in ((f"step-{STEPS:08d}", STEPS), (f"step-{SAVED:08d}", SAVED)):
        checkpoint = load_run(folder / "run", tag, "cpu").checkpoint
        source = TrainingText(folder / "run", checkpoint)
        [span] = source.spans(f"-- {passage} --", 20)
        assert (span.begin, span.end, span.count) == (3, 3 + len(passage), 2)
        for one in span.places:
            assert one.place.file in ("first.txt", "second.txt")
            expected = by_force(source._data, one.place.begin, one.place.end, last)
            assert list(one.fed.whole) == expected
            assert set(one.fed.part) & set(expected) == set()
        assert any(one.fed.whole for one in span.places)


def test_memorising_is_a_curve_of_the_journal(folder):
    out = folder / "run"
    shares, longest = series(out, "sample/copied_fraction"), series(out, "sample/longest_copy")
    assert list(shares) == list(longest) == [40, 80, 120, 160]
    assert (shares[40], longest[40]) == (0, 0)
    whole = "".join((folder / "texts" / f"{name}.txt").read_text() for name in ("first", "second", "third"))
    share = passage = 0
    for sample_ in (out / "samples" / "step-000160.txt").read_text().split("=== ")[1:]:
        prompt, _, text = sample_.partition("\n")
        written = text.removesuffix("\n" if prompt == "'a'" else "\n\n")[len(prompt) - 2 :]
        assert len(written) == DRAWN
        held = set[int]()
        for begin in range(DRAWN - 39):
            end = begin + 40
            while end <= DRAWN and written[begin:end] in whole:
                held, passage, end = held | set(range(begin, end)), max(passage, end - begin), end + 1
        share += len(held)
    assert passage > 50
    assert longest[160] == passage
    assert shares[160] == share / (2 * DRAWN)
    sampled = [event for event in events(out, "sampled") if event["step"] == 160][-1]
    assert sampled["searched_tokens"] == sampled["of_tokens"] > 500


def test_nothing_is_marked_in_what_stands_nowhere(folder, model):
    assert "copied: no passage of 40 characters or more stands" in drawn(folder / "run", temperature=9, greedy=False)
    source = TrainingText(folder / "run", model.checkpoint)
    assert source.spans(gibberish(9, 99), 40) == []
    assert source.spans(PLANTED, 40, after=len(PLANTED)) == [], "what the prompt has, the model did not write"


def test_without_the_text_it_is_asked_for(folder, tmp_path, monkeypatch):
    copy = Path(shutil.copytree(folder / "run", tmp_path / "run"))
    texts = Path(shutil.copytree(folder / "texts", tmp_path / "texts"))
    settings = (copy / "environment.json").read_text()
    (copy / "environment.json").write_text(settings.replace(str(folder / "texts"), str(tmp_path / "nowhere")))
    monkeypatch.setenv("CHATGOT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"not in the run folder; name the same text with --data"):
        drawn(copy)
    assert "«Zounds!" in drawn(copy, data=str(texts))
    (texts / "first.txt").write_text("another text " * 40)
    with pytest.raises(DataError, match="is not the data"):
        drawn(copy, data=str(texts))


def test_a_run_of_an_earlier_version_says_what_is_not_known(folder, tmp_path, capsys):
    copy = Path(shutil.copytree(folder / "run", tmp_path / "run"))
    now = (copy / "events.jsonl").read_text()
    old = re.sub(r'"data_order": \{[^}]*\}, ', "", now)
    assert old != now
    (copy / "events.jsonl").write_text(old)
    assert drawn(copy) == drawn(folder / "run"), "the settings' hash proves the order"
    (copy / "events.jsonl").write_text(re.sub(r'"batches": "\w*", ', "", old))
    assert "stands 2 times, in first.txt:5, steps not known" in drawn(copy)
    assert "not known whether fed: steps 1..80 were recorded by an earlier ChatGoT" in capsys.readouterr().err


def test_in_a_terminal_marks_are_colours(folder):
    program = "from chatgot.cli import main; main()"
    flags = ["--device", "cpu", "--max_new_tokens", str(DRAWN), "--temperature", "0", "--mark_copied"]
    talk = Terminal([warm_python(), "-c", program, "chat", str(folder / "run"), *flags])
    talk.until("> ")
    shown = talk.ask("Zounds!")
    assert re.search(r"\x1b\[30;43mZounds![^\x1b]{33,}\x1b\[0m", shown)
    assert "first.txt:5, fed in " in shown
    os.write(talk.fd, b"\x04")
    assert talk.process.wait(60) == 0
    os.close(talk.fd)


def test_a_length_that_is_none_is_refused(folder, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["sample", str(folder / "run"), "--mark_copied", "0"])
    assert end.value.code == 2
    assert "from 1 on" in capsys.readouterr().err
