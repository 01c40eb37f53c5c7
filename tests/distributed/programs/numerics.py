"""Steps with non-finite gradients on one rank, at every stage and precision; and torch_autocast. Started once per world
size by a test.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from chatgot.checkpoint import rng
from chatgot.config.run import ModelConfig
from chatgot.data.loader import DataOrder, TrainBatches
from chatgot.deepspeed_json.resolve import build_engine_config
from chatgot.devices import device_facts
from chatgot.distributed import Place, find_place
from chatgot.engine import process_guards
from chatgot.engine import step as engine_step
from chatgot.engine.build import build, join
from chatgot.engine.step import TrainingEngine, mean_over_ranks
from chatgot.model.gpt import GPT
from chatgot.training.divergence import Guard, diagnose
from chatgot.training.run import leave
from tests.distributed.programs.plain import tokens
from tests.support import TINY_MODEL, engine_json, present

POISONED_BY = engine_step.poisoned_by


class Poison:
    """Makes one rank's loss, one of its activations or its gradients non-finite while `armed`; 'loss alone' leaves its
    gradients finite.
    """

    def __init__(self, model: GPT, kind: str, place: Place):
        self.armed = False
        self.here = place.rank == place.world_size - 1
        if kind == "loss":
            model.register_forward_hook(self._to_the_loss(lambda loss: loss * math.nan))
        elif kind == "loss alone":
            model.register_forward_hook(self._to_the_loss(lambda loss: loss + math.nan))
        elif kind == "activation":
            model.layers[1].register_forward_hook(self._activation)
        else:
            model.norm.register_forward_hook(self._gradient)

    def _activation(self, _module: nn.Module, _arguments: Any, output: Tensor) -> Tensor:
        return output.index_fill(1, torch.tensor([3]), math.nan) if self._now() else output

    def _gradient(self, _module: nn.Module, _arguments: Any, output: Tensor) -> None:
        """The loss stays finite, and so does lm_head's gradient; everything before it gets inf."""
        if self._now():
            output.register_hook(lambda gradient: gradient * math.inf)

    def _to_the_loss(self, change: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Any, Any], Tensor]:
        return lambda _module, _arguments, loss: change(loss) if self._now() else loss

    def _now(self) -> bool:
        return self.armed and self.here


def own_state(engine: TrainingEngine) -> str:
    """Digest of all that a step can move on this rank: parameters (stage 3: its shards), fp32 partitions, moments,
    momenta, counters.
    """
    digest = hashlib.sha256()
    optimizer = engine.engine.optimizer
    tensors = [getattr(p, "ds_tensor", p) for p in engine.engine.module.parameters()]
    partitions = getattr(optimizer, "fp32_partitioned_groups_flat", None) or getattr(
        optimizer, "single_partition_of_fp32_groups", []
    )
    states = getattr(optimizer, "optimizer", optimizer).state.values()
    values = [value for state in states for _, value in sorted(state.items())]
    for value in [*tensors, *partitions, *values]:
        if isinstance(value, torch.Tensor):
            digest.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()


def weights(engine: TrainingEngine) -> str:
    """Digest of all fp32 master weights. Collective."""
    digest = hashlib.sha256()
    zero = engine.engine.zero_optimization()
    for parameter in engine.engine.module.parameters():
        full = present(safe_get_full_fp32_param(parameter)) if zero else parameter.detach()
        digest.update(full.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def shared(value: Any, place: Place) -> list[Any]:
    values: list[Any] = [None] * place.world_size
    dist.all_gather_object(values, value)
    return values


def start(case: dict[str, Any], place: Place, device: torch.device) -> tuple[TrainingEngine, TrainBatches, Poison]:
    tree = engine_json(**case["json"])
    tree["zero_optimization"].update(case.get("zero", {}))
    config = build_engine_config(tree, "case.json", world_size=place.world_size, facts=device_facts(), n_params=30_000)
    model = GPT(ModelConfig(**TINY_MODEL), 64)
    rng.seed(1, place.rank)
    model.init_weights(1)
    poison = Poison(model, case.get("kind", "loss"), place)
    engine = build(model, config, device)
    if case.get("without_poisoning"):
        engine_step.poisoned_by = lambda loss: loss
    if case.get("without_guard"):
        del engine.engine.clip_fp32_gradients, engine.engine.optimizer.step  # the guard's; the stock ones come back
    order = DataOrder(len(tokens()), TINY_MODEL["max_seq_length"], seed=1)
    batches = TrainBatches(
        tokens(), order, config.train_batch_size, config.micro_batch_size, place.rank, place.world_size
    )
    return engine, batches, poison


def run(case: dict[str, Any], schedule: str, place: Place, device: torch.device) -> dict[str, Any]:
    """`schedule`: one letter per step, g(ood) or b(ad). A bad step does not consume its batch: leaving it out gives the
    same good steps.
    """
    engine, batches, poison = start(case, place, device)
    found: dict[str, Any] = {"errors": [], "steps": []}
    sample = 0
    guard = Guard(engine.config.chatgot.guard)
    for letter in schedule:
        poison.armed = letter == "b"
        engine.set_learning_rate(1.0)
        loss = engine.train_step(batches.micro_batches(sample))
        norms, diagnosis = engine.layer_grad_norms, None
        if not engine.engine.was_step_applied():
            diagnosis = dict(zip(("losses", "gradients_finite"), diagnose(engine, batches.micro_batches(sample))))
        poison.armed = False
        if diverged := guard.divergence(engine.engine.global_steps, engine.skips_in_a_row, None):
            found["errors"].append({"step": engine.engine.global_steps, "text": diverged.why})
        if letter == "g":
            sample += batches.global_batch_size
        found["steps"].append(
            {
                "letter": letter,
                "loss": mean_over_ranks(loss),
                "applied": engine.engine.was_step_applied(),
                "global_steps": engine.engine.global_steps,
                "skipped_steps": engine.engine.skipped_steps,
                "grad_norm": engine.grad_norm,
                "lr": engine.learning_rate,
                "state": own_state(engine),
                "norms": norms,
                "diagnosis": diagnosis,
            }
        )
    found["weights"] = weights(engine)
    engine.engine.destroy()
    return found


def autocast_losses(case: dict[str, Any], steps: int, place: Place, device: torch.device) -> dict[str, Any]:
    engine, batches, _ = start(case, place, device)
    losses = []
    dtypes: set[str] = set()
    engine.engine.module.layers[0].attention.qkv.register_forward_hook(
        lambda _m, _a, output: dtypes.add(str(output.dtype))
    )
    for step in range(steps):
        warm = 2
        rate = (
            (step + 1) / warm
            if step < warm
            else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - 1 - warm)))
        )
        engine.set_learning_rate(rate)
        losses.append(mean_over_ranks(engine.train_step(batches.micro_batches(step * batches.global_batch_size))))
    masters = {str(p.dtype) for p in engine.engine.module.parameters()}
    engine.engine.destroy()
    return {"losses": losses, "computes_in": sorted(dtypes), "parameters": sorted(masters)}


def main() -> None:
    faulthandler.dump_traceback_later(540, exit=True)
    plan = json.loads(Path(sys.argv[1]).read_text())
    place = find_place()
    device = join(place, "cpu")
    process_guards.run_muon_uncompiled()
    results: dict[str, Any] = {"poisoned": {}, "clean": {}, "autocast": {}}
    for name, case in plan["poisoned"].items():
        print(name, flush=True)
        results["poisoned"][name] = shared(run(case, plan["schedule"], place, device), place)
        engine_step.poisoned_by = POISONED_BY
        if not name.startswith("control"):
            results["clean"][name] = shared(run(case, plan["schedule"].replace("b", ""), place, device), place)
    for name, case in plan["autocast"].items():
        print(name, flush=True)
        results["autocast"][name] = autocast_losses(case, plan["steps"], place, device)
    if place.rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main()
