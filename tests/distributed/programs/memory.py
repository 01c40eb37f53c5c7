"""Live tensors of an engine before the second step, for every case given, by rank. Started once per world size by a
test.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from chatgot.config.run import ModelConfig
from chatgot.deepspeed_json.resolve import build_engine_config
from chatgot.devices import device_facts
from chatgot.distributed import Place, find_place
from chatgot.engine.build import build, join
from chatgot.engine.zero_view import live_model_states
from chatgot.model.gpt import GPT
from chatgot.model.shapes import count_parameters
from chatgot.training.run import leave
from tests.support import TINY_MODEL, engine_json

VOCABULARY = 61
LARGE = 2048
"""Bytes from which a storage that nobody accounts for is reported; batches, norms and counters are smaller."""


def live_storages() -> dict[int, tuple[int, str]]:
    """Of every tensor that Python can reach, gradients included."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = [value for value in gc.get_objects() if isinstance(value, torch.Tensor)]
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    found: dict[int, tuple[int, str]] = {}
    for tensor in tensors:
        if not tensor.is_meta:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = (storage.nbytes(), f"{tensor.dtype} {tuple(tensor.shape)}")
    return found


def measure(case: dict[str, Any], place: Place, device: torch.device) -> dict[str, Any]:
    gc.collect()
    before = live_storages()
    shape = ModelConfig(**{**TINY_MODEL, **case.get("model", {})})
    config = build_engine_config(
        engine_json(**case["json"]),
        "case.json",
        case.get("overrides", {}),
        world_size=place.world_size,
        facts=device_facts(),
        n_params=count_parameters(shape, VOCABULARY),
    )
    model = GPT(shape, VOCABULARY)
    model.init_weights(1)
    engine = build(model, config, device)
    found: dict[str, Any] = {}

    def look() -> None:
        found.update(live_model_states(engine.engine))
        counted = sum(found.values())
        for _ in range(20):  # another thread may be about to let go of the bucket that it has just reduced
            gc.collect()  # engines are cyclic: the former case's may still be there
            after = live_storages()
            found["all"] = sum(size for pointer, (size, _) in after.items() if pointer not in before and size >= LARGE)
            if found["all"] <= counted:
                break
            time.sleep(0.05)

    generator = torch.Generator().manual_seed(place.rank)
    for step in range(2):
        ids = torch.randint(
            VOCABULARY, (config.accumulation, config.micro_batch_size, shape.max_seq_length), generator=generator
        )
        engine.train_step(((row, row) for row in ids), look if step == 1 else None)
    engine.engine.destroy()
    return found


def main() -> None:
    faulthandler.dump_traceback_later(540, exit=True)
    cases = json.loads(Path(sys.argv[1]).read_text())
    place = find_place()
    device = join(place, "cpu")
    results = {}
    for name, case in cases.items():
        print(name, flush=True)
        ranks: list[Any] = [None] * place.world_size
        dist.all_gather_object(ranks, measure(case, place, device))
        results[name] = ranks
    if place.rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main()
