"""What DeepSpeed writes is read back under the allow-list, whatever the engine."""

from __future__ import annotations

import os
import zipfile

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

from chatgot.checkpoint import pickles
from chatgot.errors import CheckpointError
from tests.support import engine_json, write_json, write_run_yaml
from tests.training import in_process
from tests.training.in_process import argv

MUON = {"type": "Muon", "params": {"muon_lr": 0.02, "adam_lr": 3e-3, "momentum": 0.95, "weight_decay": 0.1}}
ENGINES = {
    "stage 2 offload": engine_json(2, offload=True),
    "stage 3 offload": engine_json(3, offload=True, offload_param=True),
    "stage 3 bf16": engine_json(3, "bf16"),
    "stage 2 bf16": engine_json(2, "bf16"),
    "stage 1 autocast": engine_json(1, "autocast_bf16"),
    "stage 0 Muon": engine_json(0, optimizer=MUON),
    "stage 1 Muon": engine_json(1, optimizer=MUON),
    "stage 0 a scheduler of torch": engine_json(
        0, scheduler={"type": "MultiStepLR", "params": {"milestones": [1, 3]}}, chatgot={"schedule": None}
    ),
}


@pytest.mark.filterwarnings("ignore:Seems like .optimizer.step")  # torch's scheduler about DeepSpeed's optimizer
@pytest.mark.parametrize("name", ENGINES)
def test_engine_reads_its_own_checkpoint(name, tmp_path, text_file):
    tree = ENGINES[name]
    tree["chatgot"]["checkpoint"]["every_steps"] = 2
    words = argv(
        write_json(tmp_path / "engine.json", tree), tmp_path / "out", write_run_yaml(tmp_path / "run.yaml"), text_file
    )
    in_process.abandon_after(2, words)
    assert in_process.prepare([*words, "--resume_from", "must"]).step == 2


@pytest.mark.parametrize("scaler", [LossScaler(2), DynamicLossScaler(2**10, 2.0, 1000, 1.0, 1, dtype=torch.float16)])
def test_loss_scalers_are_read_back(scaler, tmp_path):
    torch.save({"loss_scaler": scaler}, tmp_path / "file.pt")
    assert vars(pickles.read(tmp_path / "file.pt")["loss_scaler"]) == vars(scaler)
    assert pickles.look(tmp_path / "file.pt").keys() == {"loss_scaler"}


def test_switch_is_put_back_as_it_was(monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    with pickles.weights_only():
        assert os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "1"
        assert "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" not in os.environ
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_file_is_looked_at_without_its_elements_in_both_of_torchs_formats(tmp_path):
    weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    tree = {"a": weight, "b": [torch.zeros(0), {"c": weight[1]}], "size": torch.Size([4, 5]), "dtype": torch.bfloat16}
    for zipped in (True, False):
        torch.save(tree, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
        seen = pickles.look(tmp_path / "file.pt")
        assert (seen["a"], seen["b"][0], seen["b"][1]["c"], tuple(seen["size"])) == ((2, 3), (0,), (3,), (4, 5))


def test_record_that_is_there_twice_is_damage(tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "file.pt")
    with zipfile.ZipFile(tmp_path / "file.pt", "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("file/data.pkl", b"x")
    with pytest.raises(CheckpointError, match="is there twice"):
        pickles.look(tmp_path / "file.pt")
