"""Reading a checkpoint parameter by parameter: lazily, completely, and the same weights that DeepSpeed's own
zero_to_fp32 finds.
"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from chatgot.checkpoint import pickles
from chatgot.checkpoint.load import Found, find
from chatgot.checkpoint.portable import StoredTensor, fp32_weights, join, read_portable, stored
from chatgot.engine.zero_view import Fragment
from tests.support import ROOT, engine_json, environment, write_json, write_run_yaml
from tests.training import in_process
from tests.training.in_process import argv


def trained(
    folder: Path, text: Path, stage: int, precision: str = "fp32", model: dict | None = None, **engine
) -> Found:
    config = write_run_yaml(folder / "run.yaml", max_steps=1, model=model)
    settings = write_json(folder / "engine.json", engine_json(stage, precision, **engine))
    assert in_process.train(argv(settings, folder / "out", config, text)) == 0
    found = find(folder / "out" / "checkpoints")
    assert found is not None
    return found


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_opening_a_checkpoint_does_not_read_its_tensors(stage, tmp_path, text_file):
    found = trained(tmp_path, text_file, stage, model={"d_model": 256, "n_layers": 3, "d_hid": 1024})
    program = [sys.executable, "-m", "tests.checkpoint.resident", str(found.folder)]
    done = subprocess.run(program, env=environment(), cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    grown = json.loads(done.stdout.splitlines()[-1])
    assert grown["bytes"] > 30e6
    assert grown["opened"] < 0.1 * grown["bytes"]
    assert grown["one"] < 0.2 * grown["bytes"]
    assert grown["all"] > 0.9 * grown["bytes"], "the control: reading everything is noticed"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (2, "fp32"), (3, "fp32"), (2, "bf16")])
def test_weights_are_those_of_zero_to_fp32(stage, precision, tied, tmp_path, text_file):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    found = trained(tmp_path, text_file, stage, precision, model={"tie_embeddings": tied})
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), pickles.weights_only():
        theirs = get_fp32_state_dict_from_zero_checkpoint(str(found.folder), tag=found.tag)
    ours = fp32_weights(found)
    assert theirs is not None
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (ours["lm_head.weight"] is ours["embed_tokens.weight"]) == tied


@pytest.mark.parametrize("tied", [True, False])
def test_weights_without_zero_are_those_in_the_file(tied, tmp_path, text_file):
    found = trained(tmp_path, text_file, 0, model={"tie_embeddings": tied})
    theirs = torch.load(found.path / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    ours = fp32_weights(found)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_weights_do_not_depend_on_the_files_any_more(tmp_path, text_file):
    found = trained(tmp_path, text_file, 1)
    weights = fp32_weights(found)
    before = {name: weight.clone() for name, weight in weights.items()}
    for path in found.path.glob("*.pt"):
        with open(path, "r+b") as file:  # in place: the pages of a mapping would change
            file.write(b"\0" * path.stat().st_size)
    assert all(torch.equal(weights[name], before[name]) for name in before)


def test_older_format_of_torch_is_read_too(tmp_path, text_file):
    """checkpoint.checkpoint_serialization = false: files that cannot be mapped."""
    new = trained(tmp_path, text_file, 1)
    (tmp_path / "old").mkdir()
    old = trained(tmp_path / "old", text_file, 1, checkpoint={"checkpoint_serialization": False})
    assert max(old.path.glob("*.pt")).read_bytes()[:2] != b"PK"
    theirs, ours = read_portable(new), read_portable(old)
    for name, parameter in theirs.parameters.items():
        assert torch.equal(parameter.weight.whole(), ours.parameters[name].weight.whole())


SHAPES = {"a": torch.Size([2, 3]), "b": torch.Size([4])}
PARTS = [torch.arange(5.0), torch.arange(5.0, 10.0)]
CUTS = [[Fragment("a", 0, 5, 0)], [Fragment("a", 5, 1, 0), Fragment("b", 0, 4, 1)]]


def test_ranges_are_read_across_pieces():
    tensors = join(SHAPES, CUTS, CUTS, [part.to(torch.bfloat16) for part in PARTS])
    assert torch.equal(tensors["a"].whole(), torch.arange(6.0).view(2, 3))
    for start in range(7):
        for numel in range(7 - start):
            assert tensors["a"].read(start, numel).tolist() == list(range(start, start + numel))
    assert tensors["b"].read(1, 2).tolist() == [7.0, 8.0]
    assert tensors["b"].whole().dtype == torch.float32
    for start, numel in ((-1, 2), (5, 2), (0, -1), (7, 0)):
        with pytest.raises(ValueError, match="of a tensor of 6"):
            tensors["a"].read(start, numel)


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        ([CUTS[0], CUTS[1][1:]], "a: the shards have 5 of 6 elements"),
        ([CUTS[0], CUTS[1][:1]], "b: the shards have 0 of 4 elements"),
        (
            [CUTS[0], [Fragment("a", 4, 2, 0), CUTS[1][1]]],
            "a: a shard continues with element 4, the ones before it end at 5",
        ),
        (
            [CUTS[0], [*CUTS[1], Fragment("a", 5, 1, 0)]],
            "a: a shard continues with element 5, the ones before it end at 6",
        ),
        ([CUTS[0], [CUTS[1][0], Fragment("b", 0, 4, 2)]], r"b: elements \[2, 6\) of rank 1's shard, which has 5"),
    ],
)
def test_pieces_that_are_not_all_elements_once_are_refused_without_reading(cuts, message, monkeypatch):
    monkeypatch.setattr(StoredTensor, "read", None)
    with pytest.raises(ValueError, match=message):
        join(SHAPES, cuts, cuts, PARTS)


def test_tensor_of_another_size_is_refused():
    with pytest.raises(ValueError, match="6 elements in the file"):
        stored(torch.zeros(6), torch.Size([2, 4]))
