"""`chatgot export` from every kind of run: loaded by transformers and llama.cpp, it computes the same."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from chatgot import cli
from chatgot.checkpoint.load import find
from chatgot.checkpoint.portable import read_portable
from chatgot.checkpoint.portable import stored as as_stored
from chatgot.data.loader import IGNORE_INDEX, EvalBatches
from chatgot.data.prepare import recorded_data
from chatgot.data.tokenizer import BpeTokenizer, ByteTokenizer, CharTokenizer, Tokenizer
from chatgot.errors import CheckpointError, ConfigError
from chatgot.exchange import parity, weights
from chatgot.exchange.export import ExportArguments, export
from chatgot.exchange.folder import INDEX
from chatgot.exchange.layout import Part, transformers_parts
from chatgot.exchange.tokenizer import library_definition
from chatgot.exchange.weights import write_safetensors
from chatgot.inference.sample import load_run
from chatgot.observe.journal import read_journal
from tests.exchange.llama import llama_continues
from tests.support import engine_json, write_json, write_run_yaml, write_text
from tests.training import in_process

pytestmark = pytest.mark.launches
KINDS = [
    (architecture, tokenizer, stage)
    for architecture in ("gpt2", "modern")
    for tokenizer, stage in (("char", 0), ("byte", 1), ("bpe", 2), ("char", 3))
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[tuple[str, str, int], Path]:
    folder = tmp_path_factory.mktemp("export")
    text = write_text(folder / "text.txt")
    made = {}
    for architecture, tokenizer, stage in KINDS:
        model = {"architecture": architecture, "tie_embeddings": stage != 2, "max_seq_length": 80}
        model |= {"n_kv_head": 1} if architecture == "modern" else {}
        model |= {"head_dim": 24, "norm_eps": 1e-4, "rope_theta": 5e4} if (architecture, stage) == ("modern", 2) else {}
        config = write_run_yaml(folder / "run.yaml", model=model, max_steps=8)
        engine = write_json(folder / "engine.json", engine_json(stage))
        out = folder / f"{architecture}-{tokenizer}-{stage}"
        more = (f"data.tokenizer={tokenizer}", "data.bpe_vocab_size=300", "data.val_fraction=0.3")
        assert in_process.train(in_process.argv(engine, out, config, text, *more)) == 0
        made[architecture, tokenizer, stage] = out
    return made


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_transformers_loads_the_folder_and_computes_the_same(kind, dtype, runs, tmp_path, capsys):
    pytest.importorskip("transformers")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    to = tmp_path / "out"
    export(ExportArguments(runs[kind], to, dtype=dtype))
    loaded = load_run(runs[kind], device="cpu")
    theirs: Any = AutoModelForCausalLM.from_pretrained(to, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(to)
    prompt = "The night is dark"
    ids = torch.tensor([tokenizer.encode(prompt)])
    assert tokenizer.decode(ids[0]) == prompt
    new = theirs.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert new.shape[1] == ids.shape[1] + 8
    if dtype == "fp32":
        with torch.no_grad():
            assert (loaded.gpt(ids) - theirs(ids).logits).abs().max() <= 1e-4
    card = (to / "README.md").read_text()
    assert all(known in card for known in ("val/loss", "text.txt", "optimizer steps | 8 |"))


def test_the_exported_folder_scores_the_validation_split_as_the_run_does(runs, tmp_path):
    pytest.importorskip("transformers")
    for kind in (KINDS[0], KINDS[4]):
        to = tmp_path / kind[0]
        export(ExportArguments(runs[kind], to))
        logits = parity.transformers_logits(to)
        assert logits is not None
        journal = [record for record in read_journal(runs[kind] / "metrics.jsonl")[0] if "val/loss" in record]
        config = json.loads((to / "config.json").read_text())
        length = config.get("n_positions") or config["max_position_embeddings"]
        recorded = json.loads((runs[kind] / "environment.json").read_text())["data"]
        _, prepared = recorded_data(runs[kind], recorded["fingerprint"])
        total = count = 0.0
        for ids, targets in EvalBatches(prepared.val, length, 8, 0, 1):
            with torch.no_grad():
                flat = logits(ids).flatten(0, 1)
            total += float(torch.nn.functional.cross_entropy(flat, targets.flatten(), reduction="sum"))
            count += int((targets != IGNORE_INDEX).sum())
        assert total / count == pytest.approx(journal[-1]["val/loss"], abs=1e-4)


def test_a_folder_that_computes_something_else_is_not_left(runs, tmp_path, monkeypatch):
    """The control: weights that were written wrongly."""
    right = weights.chunks
    monkeypatch.setattr(weights, "chunks", lambda *given: (chunk + 0.01 for chunk in right(*given)))
    with pytest.raises(CheckpointError, match="nothing was exported"):
        export(ExportArguments(runs[KINDS[0]], tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_spoiled_gguf_file_is_not_left(runs, tmp_path, monkeypatch, capsys):
    pytest.importorskip("gguf")
    right = weights.write_gguf

    def spoiled(path: Path, *given: Any) -> None:
        right(path, *given)
        with path.open("r+b") as file:  # the last tensor's numbers become ones of another size
            file.seek(-64, os.SEEK_END)
            file.write(b"\x42" * 64)

    monkeypatch.setattr(weights, "write_gguf", spoiled)
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", str(runs[KINDS[0]]), "--to", str(tmp_path / "out"), "--format", "gguf"])
    assert ended.value.code == 4
    assert "nothing was exported" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_touched(runs, tmp_path):
    with pytest.raises(ConfigError, match="exists already"):
        export(ExportArguments(runs[KINDS[0]], tmp_path))


def test_without_its_text_a_run_is_exported_and_it_says_so(runs, tmp_path, caplog):
    moved = tmp_path / "moved"
    shutil.copytree(runs[KINDS[0]], moved)
    facts = json.loads((moved / "environment.json").read_text())
    facts["data"]["spec"] = "gone.txt"
    (moved / "environment.json").write_text(json.dumps(facts))
    export(ExportArguments(moved, tmp_path / "out"))
    assert "random tokens" in caplog.text
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_shards_have_an_index_and_load_alike(runs, tmp_path):
    transformers = pytest.importorskip("transformers")
    kind = KINDS[0]
    export(ExportArguments(runs[kind], tmp_path / "one"))
    found = find(runs[kind] / "checkpoints")
    assert found is not None
    stored = {name: one.weight for name, one in read_portable(found).parameters.items()}
    loaded = load_run(runs[kind], device="cpu")
    parts = list(transformers_parts(loaded.gpt.config, loaded.gpt.vocab_size))
    shutil.copytree(tmp_path / "one", tmp_path / "many")
    (tmp_path / "many" / "model.safetensors").unlink()
    write_safetensors(tmp_path / "many", parts, stored, torch.float32, shard_bytes=20_000)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    assert set(index["weight_map"]) == {part.name for part in parts}
    one, many = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "many")
    )
    assert all(torch.equal(one[name], many[name]) for name in one)


TOKENIZERS: list[Tokenizer] = [
    CharTokenizer(sorted(set("a bc\n\t\\é—龍👍'\"x  "))),
    ByteTokenizer(),
    BpeTokenizer.train(["a bc é—龍 👍 abc abc\n\n\t" * 9], 280),
]


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda t: t.kind)
def test_the_library_encodes_as_we_do_and_gives_every_text_back(tokenizer):
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(library_definition(tokenizer)))
    for text in ("a bc", "\n\n\t a  b\\ c ", "é—龍👍", "'x\" 'x", " "):
        ids = theirs.encode(text).ids
        assert ids == tokenizer.encode(text).tolist()
        assert theirs.decode(ids) == text


def test_a_transposed_tensor_is_written_in_chunks_without_a_second_copy(monkeypatch):
    monkeypatch.setattr(weights, "CHUNK", 10)
    matrix = torch.arange(7 * 6, dtype=torch.float32).view(7, 6)
    stored = {"m": as_stored(matrix, matrix.shape)}
    for turned, wanted in ((False, matrix[2:6]), (True, matrix[2:6].T)):
        pieces = list(weights.chunks(Part("x", "m", 2, 4, 6, turned), stored, torch.float32))
        assert len(pieces) > 1
        assert torch.equal(torch.cat(pieces), wanted.reshape(-1))


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), torch.float32), (1e6, torch.float16)])
def test_values_that_the_type_cannot_hold_are_refused(value, dtype):
    matrix = torch.zeros(3, 4)
    matrix[2, 1] = value
    with pytest.raises(CheckpointError, match=r"^m: has values that are not finite"):
        list(weights.chunks(Part("x", "m", 0, 3, 4, True), {"m": as_stored(matrix, matrix.shape)}, dtype))


def test_writing_takes_less_than_twice_the_largest_tensor(tmp_path, monkeypatch):
    matrix = torch.rand(4096, 4096)
    stored = {f"m{i}": as_stored(matrix, matrix.shape) for i in range(4)}
    parts = [Part(f"x{i}", f"m{i}", 0, 4096, 4096, transposed=i % 2 == 0) for i in range(4)]
    right, seen = weights.chunks, []

    def anonymous() -> int:
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024

    def watched(*given):
        for chunk in right(*given):
            seen.append(anonymous())
            yield chunk

    monkeypatch.setattr(weights, "chunks", watched)
    before = anonymous()
    write_safetensors(tmp_path, parts, stored, torch.float32)
    assert max(seen) - before < 2 * matrix.numel() * 4


def test_the_config_states_every_key_that_describes_the_model(runs, tmp_path):
    """A reader that knows transformers' names finds each of them stated, and guesses none: also those that vLLM's
    gpt2.py and qwen3.py read, or assert to be off.
    """
    wanted = {
        "gpt2": "architectures model_type vocab_size n_positions n_embd n_layer n_head n_inner activation_function "
        "layer_norm_epsilon tie_word_embeddings dtype scale_attn_weights scale_attn_by_inverse_layer_idx "
        "reorder_and_upcast_attn add_cross_attention",
        "modern": "architectures model_type vocab_size hidden_size intermediate_size num_hidden_layers hidden_act "
        "num_attention_heads num_key_value_heads head_dim max_position_embeddings rms_norm_eps rope_theta "
        "rope_parameters attention_bias tie_word_embeddings dtype use_sliding_window",
    }
    for kind in (KINDS[0], KINDS[4]):
        export(ExportArguments(runs[kind], tmp_path / kind[0]))
        config = json.loads((tmp_path / kind[0] / "config.json").read_text())
        assert set(wanted[kind[0]].split()) <= config.keys()
        assert not {"auto_map", "quantization_config"} & config.keys()


def test_the_command_exports(runs, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", str(runs[KINDS[0]]), "--to", str(tmp_path / "out"), "--dtype", "fp16"])
    assert ended.value.code == 0
    compared = "max |Δlogits|" if importlib.util.find_spec("transformers") else "transformers is not installed"
    assert compared in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float16"


@pytest.mark.parametrize("kind", [k for k in KINDS if k[2] != 3], ids=str)
def test_llama_cpp_continues_the_text_as_we_do(kind, runs, tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    export(ExportArguments(runs[kind], tmp_path / "out", format="gguf"))
    loaded = load_run(runs[kind], device="cpu")
    prompt, new = "The night", 64
    assert (
        llama_continues(tmp_path / "out" / "model.gguf", prompt, new)
        == loaded.continuations(prompt, new, temperature=0.0)[0][len(prompt) :]
    )
