"""A snapshot is what the state dict was, whatever happens to it afterwards."""

from __future__ import annotations

import io
from collections import OrderedDict

import pytest
import torch

from chatgot.checkpoint.writing import Snapshots


def state() -> dict:
    flat = torch.arange(12, dtype=torch.float32)
    marked = torch.ones(3, requires_grad=True)
    marked.ds_id = 7  # type: ignore[attr-defined]
    module = OrderedDict(
        embed=flat[:6].view(2, 3), lm_head=flat[:6].view(2, 3), norm=flat[6:9], half=torch.ones(2).bfloat16()
    )
    module._metadata = {"version": 1}  # type: ignore[attr-defined]
    return {
        "module": module,
        "masters": [marked, torch.nn.Parameter(torch.zeros(2), requires_grad=False)],
        "transposed": torch.arange(6.0).view(2, 3).t(),
        "scalar": torch.tensor(3.0),
        "empty": [torch.empty(0), torch.empty(0)],
        "nested": {"steps": 4, "numbers": [1, 2], "rng": torch.get_rng_state()},
    }


def written(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def test_what_is_written_is_what_would_have_been_written_at_once():
    live = state()
    assert written(Snapshots().take(live)) == written(live)


def test_training_on_does_not_change_it():
    live = state()
    before = written(live)
    snapshot = Snapshots().take(live)
    with torch.no_grad():
        live["module"]["embed"].mul_(-1)
        live["masters"][0].zero_()
        live["module"]["half"].zero_()
    live["nested"]["steps"] = 5
    live["nested"]["numbers"].append(3)
    assert written(live) != before
    assert written(snapshot) == before


def test_shared_memory_is_copied_once():
    rebuilt = Snapshots().take(state())
    pointers = {rebuilt["module"][name].untyped_storage().data_ptr() for name in ("embed", "lm_head", "norm")}
    assert len(pointers) == 1
    assert rebuilt["module"]["norm"].storage_offset() == 6


def test_memory_is_used_again_and_follows_a_change_of_layout():
    snapshots = Snapshots()

    def addresses(value: list) -> list[int]:
        snapshots.reuse()
        return [tensor.data_ptr() for tensor in snapshots.take(value)]

    first = addresses([torch.ones(10), torch.ones(20)])
    assert addresses([torch.zeros(10), torch.zeros(20)]) == first
    assert addresses([torch.zeros(10), torch.zeros(30)])[0] == first[0]
    snapshots.reuse()
    [tensor] = snapshots.take([torch.full((30,), 2.0)])
    assert tensor.tolist() == [2.0] * 30
    snapshots.reuse()
    assert len(snapshots._buffers) == 1, "what is no longer used is given back"


def test_what_cannot_be_copied_is_refused():
    with pytest.raises(ValueError, match="sparse"):
        Snapshots().take({"x": torch.eye(2).to_sparse()})
