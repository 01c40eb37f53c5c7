"""One model of six blocks, with and without recomputation, at every stage: losses, gradients, saved bytes, recomputed
blocks.

Started once per world size by a test.
"""

from __future__ import annotations

import faulthandler
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from chatgot.checkpoint import rng
from chatgot.config.run import ModelConfig
from chatgot.data.loader import DataOrder, EvalBatches, TrainBatches
from chatgot.deepspeed_json.resolve import build_engine_config
from chatgot.devices import device_facts
from chatgot.distributed import Place, find_place
from chatgot.engine import activation_checkpointing
from chatgot.engine.build import build, join
from chatgot.engine.step import TrainingEngine
from chatgot.model.generate import generate
from chatgot.model.gpt import GPT, Block
from chatgot.training.evaluate import evaluate
from chatgot.training.run import leave
from tests.distributed.programs.plain import tokens
from tests.support import TINY_MODEL, engine_json, present

LAYERS, STEPS = 6, 2
MODEL = {**TINY_MODEL, "n_layers": LAYERS, "dropout": 0.1}


class Boom(Exception):
    """Raised by a block on purpose."""


class Checkpoints:
    """Counts the calls of both backends' checkpoint(), which the engine wires into the model."""

    def __init__(self) -> None:
        self.count = 0
        activation_checkpointing.torch_checkpoint = self._counted(activation_checkpointing.torch_checkpoint)
        deepspeed.checkpointing.checkpoint = self._counted(deepspeed.checkpointing.checkpoint)

    def _counted(self, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return checkpoint(*args, **kwargs)

        return counted

    def take(self) -> int:
        count, self.count = self.count, 0
        return count


class Forwards:
    """Counts the forwards of all blocks, and can make one of them raise."""

    def __init__(self) -> None:
        self.count = 0
        self.raise_at: int | None = None
        self.raised: list[Boom] = []
        original = Block.forward

        def forward(block: Block, *args: Any, **kwargs: Any) -> torch.Tensor:
            self.count += 1
            if self.count == self.raise_at:
                self.raised.append(Boom("block on fire", block.attention.index))
                raise self.raised[-1]
            return original(block, *args, **kwargs)

        setattr(Block, "forward", forward)  # noqa: B010 - of the class

    def take(self) -> int:
        count, self.count = self.count, 0
        return count


@contextmanager
def saved_bytes(model: torch.nn.Module, found: list[int]) -> Iterator[None]:
    """Appends the bytes of all storages saved for the backward pass, parameters left out, each storage counted once."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage  # kept alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
    found.append(sum(storage.nbytes() for storage in storages.values()))


def digest(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    return {
        name: hashlib.sha256(t.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, t in tensors.items()
    }


def gradients(engine: TrainingEngine) -> dict[str, torch.Tensor]:
    """Full gradients by parameter, after backward and before the step. Collective."""
    zero = engine.engine.zero_optimization()
    named = engine.engine.module.named_parameters()
    return {name: present(safe_get_full_grad(p) if zero else p.grad) for name, p in named}


def start(case: dict[str, Any], place: Place, device: torch.device) -> tuple[TrainingEngine, GPT, TrainBatches]:
    config = build_engine_config(
        engine_json(**case["json"]), "case.json", world_size=place.world_size, facts=device_facts(), n_params=90_000
    )
    model = GPT(ModelConfig(**{**MODEL, **case.get("model", {})}), 64)
    rng.seed(1, place.rank)
    model.init_weights(1)
    engine = build(model, config, device)
    if case.get("forget_rng"):
        model.set_activation_checkpointing(
            functools.partial(torch_checkpoint, use_reentrant=False, preserve_rng_state=False)
        )
    order = DataOrder(len(tokens()), MODEL["max_seq_length"], seed=1)
    return (
        engine,
        model,
        TrainBatches(tokens(), order, config.train_batch_size, config.micro_batch_size, place.rank, place.world_size),
    )


def run(
    case: dict[str, Any], place: Place, device: torch.device, forwards: Forwards, checkpoints: Checkpoints
) -> dict[str, Any]:
    engine, model, batches = start(case, place, device)
    sizes: list[int] = []
    found: dict[str, Any] = {
        "losses": [],
        "gradients": [],
        "blocks": [],
        "note": engine.notes[0],
        "keys": sorted(model.state_dict()),
    }
    forwards.take()
    checkpoints.take()
    elements = 0
    for step in range(STEPS):
        engine.set_learning_rate(1.0)
        for input_ids, targets in batches.micro_batches(step * batches.global_batch_size):
            with saved_bytes(model, sizes):
                loss = engine.engine(input_ids, targets)
            engine.engine.backward(loss)
            elements = input_ids.numel() * MODEL["d_model"]
            found["losses"].append(float.hex(float(loss.detach())))
            found["gradients"].append(digest(gradients(engine)))
            engine.engine.step()
        found["blocks"].append(forwards.take())
    # deepspeed.checkpointing keeps a block's input on the autograd context, where no saved-tensor hook sees it.
    kept = case.get("inputs_beside_the_graph", 0) * elements * 4
    found["saved_bytes"] = sizes[-1] + kept
    zero = engine.engine.zero_optimization()
    named = model.named_parameters()
    found["weights"] = digest({name: present(safe_get_full_fp32_param(p) if zero else p) for name, p in named})

    found["checkpoint_calls"] = checkpoints.take() / STEPS
    evaluation = EvalBatches(tokens()[:200], MODEL["max_seq_length"], 2, place.rank, place.world_size)
    evaluate(engine.engine, evaluation, device)
    found["evaluation_blocks"] = forwards.take() / len(evaluation)
    engine.engine.train()
    generate(engine.engine, torch.zeros(1, 3, dtype=torch.long), 4)
    found["sampling_blocks"] = forwards.take() / 4
    found["checkpoint_calls_outside_training"] = checkpoints.take()
    engine.engine.destroy()
    deepspeed.checkpointing.reset()
    return found


def explode(case: dict[str, Any], at: int, place: Place, device: torch.device, forwards: Forwards) -> dict[str, Any]:
    """What arrives outside of the train step when the `at`-th forward of a block raises."""
    engine, _, batches = start(case, place, device)
    forwards.take()
    forwards.raise_at = at
    forwards.raised.clear()
    seen: BaseException | None = None
    try:
        engine.train_step(batches.micro_batches(0))
    except BaseException as error:  # noqa: BLE001 - whatever it is, the test is told
        seen = error
    forwards.raise_at = None
    engine.engine.destroy()
    deepspeed.checkpointing.reset()
    return {
        "raised": len(forwards.raised),
        "same object": seen is forwards.raised[0],
        "type": type(seen).__name__,
        "args": list(seen.args) if seen else None,
        "chained": bool(seen and (seen.__cause__ or seen.__context__)),
        "blocks run": forwards.take(),
    }


def main() -> None:
    faulthandler.dump_traceback_later(540, exit=True)
    plan = json.loads(Path(sys.argv[1]).read_text())
    place = find_place()
    device = join(place, "cpu")
    forwards, checkpoints = Forwards(), Checkpoints()
    results: dict[str, Any] = {"cases": {}, "explosions": {}}

    def of_all_ranks(found: dict[str, Any]) -> list[Any]:
        ranks: list[Any] = [None] * place.world_size
        dist.all_gather_object(ranks, found)
        return ranks

    for name, case in plan["cases"].items():
        print(name, flush=True)
        results["cases"][name] = of_all_ranks(run(case, place, device, forwards, checkpoints))
    for name, (case, at) in plan["explosions"].items():
        print(name, flush=True)
        results["explosions"][name] = of_all_ranks(explode(case, at, place, device, forwards))
    if place.rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main()
