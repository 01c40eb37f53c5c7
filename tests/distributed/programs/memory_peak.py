"""The most bytes that tensors take during one optimizer step, by the CPU allocator's own account, for every case
given.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from chatgot.config.run import ModelConfig
from chatgot.deepspeed_json.resolve import build_engine_config
from chatgot.devices import device_facts
from chatgot.distributed import Place, find_place
from chatgot.engine.build import build, join
from chatgot.model.gpt import GPT
from chatgot.model.shapes import count_parameters
from chatgot.training.run import leave
from tests.distributed.programs.memory import live_storages


def measure(case: dict[str, Any], place: Place, device: torch.device) -> int:
    gc.collect()
    before = live_storages()
    shape, vocabulary = ModelConfig(**case["model"]), case["vocabulary"]
    n_params = count_parameters(shape, vocabulary)
    config = build_engine_config(
        case["json"], "case.json", world_size=place.world_size, facts=device_facts(), n_params=n_params
    )
    model = GPT(shape, vocabulary)
    model.init_weights(1)
    engine = build(model, config, device)

    def step() -> None:
        ids = torch.randint(vocabulary, (config.accumulation, config.micro_batch_size, shape.max_seq_length))
        engine.train_step((row, row) for row in ids)

    step()
    peaks = []
    for _ in range(2):  # on a busy machine another thread's frees come late, which a second look does not repeat
        gc.collect()
        now = peak = sum(size for pointer, (size, _) in live_storages().items() if pointer not in before)
        with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profile:
            step()
        assert profile is not None
        assert profile.kineto_results is not None
        events: list[Any] = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
        for _, change in sorted((event.start_ns(), event.nbytes()) for event in events):
            now += change
            peak = max(peak, now)
        peaks.append(peak)
    engine.engine.destroy()
    return min(peaks)


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
        results[name] = max(ranks)
    if place.rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main()
