"""Damage to any file of a checkpoint is found before it is used, and the one before it is taken; a checkpoint never
runs code.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._utils import _rebuild_tensor_v2

from chatgot.checkpoint import manifest
from chatgot.checkpoint.load import Found, examine, find
from chatgot.checkpoint.portable import fp32_weights
from chatgot.checkpoint.writing import next_sequence
from chatgot.config.run import ModelConfig
from chatgot.errors import CheckpointError
from chatgot.inference.sample import SampleArguments, sample
from chatgot.model.shapes import parameter_shapes
from chatgot.verify.verify import verify
from tests import hostile
from tests.support import engine_json, write_json, write_run_yaml
from tests.training import in_process
from tests.training.in_process import argv, events

NEWEST, BEFORE = "step-00000004", "step-00000002"
VARIANTS = [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32")]


@pytest.fixture(scope="module", params=VARIANTS, ids=[f"{precision} stage {stage}" for stage, precision in VARIANTS])
def trained(request, tmp_path_factory, text_file) -> Path:
    """A folder with run.yaml, engine.json and a run in out/ with the checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("trained")
    config = write_run_yaml(folder / "run.yaml", max_steps=5)
    saving = {"checkpoint": {"every_steps": 2, "every_minutes": None, "keep_best": 0}}
    engine = write_json(folder / "engine.json", engine_json(*request.param, chatgot=saving))
    in_process.abandon_after(4, argv(engine, folder / "out", config, text_file))
    return folder


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    shutil.copytree(trained, tmp_path / "copy")
    return tmp_path / "copy"


def words(folder: Path, text: Path, *more: str) -> list[str]:
    return argv(folder / "engine.json", folder / "out", folder / "run.yaml", text, *more)


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


DAMAGE = {
    "missing": lambda data: None,
    "zero bytes": lambda data: b"",
    "truncated": lambda data: data[:-1],
    "longer": lambda data: data + b"\0",
    "first bit": lambda data: flipped(data, 0),
    "bit in the middle": lambda data: flipped(data, len(data) // 2),
    "last byte": lambda data: flipped(data, len(data) - 1),
}


def test_whole_checkpoint_is_taken_without_a_word(copy):
    found = find(copy / "out" / "checkpoints")
    assert found is not None
    assert (found.tag, found.notes) == (NEWEST, ())
    on_disk = {path.name for path in found.path.iterdir()} - {manifest.NAME}
    assert found.manifest["files"].keys() == on_disk
    assert len(on_disk) == (1 if found.manifest["zero_stage"] == 0 else 2)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_before_use_and_the_previous_one_is_taken(copy, kind):
    checkpoints = copy / "out" / "checkpoints"
    for path in sorted((checkpoints / NEWEST).iterdir()):
        whole = path.read_bytes()
        damaged = DAMAGE[kind](whole)
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        found = find(checkpoints)
        assert found is not None
        assert found.tag == BEFORE, path.name
        [note] = found.notes
        assert f"checkpoint {checkpoints / NEWEST} is damaged: file {path.name}: " in note
        assert note.endswith(f"; going back to {BEFORE}, 2 steps are lost")
        with pytest.raises(CheckpointError, match=path.name):
            find(checkpoints, NEWEST)
        path.write_bytes(whole)
    found = find(checkpoints)
    assert found is not None
    assert found.tag == NEWEST


def test_file_that_the_manifest_does_not_know_is_damage(copy):
    checkpoints = copy / "out" / "checkpoints"
    (checkpoints / NEWEST / "zero_pp_rank_7_mp_rank_00_optim_states.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"zero_pp_rank_7_mp_rank_00_optim_states\.pt: is not in the manifest"):
        find(checkpoints, NEWEST)


def test_run_goes_back_says_so_and_goes_on(copy, text_file, capsys):
    checkpoints = copy / "out" / "checkpoints"
    file = max((checkpoints / NEWEST).glob("*.pt"))
    file.write_bytes(flipped(file.read_bytes(), 1000))
    before = in_process.contents(copy)
    named = words(copy, text_file, "--resume_from", f"{copy / 'out'}@{NEWEST}")
    assert in_process.refused(named) == 4
    assert f"is damaged: file {file.name}: its contents have changed" in capsys.readouterr().err
    assert in_process.contents(copy) == {name: data for name, data in before.items() if not name.endswith(".lock")}
    assert in_process.train(words(copy, text_file)) == 0
    assert f"{file.name}: its contents have changed" in capsys.readouterr().out
    [damaged] = events(copy / "out", "resume_warning")
    assert file.name in damaged["message"]
    assert events(copy / "out", "resumed")[-1]["step"] == 2
    found = find(checkpoints)
    assert found is not None
    assert (found.tag, found.notes) == ("step-00000005", ())


def test_no_whole_checkpoint_is_an_error_and_never_a_fresh_start(copy, text_file, capsys):
    for path in (copy / "out" / "checkpoints").glob("step-*/*.pt"):
        path.write_bytes(b"")
    assert in_process.refused(words(copy, text_file)) == 4
    said = capsys.readouterr().err
    assert "no checkpoint is whole" in said
    assert NEWEST in said
    assert BEFORE in said


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def test_code_in_any_file_is_never_run(copy, text_file, tmp_path, capsys):
    checkpoints, mark = copy / "out" / "checkpoints", tmp_path / "ran"
    for path in sorted((checkpoints / NEWEST).glob("*.pt")):
        whole = path.read_bytes()
        state = torch.load(path, weights_only=False)
        torch.save({**state, "extra": Payload(mark)}, path)
        in_process.rehash(path.parent)
        named = words(copy, text_file, "--resume_from", f"{copy / 'out'}@{NEWEST}")
        assert in_process.refused(named) == 4, path.name
        assert "holds more than tensors and plain values (posix.system)" in capsys.readouterr().err
        assert not mark.exists()
        found = find(checkpoints)
        assert found is not None
        assert found.tag == BEFORE, "files and manifest agree, and yet it is damaged"
        assert f"file {path.name}: refused: it holds more than tensors" in found.notes[0]
        with pytest.raises(CheckpointError, match=r"posix\.system"):
            fp32_weights(Found(checkpoints, NEWEST, manifest.read(checkpoints / NEWEST)))
        assert not mark.exists()
        torch.load(path, weights_only=False)  # the control: the payload works
        assert mark.exists()
        mark.unlink()
        path.write_bytes(whole)
        in_process.rehash(path.parent)
    assert in_process.train(words(copy, text_file)) == 0


def test_every_bit_of_a_manifest_counts(trained, tmp_path):
    text = (trained / "out" / "checkpoints" / NEWEST / manifest.NAME).read_bytes()
    (tmp_path / manifest.NAME).write_bytes(text)
    manifest.read(tmp_path)
    for position in range(len(text)):
        (tmp_path / manifest.NAME).write_bytes(
            text[:position] + bytes([text[position] ^ 1 << position % 7]) + text[position + 1 :]
        )
        with pytest.raises(CheckpointError):
            manifest.read(tmp_path)


def filled(folder: Path, sizes: dict[str, int]) -> dict[str, object]:
    """A folder of files of these sizes, and its manifest's fields."""
    folder.mkdir()
    for name, size in sizes.items():
        (folder / name).write_bytes(b"x" * size)
    return {"files": {name: manifest.measure(folder / name) for name in sizes}}


def test_first_damaged_file_in_the_manifests_order_is_named_whichever_is_hashed_first(tmp_path):
    fields = filled(tmp_path / "tag", {"c": 10, "b": 30_000_000, "a": 10})
    for name in ("b", "a"):  # `a` is hashed long before `b`
        path = tmp_path / "tag" / name
        path.write_bytes(b"y" * path.stat().st_size)
    with pytest.raises(CheckpointError, match="file b: its contents have changed"):
        manifest.verify(tmp_path / "tag", fields)


def test_files_are_hashed_side_by_side(tmp_path, monkeypatch):
    fields = filled(tmp_path / "tag", {"a": 10, "b": 10})
    meeting, measure = threading.Barrier(2), manifest.measure

    def met(path: Path) -> manifest.Measured:
        meeting.wait(120)  # BrokenBarrierError where nobody else comes
        return measure(path)

    monkeypatch.setattr(manifest, "measure", met)
    manifest.verify(tmp_path / "tag", fields)


BOMBS = {
    "compressed": ("is compressed", lambda path: recompress(path)),
    "elements that the file lacks": ("is larger than the file", lambda path: declare(path, 10**12, 10**12)),
    "a shape beyond its elements": ("is larger than", lambda path: declare(path, None, 10**12)),
    "no torch file": ("cannot be read", lambda path: path.write_bytes(b"w" * 1000)),
}


def recompress(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)


def declare(path: Path, elements: int | None, size: int) -> None:
    """Let the first tensor say that it has `size` elements, and its storage that it has `elements`."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    [name] = [name for name in records if name.endswith("data.pkl")]
    storage = ("storage", torch.FloatStorage, "0", "cpu", elements or 1)

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return storage if obj == "the storage" else None

    class Tensor:
        def __reduce__(self):
            return _rebuild_tensor_v2, ("the storage", 0, (size,), (1 if elements else 0,), False, {})

    file = io.BytesIO()
    Pickler(file, 2).dump({"module": {"embed_tokens.weight": Tensor()}})
    with zipfile.ZipFile(path, "w") as archive:
        for other, data in {**records, name: file.getvalue()}.items():
            archive.writestr(other, data)


@pytest.mark.parametrize("kind", BOMBS)
def test_file_that_would_fill_memory_is_damage_although_its_hash_is_right(copy, kind, capsys):
    checkpoints = copy / "out" / "checkpoints"
    said, spoil = BOMBS[kind]
    for path in sorted((checkpoints / NEWEST).glob("*.pt")):
        whole = path.read_bytes()
        spoil(path)
        in_process.rehash(path.parent)
        found = find(checkpoints)
        assert found is not None
        assert found.tag == BEFORE
        assert said in found.notes[0]
        assert path.name in found.notes[0]
        assert not verify(copy / "out")
        assert "checkpoint step-00000004: NOT WHOLE" in capsys.readouterr().out
        path.write_bytes(whole)
    in_process.rehash(checkpoints / NEWEST)
    assert verify(copy / "out")


def forge(folder: Path, **changes: object) -> None:
    """Change fields of a manifest, and its own hash with them."""
    fields = json.loads((folder / manifest.NAME).read_text())
    del fields["sha256"]
    manifest.write(folder, {**fields, **changes})


FORGED: list[dict[str, object]] = [
    {"sequence": "9" * 5000},
    {"sequence": True},
    {"step": -1},
    {"files": {"\ud800": {"bytes": 1, "sha256": ""}}},
    {"files": {"a\0": {"bytes": 1, "sha256": ""}}},
    {"files": {"mp_rank_00_model_states.pt": 3}},
    {"model": []},
    {"model": {"n_layers": 10**6, "vocab_size": 41}},
    {"model": {"vocab_size": "many"}},
    {"zero_stage": "2"},
    {"layout": ["x"]},
]


def test_forged_newest_manifest_does_not_block_the_good_one_before_it(copy, text_file, capsys):
    checkpoints = copy / "out" / "checkpoints"
    whole = (checkpoints / NEWEST / manifest.NAME).read_bytes()
    for changes in FORGED:
        (checkpoints / NEWEST / manifest.NAME).write_bytes(whole)
        forge(checkpoints / NEWEST, **changes)
        found = find(checkpoints)
        assert found is not None
        assert found.tag == BEFORE, changes
        assert f"checkpoint {checkpoints / NEWEST} is damaged: " in found.notes[0]
        assert len(found.notes[0]) < 1000
        assert BEFORE in [one.tag for one in examine(checkpoints).good]
        assert not verify(copy / "out")
        assert "checkpoint step-00000004: NOT WHOLE" in capsys.readouterr().out
    sample(SampleArguments(copy / "out", max_new_tokens=1, device="cpu"), io.StringIO())
    assert in_process.train(words(copy, text_file)) == 0


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, dict[str, object]]:
    """A folder with one whole checkpoint of a tiny model, and what its manifest says."""
    folder = tmp_path_factory.mktemp("small")
    model = ModelConfig(d_model=4, n_layers=2, n_head=2, d_hid=4, max_seq_length=4)
    path = folder / "step-00000001"
    path.mkdir()
    weights = {name: torch.zeros(shape) for name, shape in parameter_shapes(model, 5).items()}
    torch.save({"module": weights, "chatgot": {"rng": []}}, path / "mp_rank_00_model_states.pt")
    fields: dict[str, object] = {
        "format_version": manifest.FORMAT_VERSION,
        "model": {**model.model_dump(), "vocab_size": 5},
        "parameters": "0" * 64,
        "train": {"seed": 1},
        "learning_rates": {"lr": 0.1},
        "gradient_clipping": 1.0,
        "world_size": 1,
        "zero_stage": 0,
        "precision": "fp32",
        "layout": {},
        "train_batch_size": 8,
        "tokens": 100,
        "val_loss": None,
        "step": 1,
        "sequence": 1,
        "files": {name: manifest.measure(path / name) for name in manifest.listed(path)},
    }
    manifest.write(path, fields)
    assert find(folder) is not None
    return folder, fields


@hostile.few
@given(data=st.data())
def test_any_manifest_is_taken_or_damage(small, data):
    folder, fields = small
    path = folder / "step-00000001" / manifest.NAME
    if data.draw(st.booleans()):
        said = data.draw(hostile.trees(fields))
        path.write_text(json.dumps({**said, "sha256": manifest._digest(said)}))
    else:
        path.write_bytes(data.draw(hostile.files(fields)))
    hostile.succeeds_or_refuses(lambda: find(folder))
    hostile.succeeds_or_refuses(lambda: examine(folder))
    hostile.succeeds_or_refuses(lambda: next_sequence(folder))
