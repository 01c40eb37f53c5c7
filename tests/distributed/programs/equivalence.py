"""Trains the tiny GPT through the engine for every case given, and writes the losses. Started once per world size by a
test.
"""

from __future__ import annotations

import faulthandler
import json
import sys
from pathlib import Path

import torch

from chatgot.checkpoint import rng
from chatgot.config.run import ModelConfig
from chatgot.data.loader import DataOrder, TrainBatches
from chatgot.devices import device_facts
from chatgot.distributed import find_place
from chatgot.engine.build import build, join
from chatgot.engine.optimizer import schedule_factor
from chatgot.engine.step import mean_over_ranks
from chatgot.model.gpt import GPT
from chatgot.training.run import leave
from tests.distributed.programs.plain import tokens
from tests.support import TINY_MODEL, engine_json, read_engine_config, write_json


def losses_of(case: dict, folder: Path, steps: int, place, device: torch.device) -> list[float]:
    path = write_json(folder / f"rank{place.rank}.json", engine_json(**case["json"]))
    config = read_engine_config(str(path), {}, world_size=place.world_size, facts=device_facts(), n_params=30_000)
    model = GPT(ModelConfig(**{**TINY_MODEL, **case.get("model", {})}), 64)
    rng.seed(1, place.rank)
    model.init_weights(1)
    engine = build(model, config, device)
    order = DataOrder(len(tokens()), TINY_MODEL["max_seq_length"], seed=1)
    batches = TrainBatches(
        tokens(), order, config.train_batch_size, config.micro_batch_size, place.rank, place.world_size
    )
    losses = []
    assert config.chatgot.schedule is not None
    for step in range(steps):
        engine.set_learning_rate(schedule_factor(step, steps, config.chatgot.schedule))
        losses.append(mean_over_ranks(engine.train_step(batches.micro_batches(step * config.train_batch_size))))
    engine.engine.destroy()
    return losses


def main() -> None:
    faulthandler.dump_traceback_later(540, exit=True)
    cases_path, out_path = Path(sys.argv[1]), Path(sys.argv[2])
    plan = json.loads(cases_path.read_text())
    place = find_place()
    device = join(place, "cpu")
    results = {}
    for name, case in plan["cases"].items():
        print(name, flush=True)
        results[name] = losses_of(case, cases_path.parent, plan["steps"], place, device)
    if place.rank == 0:
        out_path.write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main()
