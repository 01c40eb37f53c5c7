"""Folders in transformers' layout: what is taken computes the same, all else is refused and nothing of it runs."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatgot.config.run import ModelConfig
from chatgot.data.tokenizer import BpeTokenizer, ByteTokenizer, CharTokenizer, load_tokenizer
from chatgot.errors import CheckpointError, DataError
from chatgot.exchange import parity
from chatgot.exchange.folder import Folder, open_folder
from chatgot.exchange.layout import transformers_config
from chatgot.exchange.tokenizer import library_definition, read_tokenizer
from chatgot.exchange.weights import fill
from chatgot.model.gpt import GPT
from tests.exchange import folders
from tests.support import write_text

pytest.importorskip("transformers", reason="transformers is not installed: it needs Python 3.11")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt").read_text("utf-8")


@pytest.fixture(scope="module")
def models(tmp_path_factory, text) -> dict[str, tuple[Path, Any]]:
    """Kind -> the folder, and transformers' model."""
    folder = tmp_path_factory.mktemp("folders")
    return {kind: (folder / kind, folders.make(kind, folder / kind, text)) for kind in ("gpt2", "qwen3")}


@pytest.fixture
def copied(models, tmp_path) -> Callable[[str], Path]:
    return lambda kind: Path(shutil.copytree(models[kind][0], tmp_path / kind))


def filled(folder: Folder, config: ModelConfig | None = None) -> GPT:
    model = GPT(config or folder.model, folder.vocab_size)
    fill(model, folder)
    return model.eval()


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = model(ids)
    return found.logits if hasattr(found, "logits") else found


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_our_model_computes_what_transformers_computes(kind, models, text):
    path, theirs = models[kind]
    folder = open_folder(path)
    ids = torch.tensor(theirs_ids(path, text))[None, : folders.LENGTH]
    assert (logits(filled(folder), ids) - logits(theirs, ids)).abs().max() <= 1e-5
    shorter = folder.model.model_copy(update={"max_seq_length": 8})
    assert (logits(filled(folder, shorter), ids[:, :8]) - logits(theirs, ids[:, :8])).abs().max() <= 1e-5
    assert folder.notes == ()


def theirs_ids(path: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path).encode(text, add_special_tokens=False)


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_its_tokenizer_makes_the_same_tokens_and_travels_with_the_run(kind, models, text, tmp_path):
    path, _ = models[kind]
    size = open_folder(path).vocab_size
    ours = read_tokenizer(path, size)
    again = text + "\n<|endoftext|>\n\n  " + " 1234 don't\n!\n?\r\n" + "ē 日本語 👍"
    assert ours.encode(again).tolist() == theirs_ids(path, again)
    assert ours.decode(ours.encode(again)) == again
    assert ours.vocab_size == size
    ours.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.fingerprint == ours.fingerprint
    assert loaded.decode([size - 1]) == ("" if kind == "qwen3" else "<|endoftext|>")
    assert library_definition(loaded) == json.loads((path / "tokenizer.json").read_text())


def test_a_text_that_the_tokenizer_would_change_is_refused(models):
    path, _ = models["qwen3"]
    ours = read_tokenizer(path, open_folder(path).vocab_size)
    with pytest.raises(DataError, match="not in Unicode's form NFC"):
        ours.encode("e\u0301")
    assert ours.decode(ours.encode_prompt("e\u0301")) == "\u00e9"


@pytest.mark.parametrize("own", [ByteTokenizer(), CharTokenizer("\n ab–"), BpeTokenizer.train(["ab ab abba"] * 9, 260)])
def test_a_tokenizer_that_was_exported_comes_back_as_it_was(own, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(library_definition(own)))
    again = read_tokenizer(tmp_path, own.vocab_size)
    assert (type(again), again.fingerprint) == (type(own), own.fingerprint)
    if not isinstance(own, BpeTokenizer):
        with pytest.raises(CheckpointError, match="tokens are not the model's"):
            read_tokenizer(tmp_path, own.vocab_size + 1)


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_a_config_that_was_exported_is_the_same_model_again(kind, copied):
    path = copied(kind)
    before = open_folder(path)
    (path / "config.json").write_text(json.dumps(transformers_config(before.model, before.vocab_size, "float32")))
    after = open_folder(path)
    assert (after.model, after.vocab_size, after.notes) == (before.model, before.vocab_size, ())


def test_names_and_buffers_of_the_published_gpt2(models, copied):
    """Its file has no prefix, and masks that older versions kept as tensors."""
    path = copied("gpt2")
    tensors = load_file(path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file({**bare, "h.0.attn.bias": torch.ones(1, 1, 4, 4)}, path / "model.safetensors")
    first, second = (filled(open_folder(one)).state_dict() for one in (path, models["gpt2"][0]))
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_links_of_a_download_cache_are_followed(models, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0a1b"
    shutil.copytree(models["qwen3"][0], blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    open_folder(snapshot)
    assert read_tokenizer(snapshot, open_folder(snapshot).vocab_size).kind == "bpe"


def test_a_second_copy_of_a_tied_head_must_be_the_embedding(copied):
    path = copied("gpt2")
    tensors = load_file(path / "model.safetensors")
    head = tensors["transformer.wte.weight"]
    save_file({**tensors, "lm_head.weight": head.clone()}, path / "model.safetensors")
    filled(open_folder(path))
    save_file({**tensors, "lm_head.weight": head + 1}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match="is not the embedding"):
        filled(open_folder(path))


def set_key(key: str, value: Any) -> Callable[[Path], None]:
    return lambda path: edit(path / "config.json", lambda tree: tree.update({key: value}))


def without(key: str) -> Callable[[Path], None]:
    return lambda path: edit(path / "config.json", lambda tree: tree.pop(key))


CONFIGS = [
    ("qwen3", set_key("use_sliding_window", True), "use_sliding_window = true: must be false"),
    ("qwen3", set_key("layer_types", ["sliding_attention", "full_attention"]), "layer_types"),
    ("qwen3", set_key("model_type", "qwen3_moe"), 'model_type = "qwen3_moe": must be gpt2 or qwen3'),
    ("qwen3", set_key("num_experts", 8), "num_experts = 8"),
    ("qwen3", set_key("attention_bias", True), "attention_bias = true"),
    ("qwen3", set_key("rope_parameters", {"rope_type": "yarn", "factor": 4.0}), "rope_parameters"),
    ("qwen3", set_key("rope_scaling", {"type": "linear", "factor": 2.0}), "rope_scaling"),
    ("qwen3", set_key("rope_parameters", "default"), "rope_parameters"),
    ("qwen3", set_key("hidden_act", "gelu"), 'hidden_act = "gelu": must be "silu"'),
    ("qwen3", set_key("quantization_config", {"bits": 4}), "quantization_config"),
    ("qwen3", set_key("num_hidden_layers", 10**9), "more than there are tensors"),
    ("qwen3", set_key("num_hidden_layers", "two"), 'num_hidden_layers = "two": expected a whole number'),
    ("qwen3", set_key("head_dim", 15), "head_dim = 15 must be even"),
    ("qwen3", set_key("hidden_size", 64), "has shape"),
    ("qwen3", set_key("vocab_size", -1), "vocab_size = -1"),
    ("qwen3", without("num_key_value_heads"), "num_key_value_heads is missing"),
    ("gpt2", without("model_type"), "model_type = null"),
    ("gpt2", set_key("auto_map", {"AutoModel": "evil.Model"}), "auto_map"),
    ("gpt2", set_key("architectures", ["GPT2ForSequenceClassification"]), "architectures"),
    ("gpt2", set_key("architectures", [["GPT2LMHeadModel"]]), "architectures"),
    ("gpt2", set_key("activation_function", "relu"), "activation_function"),
    ("gpt2", set_key("scale_attn_by_inverse_layer_idx", True), "scale_attn_by_inverse_layer_idx"),
    ("gpt2", set_key("attn_pdrop", 0.2), "attn_pdrop"),
    ("gpt2", set_key("n_embd", 49), "n_embd = 49 is not a multiple of n_head = 4"),
    ("gpt2", lambda path: (path / "config.json").write_text("[1"), "config.json: cannot be read"),
    ("gpt2", lambda path: (path / "config.json").write_text("[1]"), "config.json: holds no mapping"),
    ("gpt2", lambda path: (path / "config.json").unlink(), "config.json: no such file"),
    (
        "gpt2",
        lambda path: edit(
            path / "tokenizer_config.json", lambda tree: tree.update(auto_map={"AutoTokenizer": ["x.T"]})
        ),
        "tokenizer_config.json: auto_map",
    ),
]


@pytest.mark.parametrize(("kind", "spoil", "said"), CONFIGS, ids=[said for _, _, said in CONFIGS])
def test_a_config_that_does_not_fit_is_refused_by_its_key(kind, spoil, said, copied):
    path = copied(kind)
    spoil(path)
    with pytest.raises(CheckpointError) as refused:
        open_folder(path)
    assert said in str(refused.value)


class Evil:
    """Leaves a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def put_pickle(path: Path, name: str = "pytorch_model.bin") -> Path:
    """In the folder; it leaves the file `ran` where it is read."""
    with (path / name).open("wb") as file:
        pickle.dump(Evil(path / "ran"), file)
    return path / name


def retensor(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        changed = change(tensors.pop(name))
        save_file(tensors if changed is None else {**tensors, name: changed}, path / "model.safetensors")

    return spoil


def reindex(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    return lambda path: edit(path / "model.safetensors.index.json", lambda tree: change(tree["weight_map"]))


def first_key(names: dict[str, str]) -> str:
    return next(iter(names))


WTE, SHARD = "transformer.wte.weight", "model-00001-of-00002.safetensors"
FILES: list[tuple[str, Callable[[Path], Any], str]] = [
    ("gpt2", lambda path: put_pickle(path).with_name("model.safetensors").unlink(), "pytorch_model.bin: a pickle"),
    (
        "gpt2",
        lambda path: pickle.dump(Evil(path / "ran"), (path / "model.safetensors").open("wb")),
        "no whole safetens",
    ),
    ("gpt2", lambda path: (path / "model.safetensors").unlink(), "weights are read from safetensors only"),
    ("gpt2", lambda path: (path / "model.safetensors").write_bytes(b"\xff" * 8), "no whole safetensors file"),
    ("gpt2", retensor(WTE, lambda tensor: tensor[:, :-1].contiguous()), f"{WTE} has shape"),
    ("gpt2", retensor(WTE, lambda tensor: tensor.to(torch.int32)), "is of type I32, taken are F32, F16, BF16"),
    ("gpt2", retensor(WTE, lambda tensor: None), f"tensor {WTE} is missing"),
    ("gpt2", retensor("transformer.h.1.ln_1.bias", lambda tensor: tensor / 0), "values that are not finite"),
    (
        "gpt2",
        lambda path: save_file({"score.weight": torch.ones(2)}, path / "model.safetensors"),
        "are more than there",
    ),
    ("qwen3", lambda path: (path / SHARD).unlink(), "this shard is missing"),
    ("qwen3", lambda path: (path / SHARD).write_bytes((path / SHARD).read_bytes()[:-9]), "no whole safetensors file"),
    (
        "qwen3",
        reindex(lambda names: names.update({first_key(names): "../x.safetensors"})),
        "must be a .safetensors file",
    ),
    ("qwen3", reindex(lambda names: names.update({first_key(names): "/etc/passwd"})), "must be a .safetensors file"),
    ("qwen3", reindex(lambda names: names.pop(first_key(names))), "does not agree with model-0"),
    ("qwen3", reindex(lambda names: names.update({"model.x": SHARD})), "about model.x"),
    ("qwen3", reindex(lambda names: names.clear()), "has no weight_map"),
]


@pytest.mark.parametrize(("kind", "spoil", "said"), FILES, ids=[said for _, _, said in FILES])
def test_files_that_do_not_fit_are_refused_and_nothing_runs(kind, spoil, said, copied):
    path = copied(kind)
    spoil(path)
    with pytest.raises(CheckpointError) as refused:
        filled(open_folder(path))
    assert said in str(refused.value)
    assert not (path / "ran").exists()


@pytest.mark.parametrize(
    ("kind", "name", "noted"),
    [("gpt2", "training_args.bin", False), ("gpt2", "pytorch_model.bin", True), ("qwen3", "consolidated.00.pth", True)],
)
def test_a_pickle_beside_the_weights_is_not_read(kind, name, noted, copied):
    path = copied(kind)
    put_pickle(path, name)
    folder = open_folder(path)
    assert [name in note for note in folder.notes] == [True] * noted
    filled(folder)
    theirs = parity.transformers_logits(path)
    assert theirs is not None
    theirs(torch.tensor([[1, 2]]))
    read_tokenizer(path, folder.vocab_size)
    assert not (path / "ran").exists()


def test_keys_that_are_not_known_are_named(copied):
    path = copied("gpt2")
    set_key("attention_sinks", 4)(path)
    assert "attention_sinks" in open_folder(path).notes[0]


def retokenizer(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda path: edit(path / "tokenizer.json", change)


SLOW = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
TOKENIZERS: list[tuple[Callable[[Path], Any], str]] = [
    (lambda path: (path / "tokenizer.json").unlink(), "save_pretrained"),
    (lambda path: (path / "tokenizer.json").write_text("{"), "cannot be read"),
    (lambda path: (path / "tokenizer.json").write_text("{}"), "has no vocabulary"),
    (retokenizer(lambda tree: tree["model"].update(type="WordPiece")), "model = "),
    (retokenizer(lambda tree: tree["model"].update(dropout=0.5)), "dropout = 0.5: must be off"),
    (retokenizer(lambda tree: tree.update(normalizer={"type": "Lowercase"})), "normalizer = "),
    (retokenizer(lambda tree: tree["pre_tokenizer"]["pretokenizers"].__setitem__(0, SLOW)), "not known here"),
    (retokenizer(lambda tree: tree["pre_tokenizer"]["pretokenizers"].pop()), "cuts a text in a way"),
    (retokenizer(lambda tree: tree["added_tokens"][0].update(lstrip=True)), "lstrip = True: must be off"),
    (retokenizer(lambda tree: tree["model"]["vocab"].pop("a")), "cannot read its definition"),
]


@pytest.mark.parametrize(("spoil", "said"), TOKENIZERS, ids=[said for _, said in TOKENIZERS])
def test_a_tokenizer_that_would_lose_text_is_refused(spoil, said, copied):
    path = copied("qwen3")
    spoil(path)
    with pytest.raises(CheckpointError) as refused:
        read_tokenizer(path, open_folder(path).vocab_size)
    assert said in str(refused.value)
