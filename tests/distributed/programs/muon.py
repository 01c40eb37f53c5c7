"""DeepSpeed's Muon on the tiny GPT at every stage, with and without clipping; and its momentum through a checkpoint.

Started once per world size by a test.
"""

from __future__ import annotations

import faulthandler
import json
import sys
from pathlib import Path
from typing import Any

import torch

from chatgot.checkpoint import rng
from chatgot.checkpoint.load import find
from chatgot.checkpoint.resume import load
from chatgot.checkpoint.save import Saver
from chatgot.config.run import ModelConfig
from chatgot.data.loader import DataOrder, TrainBatches
from chatgot.deepspeed_json.resolve import build_engine_config
from chatgot.deepspeed_json.settings import CheckpointConfig
from chatgot.devices import device_facts
from chatgot.distributed import ControlGroup, Place, find_place
from chatgot.engine import guards
from chatgot.engine.build import build, join
from chatgot.engine.step import TrainingEngine, mean_over_ranks
from chatgot.model.gpt import GPT
from chatgot.training.run import leave
from tests.distributed.programs.numerics import own_state
from tests.distributed.programs.plain import tokens
from tests.support import TINY_MODEL, engine_json


def start(case: dict[str, Any], place: Place, device: torch.device) -> tuple[TrainingEngine, TrainBatches]:
    tree = engine_json(**case["json"])
    tree["zero_optimization"].update(case.get("zero", {}))
    config = build_engine_config(tree, "case.json", world_size=place.world_size, facts=device_facts(), n_params=30_000)
    model = GPT(ModelConfig(**TINY_MODEL), 64)
    rng.seed(1, place.rank)
    model.init_weights(1)
    guard = guards.ClipAdamGroupsOnly
    if case.get("without_guard"):
        guards.ClipAdamGroupsOnly = lambda zero: None
    engine = build(model, config, device)
    guards.ClipAdamGroupsOnly = guard
    order = DataOrder(len(tokens()), TINY_MODEL["max_seq_length"], seed=1)
    return engine, TrainBatches(
        tokens(), order, config.train_batch_size, config.micro_batch_size, place.rank, place.world_size
    )


def step(engine: TrainingEngine, batches: TrainBatches, index: int) -> float:
    engine.set_learning_rate(1.0)
    return mean_over_ranks(engine.train_step(batches.micro_batches(index * batches.global_batch_size)))


def run(case: dict[str, Any], steps: int, place: Place, device: torch.device) -> dict[str, Any]:
    engine, batches = start(case, place, device)
    losses, norms = [], []
    for index in range(steps):
        losses.append(step(engine, batches, index))
        norms.append(engine.grad_norm)
    found = {
        "losses": losses,
        "grad_norms": norms,
        "optimizer": type(engine.engine.optimizer).__name__,
        "adam": type(engine.engine.basic_optimizer.aux_optimizer).__name__,
        "notes": engine.notes,
    }
    engine.engine.destroy()
    return found


def resume(case: dict[str, Any], steps: int, folder: Path, place: Place, device: torch.device) -> dict[str, Any]:
    """`steps` steps, save, `steps` more; then a new engine that loads, and the same further steps."""
    ranks = ControlGroup()
    engine, batches = start(case, place, device)
    for index in range(steps):
        step(engine, batches, index)
    saver = Saver(folder, CheckpointConfig(), ranks)
    nothing: Any = {}
    saver.begin(engine.engine, nothing, nothing)
    saver.finish()
    saved = own_state(engine)
    whole = [float.hex(step(engine, batches, steps + index)) for index in range(steps)]
    found = {"whole": whole, "whole_state": ranks.gather(own_state(engine)), "saved_state": ranks.gather(saved)}
    engine.engine.destroy()

    engine, batches = start(case, place, device)
    checkpoint = find(folder)
    assert checkpoint is not None
    load(engine.engine, checkpoint, ranks)
    if case.get("forget_momentum"):
        for state in engine.engine.basic_optimizer.state.values():
            if "momentum_buffer" in state:
                state["momentum_buffer"].zero_()
    found["loaded_state"] = ranks.gather(own_state(engine))
    found["resumed"] = [float.hex(step(engine, batches, steps + index)) for index in range(steps)]
    found["resumed_state"] = ranks.gather(own_state(engine))
    engine.engine.destroy()
    return found


def main() -> None:
    faulthandler.dump_traceback_later(540, exit=True)
    plan_path = Path(sys.argv[1])
    plan = json.loads(plan_path.read_text())
    place = find_place()
    device = join(place, "cpu")
    results: dict[str, Any] = {"runs": {}, "resumes": {}}
    for name, case in plan["runs"].items():
        print(name, flush=True)
        results["runs"][name] = run(case, plan["steps"], place, device)
    for name, case in plan["resumes"].items():
        print(name, flush=True)
        results["resumes"][name] = resume(case, 3, plan_path.parent / name.replace(" ", "-"), place, device)
    if place.rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main()
