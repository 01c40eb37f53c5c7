"""Trains the tiny GPT as each given JSON says, once as a user of stock DeepSpeed would and once through our engine, and
writes losses, weights and side effects. Started once per side and world size by tests/distributed/test_stock.py.
"""

from __future__ import annotations

import copy
import faulthandler
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chatgot.config.run import ModelConfig
from chatgot.data.loader import DataOrder, TrainBatches
from chatgot.deepspeed_json.resolve import EngineConfig
from chatgot.devices import device_facts
from chatgot.distributed import find_place
from chatgot.engine import process_guards
from chatgot.engine.build import build, join
from chatgot.engine.step import mean_over_ranks
from chatgot.model.gpt import GPT
from chatgot.training.run import leave
from tests.distributed.programs.plain import tokens
from tests.support import TINY_MODEL, read_engine_config, write_json

SEED = 1


def ours(model: GPT, config: EngineConfig) -> tuple[Any, Any]:
    """Our engine, and what does one step of it with this rank's micro-batches."""
    engine = build(model, config, torch.device("cpu"))
    return engine.engine, engine.train_step


def stock(model: GPT, tree: dict[str, Any]) -> tuple[Any, Any]:
    """stock DeepSpeed's engine, and forward, backward and step by hand."""
    import deepspeed

    params = (tree.get("optimizer") or {}).get("params") or {}
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups: Any = [
        {"params": decay, "weight_decay": params.get("weight_decay", 0.0)},
        {"params": rest, "weight_decay": 0.0},
    ]
    if tree["optimizer"]["type"] == "Adagrad" and tree.get("zero_optimization", {}).get("stage"):
        groups = list(model.parameters())  # DeepSpeed fails on two groups
    process_guards.run_muon_uncompiled()  # the same numbers, without a minute of g++
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=tree, dist_init_required=False)

    def step(micro_batches: Any) -> torch.Tensor:
        losses = []
        for input_ids, targets in micro_batches:
            loss = engine(input_ids, targets)
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach().clone())
        return torch.stack(losses).mean()

    return engine, step


def whole_weights(engine: Any) -> dict[str, np.ndarray]:
    """The module's parameters, gathered where they are partitioned. Collective."""
    import deepspeed

    found = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found[name] = parameter.detach().to(torch.float64).numpy().copy()
    return found


def messages() -> dict[str, dict[str, int]]:
    """What the communication logger has counted: operation -> bytes -> calls."""
    from deepspeed import comm

    log = comm.comms_logger
    return {name: {str(size): int(row[0]) for size, row in rows.items()} for name, rows in log.comms_dict.items()}


def train(side: str, name: str, setting: dict[str, Any], folder: Path, steps: int, place: Any) -> dict[str, Any]:
    from deepspeed import comm

    path = write_json(folder / f"{side}{place.rank}.json", setting["json"])
    config = read_engine_config(path, {}, world_size=place.world_size, facts=device_facts(), n_params=30_000)
    model = GPT(ModelConfig(**TINY_MODEL), 64)
    model.init_weights(SEED)
    torch.manual_seed(SEED)
    comm.comms_logger.comms_dict.clear()
    process_guards.forget_autocast()  # both sides train many settings in one process
    if side == "ours":
        engine, step = ours(model, config)
    else:
        tree = {**copy.deepcopy(setting["json"]), **copy.deepcopy(setting.get("stock", {}))}
        tree.pop("chatgot", None)
        engine, step = stock(model, tree)
    order = DataOrder(len(tokens()), TINY_MODEL["max_seq_length"], seed=SEED)
    batches = TrainBatches(
        tokens(), order, config.train_batch_size, config.micro_batch_size, place.rank, place.world_size
    )
    losses = [mean_over_ranks(step(batches.micro_batches(i * config.train_batch_size))) for i in range(steps)]
    weights = whole_weights(engine)
    if place.rank == 0:
        np.savez(folder / f"{name}.npz", allow_pickle=False, **weights)
    counted = messages() if "comms_logger" in setting["json"] else None
    engine.destroy()
    return {
        "losses": losses,
        "messages": counted,
        "said": [[finding.level, finding.key] for finding in config.findings],
    }


def main() -> None:
    faulthandler.dump_traceback_later(900, exit=True)
    side, plan_path, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    plan, place, results = json.loads(plan_path.read_text()), find_place(), {}
    join(place, "cpu")
    os.chdir(folder)  # DeepSpeed's monitors and profiler write where the JSON says, relative to here
    for name, setting in plan["settings"].items():
        print(name, flush=True)
        try:
            results[name] = train(side, name, setting, folder, plan["steps"], place)
        except Exception as error:  # noqa: BLE001 - whatever it is, the test says which setting it was
            results[name] = {"error": f"{type(error).__name__}: {error}"}
    if place.rank == 0:
        (folder / "results.json").write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main()
