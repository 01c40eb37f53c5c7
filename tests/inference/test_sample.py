"""`chatgot sample` from any run folder: every stage and precision, in one process, with nothing but the folder."""

from __future__ import annotations

import io
import math
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from chatgot import cli
from chatgot.checkpoint.load import choose, find
from chatgot.checkpoint.portable import fp32_weights
from chatgot.data.loader import EvalBatches
from chatgot.data.prepared import PreparedData
from chatgot.data.tokenizer import ByteTokenizer
from chatgot.errors import NumericsError
from chatgot.inference.sample import Reply, SampleArguments, load_run, sample
from chatgot.model.generate import generate
from chatgot.training import run
from tests.support import (
    ROOT,
    TINY_MODEL,
    engine_json,
    environment,
    present,
    warm_python,
    write_json,
    write_run_yaml,
    write_text,
)
from tests.training import in_process
from tests.training.in_process import argv, contents, series

COMMAND = ["-c", "from chatgot.cli import main; main()", "sample"]
KINDS = [(stage, "fp32") for stage in range(4)] + [(stage, "bf16") for stage in (1, 2, 3)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[dict[tuple[int, str], Path], PreparedData]:
    """Run folders of every kind, moved away from where they were trained; the text is deleted."""
    folder = tmp_path_factory.mktemp("sampling")
    text = write_text(folder / "text.txt")
    config = write_run_yaml(folder / "run.yaml", max_steps=12)
    runs, data = {}, None
    for stage, precision in KINDS:
        engine = write_json(folder / "engine.json", engine_json(stage, precision))
        out = folder / "trained" / f"{precision}-{stage}"
        loop = in_process.prepare(argv(engine, out, config, text))
        run.finish(loop)
        data = loop.data
        runs[stage, precision] = folder / "moved" / out.name
    shutil.move(folder / "trained", folder / "moved")
    text.unlink()
    config.unlink()
    assert data is not None
    return runs, data


@pytest.fixture
def runs(trained) -> dict[tuple[int, str], Path]:
    return trained[0]


@pytest.fixture
def folder(runs) -> Path:
    return runs[1, "fp32"]


def text_of(folder: Path, **settings) -> str:
    [text] = sample(SampleArguments(folder, **{"device": "cpu", "max_new_tokens": 40, **settings}), io.StringIO())
    return text


@pytest.mark.parametrize(("stage", "precision"), KINDS)
def test_weights_of_every_stage_are_those_that_were_trained(stage, precision, trained):
    runs, data = trained
    model, *_ = load_run(runs[stage, precision], device="cpu")
    assert not model.training
    nats = tokens = 0.0
    with torch.no_grad():
        for input_ids, targets in EvalBatches(data.val, TINY_MODEL["max_seq_length"], 64, 0, 1):
            nats += float(model(input_ids, targets, reduction="sum"))
            tokens += int((targets != -100).sum())
    tolerance = 1e-5 if precision == "fp32" else 2e-3
    assert nats / tokens == pytest.approx(series(runs[stage, precision], "val/loss")[12], rel=tolerance)
    found = find(runs[stage, precision] / "checkpoints")
    assert found is not None
    weights = fp32_weights(found)
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    if stage < 3:
        trained = torch.load(found.path / "mp_rank_00_model_states.pt", weights_only=False)["module"]
        assert all(torch.equal(weights[name].to(trained[name].dtype), trained[name]) for name in trained)


@pytest.mark.parametrize(("stage", "precision"), KINDS)
def test_greedy_text_equals_the_text_without_a_cache_also_beyond_the_context(stage, precision, runs):
    folder = runs[stage, precision]
    model, tokenizer, *_ = load_run(folder, device="cpu")
    prompt = "The night"
    ids = torch.from_numpy(tokenizer.encode_prompt(prompt).astype("int64"))[None]
    [uncached] = generate(model, ids, 40, temperature=0.0, use_cache=False)
    assert len(ids[0]) + 40 > 2 * TINY_MODEL["max_seq_length"]
    assert text_of(folder, prompt=prompt, greedy=True) == prompt + tokenizer.decode(uncached)


def test_greedy_text_is_the_same_after_every_fp32_stage(runs):
    assert len({text_of(runs[stage, "fp32"], prompt="The night", greedy=True) for stage in range(4)}) == 1


def test_without_a_prompt_the_first_of_the_runs_is_taken(folder, tmp_path, capsys):
    assert text_of(folder) == text_of(folder, prompt="The night")
    config = (folder / "run.yaml").read_text()
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "run.yaml").write_text(config.replace("- The night", "- Ωmega\n  - The dark"))
    assert text_of(copy) == text_of(folder, prompt="The dark"), "the first whose characters are known"
    (copy / "run.yaml").write_text("")
    assert text_of(copy) == text_of(folder, prompt="\n")


def test_a_checkpoints_path_is_understood(folder, tmp_path, capsys, monkeypatch):
    tag = present(find(folder / "checkpoints")).tag
    of_run = text_of(folder, prompt="The") + "\n"
    words = ["--prompt", "The", "--max_new_tokens", "40", "--device", "cpu"]
    assert command(folder / "checkpoints" / tag, *words) == 0
    assert capsys.readouterr().out == of_run
    monkeypatch.chdir(folder / "checkpoints")
    for path in (Path(tag), folder / "checkpoints"):
        assert command(path, *words) == 0
        assert capsys.readouterr().out == of_run
        with pytest.raises(SystemExit) as end:
            cli.main(["verify", str(path)])
        assert end.value.code == 0
        assert f"checkpoint {tag}: whole" in capsys.readouterr().out
    assert present(choose(str(folder / "checkpoints" / tag), tmp_path)).tag == tag
    with pytest.raises(SystemExit) as end:
        cli.main(["verify", str(folder / "checkpoints" / "step-00000099")])
    assert end.value.code == 4
    assert "no checkpoint 'step-00000099'" in capsys.readouterr().err


def test_prompt_longer_than_the_context_is_continued(folder):
    prompt = "The night is dark and full of terrors. "
    assert len(prompt) > 2 * TINY_MODEL["max_seq_length"]
    text = text_of(folder, prompt=prompt)
    assert text.startswith(prompt)
    assert len(text) == len(prompt) + 40


def test_same_seed_same_text_and_another_seed_another(folder):
    assert text_of(folder, seed=5) == text_of(folder, seed=5)
    assert text_of(folder, seed=5) != text_of(folder, seed=6)
    assert text_of(folder, seed=5, temperature=0.0) == text_of(folder, seed=6, greedy=True)
    assert text_of(folder, seed=5, top_k=1) == text_of(folder, seed=6, greedy=True)
    assert text_of(folder, seed=5, top_p=1e-6) == text_of(folder, seed=6, greedy=True)


def test_several_samples_are_those_of_the_following_seeds(folder):
    out = io.StringIO()
    texts = sample(SampleArguments(folder, prompt="The", num_samples=3, seed=7, max_new_tokens=10, device="cpu"), out)
    assert texts == [text_of(folder, prompt="The", seed=7 + i, max_new_tokens=10) for i in range(3)]
    assert out.getvalue() == f"{texts[0]}\n\n--- sample 2\n{texts[1]}\n\n--- sample 3\n{texts[2]}\n"


def test_text_streams_as_it_is_drawn(folder):
    class Recorder(io.StringIO):
        def __init__(self) -> None:
            super().__init__()
            self.lengths: list[int] = []

        def flush(self) -> None:
            self.lengths.append(len(self.getvalue()))

    out = Recorder()
    sample(SampleArguments(folder, prompt="The", max_new_tokens=6, device="cpu"), out)
    assert out.lengths[:6] == [4, 5, 6, 7, 8, 9]


def test_older_checkpoint_can_be_named(tmp_path, text_file):
    config = write_run_yaml(tmp_path / "run.yaml", max_steps=4)
    engine = write_json(tmp_path / "engine.json", engine_json(chatgot={"checkpoint": {"every_steps": 2}}))
    assert in_process.train(argv(engine, tmp_path / "out", config, text_file)) == 0
    older, *_ = load_run(tmp_path / "out", "step-00000002", "cpu")
    newest, *_ = load_run(tmp_path / "out", device="cpu")
    assert not torch.equal(older.embed_tokens.weight, newest.embed_tokens.weight)


def command(*words: str | Path) -> int:
    try:
        cli.main(["sample", *map(str, words), "--device", "cpu"])
    except SystemExit as end:
        return int(end.code or 0)
    raise AssertionError("cli.main returned")


@pytest.mark.parametrize(
    ("settings", "fragments"),
    [
        (["--prompt", "Ωmega ☃"], ["'Ω' (U+03A9)", "'☃' (U+2603)"]),
        (["--prompt", ""], ["--prompt", "empty"]),
        (["--temperature", "-1"], ["temperature = -1.0", ">= 0"]),
        (["--temperature", "nan"], ["temperature = nan"]),
        (["--top_p", "0"], ["top_p = 0.0"]),
        (["--top_p", "1.5"], ["top_p = 1.5"]),
        (["--top_k", "0"], ["top_k = 0"]),
        (["--max_new_tokens", "0"], ["max_new_tokens = 0"]),
        (["--num_samples", "0"], ["--num_samples 0"]),
        (["--seed", "-1"], ["seed -1"]),
        (["--seed", str(2**70)], ["seed"]),
    ],
)
def test_settings_out_of_range_are_refused_with_2_and_nothing_is_printed(settings, fragments, folder, capsys):
    assert command(folder, *settings) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("chatgot: ")
    assert len(err.splitlines()) == 1
    assert all(fragment in err for fragment in fragments), err


def test_missing_and_damaged_run_folders_are_refused_with_4(folder, tmp_path, capsys):
    def refused(path: Path, *more: str) -> str:
        assert command(path, *more) == 4
        out, err = capsys.readouterr()
        assert (out, err[:9], len(err.splitlines())) == ("", "chatgot: ", 1)
        return err

    assert "no complete checkpoint" in refused(tmp_path / "none")
    assert "no complete checkpoint" in refused(tmp_path)
    assert "step-00000099" in refused(folder, "--tag", "step-00000099")
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    [shard] = (copy / "checkpoints").glob("step-*/*optim_states.pt")
    whole = shard.read_bytes()
    shard.write_bytes(b"")
    assert f"is damaged: file {shard.name}" in refused(copy)
    shard.write_bytes(whole)
    shutil.copy(write_byte_tokenizer(tmp_path), copy / "tokenizer.json")
    assert "is not the tokenizer" in refused(copy)


def write_byte_tokenizer(folder: Path) -> Path:
    from chatgot.data.tokenizer import ByteTokenizer

    ByteTokenizer().save(folder / "byte.json")
    return folder / "byte.json"


def test_the_command_prints_the_text_and_writes_nothing(folder):
    before = contents(folder)
    done = subprocess.run(
        [sys.executable, *COMMAND, str(folder), "--prompt", "The night", "--greedy", "--max_new_tokens", "40"],
        env=environment(CUDA_VISIBLE_DEVICES=""),
        cwd=ROOT,
        capture_output=True,
        timeout=300,
    )
    assert done.stderr == b""
    assert done.returncode == 0
    assert done.stdout.decode("utf-8") == text_of(folder, prompt="The night", greedy=True) + "\n"
    assert contents(folder) == before


def test_reader_that_goes_away_is_no_error(folder):
    process = subprocess.Popen(
        [warm_python(), *COMMAND, str(folder), "--max_new_tokens", "3000", "--device", "cpu"],
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(5)
    process.stdout.close()
    assert (process.wait(timeout=300), process.stderr.read()) == (0, b"")
    process.stderr.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it(number, folder):
    process = subprocess.Popen(
        [warm_python(), *COMMAND, str(folder), "--max_new_tokens", "100000", "--device", "cpu"],
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # in the background shells ignore SIGINT
    )
    assert process.stdout is not None
    with process, process.stdout:
        assert process.stdout.read(5)
        process.send_signal(number)
        assert process.wait(timeout=300) == (130 if number == signal.SIGINT else -number)


def test_weights_that_are_not_finite_are_refused_before_a_token_is_drawn(runs, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(runs[0, "fp32"], run_dir)
    checkpoint = find(run_dir / "checkpoints")
    assert checkpoint is not None
    [path] = checkpoint.path.glob("*model_states.pt")
    state = torch.load(path, weights_only=False)
    state["module"]["norm.weight"][3] = math.inf
    torch.save(state, path)
    in_process.rehash(checkpoint.path)
    with pytest.raises(NumericsError, match=r"norm\.weight has values that are not finite; name an earlier one") as no:
        text_of(run_dir)
    assert no.value.exit_code == 5


def pieces(text: str, *stops: str) -> tuple[list[str], Reply]:
    """What each token of the text gives out, and the rest at the end."""
    tokenizer = ByteTokenizer()
    reply = Reply(tokenizer, stops)
    return [*(reply.push(int(token)) for token in tokenizer.encode(text)), reply.flush()], reply


def test_what_may_become_a_stop_text_is_held_back():
    assert pieces("abc\nKI", "\nKING:")[0] == ["a", "b", "c", "", "", "", "\nKI"]
    assert pieces("abc\nKU", "\nKING:")[0] == ["a", "b", "c", "", "", "\nKU", ""]
    given, reply = pieces("abc\nKING: d", "\nKING:")
    assert ("".join(given), reply.text, reply.ended) == ("abc", "abc", True)


def test_the_first_of_several_stop_texts_ends_it_and_characters_come_whole():
    given, reply = pieces("ē’á one two", "two", "on", "xyz")
    assert given[:4] == ["", "ē", "", ""]
    assert ("".join(given), reply.ended) == ("ē’á ", True)
    given, reply = pieces("ē"[:1])
    assert (reply.ended, reply.given_out) == (False, 1)


def test_no_stop_text_is_overlooked():
    draw = random.Random(0)
    for _ in range(500):
        text = "".join(draw.choices("ab\n", k=draw.randint(0, 12)))
        stops = ["".join(draw.choices("ab\n", k=draw.randint(1, 4))) for _ in range(draw.randint(0, 3))]
        given, reply = pieces(text, *stops)
        found = [text.index(stop) for stop in stops if stop in text]
        ends = sorted(text.index(stop) + len(stop) for stop in stops if stop in text)
        # the text ends where the first stop text is complete, and before all of those that are complete there
        first = min(text.find(stop, 0, ends[0]) for stop in stops if stop in text[: ends[0]]) if found else None
        assert reply.ended == bool(found)
        assert "".join(given) == reply.text == (text if first is None else text[:first])
