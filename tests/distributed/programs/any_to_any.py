"""Writes checkpoints of several settings, or resumes each of them in several others. Started once per world size and
purpose by a test.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from chatgot.checkpoint import manifest, rng
from chatgot.checkpoint import resume as resuming
from chatgot.checkpoint.load import find
from chatgot.checkpoint.portable import StoredTensor, read_portable, stored
from chatgot.checkpoint.resume import parameter_groups
from chatgot.checkpoint.save import Saver
from chatgot.config.run import ModelConfig
from chatgot.data.loader import DataOrder, TrainBatches
from chatgot.deepspeed_json.resolve import build_engine_config
from chatgot.deepspeed_json.settings import CheckpointConfig
from chatgot.devices import device_facts
from chatgot.distributed import ControlGroup, Place, find_place
from chatgot.engine.build import build, join
from chatgot.engine.optimizer import schedule_factor
from chatgot.engine.step import TrainingEngine, mean_over_ranks
from chatgot.model.gpt import GPT
from chatgot.training.run import leave
from tests.distributed.programs.plain import tokens
from tests.support import TINY_MODEL, engine_json, present

STEPS, MORE = 3, 4


def start(
    case: dict[str, Any], place: Place, device: torch.device, seed: int
) -> tuple[TrainingEngine, TrainBatches, dict[str, Any]]:
    tree = engine_json(**case["json"])
    tree["zero_optimization"].update(case.get("zero", {}))
    config = build_engine_config(tree, "case.json", world_size=place.world_size, facts=device_facts(), n_params=30_000)
    model = GPT(ModelConfig(**{**TINY_MODEL, "n_layers": 1, "d_hid": 45}), 63)
    rng.seed(seed, place.rank)
    model.init_weights(seed)
    engine = build(model, config, device)
    order = DataOrder(len(tokens()), TINY_MODEL["max_seq_length"], seed=1)
    batches = TrainBatches(
        tokens() % 63, order, config.train_batch_size, config.micro_batch_size, place.rank, place.world_size
    )
    fields = {
        "world_size": place.world_size,
        "zero_stage": config.zero_stage,
        "precision": config.precision,
        "layout": resuming.layout(config.deepspeed),
    }
    return engine, batches, fields


def train(engine: TrainingEngine, batches: TrainBatches, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        step = engine.engine.global_steps
        assert engine.config.chatgot.schedule is not None
        engine.set_learning_rate(schedule_factor(step, STEPS + MORE, engine.config.chatgot.schedule))
        losses.append(mean_over_ranks(engine.train_step(batches.micro_batches(step * batches.global_batch_size))))
    return losses


def store(engine: TrainingEngine, folder: Path, fields: Any, ranks: ControlGroup) -> None:
    state: Any = {"parameter_groups": parameter_groups(engine.engine)}
    saver = Saver(folder, CheckpointConfig(), ranks)
    saver.begin(engine.engine, state, fields)
    saver.finish()


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(
        tensor.detach().float().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    ).hexdigest()[:16]


def in_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Everything per parameter, out of the files."""
    found = find(folder)
    assert found is not None
    state = read_portable(found)
    return {
        name: {
            "weight": digest(p.weight.whole()),
            **{key: digest(value.whole()) for key, value in p.moments.items()},
            **p.scalars,
            "weight_decay": state.groups[p.group]["weight_decay"],
        }
        for name, p in state.parameters.items()
    }


def in_engine(engine: TrainingEngine) -> dict[str, dict[str, str]]:
    """Weights and moments per parameter as DeepSpeed itself finds them. Its sum over the ranks loses the sign of zeros.
    Collective.
    """
    zero = engine.engine.optimizer
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = (
            False  # DeepSpeed links them when the first group has been stepped, the others have none yet
        )
        zero._lazy_init_hp_params_optimizer_state()
    found: dict[str, dict[str, str]] = {}
    for name, p in engine.engine.module.named_parameters():
        if engine.engine.zero_optimization():
            tensors = {"weight": safe_get_full_fp32_param(p)}
            tensors |= {key: safe_get_full_optimizer_state(p, key) for key in ("exp_avg", "exp_avg_sq")}
        else:
            tensors = {"weight": p} | {key: zero.state[p][key] for key in ("exp_avg", "exp_avg_sq")}
        found[name] = {key: digest(present(value) + 0.0) for key, value in tensors.items()}
    return found


def decays(engine: TrainingEngine) -> list[float]:
    return [group["weight_decay"] for group in engine.engine.optimizer.param_groups]


def readable(case: dict[str, Any]) -> bool:
    """Whether DeepSpeed itself can say what an engine holds: not for Muon's momentum, and wrongly with
    round_robin_gradients.
    """
    return case["json"].get("optimizer", {}).get("type") != "Muon" and not case["zero"].get("round_robin_gradients")


def write(case: dict[str, Any], folder: Path, place: Place, device: torch.device) -> dict[str, Any]:
    ranks = ControlGroup()
    engine, batches, fields = start(case, place, device, seed=1)
    before = train(engine, batches, STEPS)
    store(engine, folder, fields, ranks)
    found = {
        "before": before,
        "files": in_files(folder),
        "engine": in_engine(engine) if readable(case) else None,
        "decays": decays(engine),
    }
    found["losses"] = train(engine, batches, MORE)
    engine.engine.destroy()
    return found


def sabotage(control: str | None, source: Path, folder: Path, ranks: ControlGroup) -> Path:
    """Negative controls: what a wrong resume could do. Returns the folder to resume from."""
    original = read_portable

    def dropped(found):
        state = original(found)
        for parameter in state.parameters.values():
            for key, moment in parameter.moments.items():
                parameter.moments[key] = stored(torch.zeros(moment.shape), moment.shape)
        return state

    resuming.read_portable = dropped if control == "moments" else original
    if control != "shards":
        return source
    if ranks.rank == 0:
        shutil.copytree(source, folder)
        first, second = sorted(folder.glob("step-*/*_optim_states.pt"))
        first.rename(first.with_suffix(".aside"))
        second.rename(first)
        first.with_suffix(".aside").rename(second)
        tag = first.parent  # the hashes would give it away; here they are made to fit
        fields = {**manifest.read(tag), "files": {name: manifest.measure(tag / name) for name in manifest.listed(tag)}}
        manifest.write(tag, fields)
    ranks.barrier()
    return folder


@contextlib.contextmanager
def elements_read() -> Iterator[list[int]]:
    """Sizes of all ranges that are read from a checkpoint's files meanwhile, on this rank."""
    counts: list[int] = []
    original = StoredTensor.read

    def read(self: StoredTensor, start: int, numel: int) -> torch.Tensor:
        counts.append(numel)
        return original(self, start, numel)

    StoredTensor.read = read
    try:
        yield counts
    finally:
        StoredTensor.read = original


def load(item: dict[str, Any], folder: Path, place: Place, device: torch.device) -> dict[str, Any]:
    ranks = ControlGroup()
    engine, batches, fields = start(item["case"], place, device, seed=2)
    source = find(sabotage(item.get("control"), Path(item["from"]), folder / "swapped", ranks))
    assert source is not None
    with elements_read() as counts:
        _, notes = resuming.resume(engine.engine, source, fields, ranks)
    if item.get("control") == "groups":  # as DeepSpeed's universal checkpoint does at stage 3
        for group in engine.engine.optimizer.param_groups:
            group["weight_decay"] = engine.engine.optimizer.param_groups[0]["weight_decay"]
    found: dict[str, Any] = {"notes": notes, "step": engine.engine.global_steps, "decays": decays(engine)}
    found["read"] = ranks.gather(sum(counts))
    found["parameters"] = sum(getattr(p, "ds_numel", p.numel()) for p in engine.engine.module.parameters())
    if item.get("files", True):
        store(engine, folder / "again", fields, ranks)
        found["files"] = in_files(folder / "again")
    if readable(item["case"]):
        found["engine"] = in_engine(engine)
    if item.get("train", True):
        found["losses"] = train(engine, batches, MORE)
    engine.engine.destroy()
    return found


def main() -> None:
    faulthandler.dump_traceback_later(540, exit=True)
    plan_path = Path(sys.argv[1])
    plan = json.loads(plan_path.read_text())
    place = find_place()
    device = join(place, "cpu")
    results: dict[str, Any] = {}
    for name, case in plan.get("write", {}).items():
        print(name, flush=True)
        results[name] = write(case, Path(plan["folder"]) / name, place, device)
    for name, item in plan.get("load", {}).items():
        print(name, flush=True)
        results[name] = load(item, Path(plan["folder"]) / "loads" / name, place, device)
    if place.rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main()
