"""Runs of the real training program in which a rank runs out of memory, one after the other; reports what an outsider
could compare.

Each run: {"name", "argv" (of train.py), "inject": [{"site", "step", "micro", "rank", "size"}], each once, while
micro-batches have that size, "control": null or what is deliberately left out}.
"""

from __future__ import annotations

import faulthandler
import json
import sys
from pathlib import Path
from typing import Any

import torch

from chatgot.checkpoint import rng
from chatgot.cli import train_parser
from chatgot.data.loader import TrainBatches
from chatgot.distributed import find_place
from chatgot.engine import partial_step
from chatgot.errors import ChatGoTError
from chatgot.observe.journal import live_metrics, read_journal
from chatgot.training import run

TRACE: list[list[int]] = []
_discard, _adamw_step, _restore = partial_step.discard, torch.optim.AdamW.step, rng.restore


def record_samples() -> None:
    original = TrainBatches.indices

    def indices(self, first_sample):
        found = original(self, first_sample)
        TRACE.append([int(i) for i in found])
        return found

    TrainBatches.indices = indices


class Shortage:
    """Raises torch.OutOfMemoryError at given places."""

    def __init__(self, inject: list[dict[str, Any]], rank: int) -> None:
        self.left = [one for one in inject if one["rank"] in (rank, "all")]
        self.engine: Any = None
        self.micro = -1

    def due(self, site: str) -> bool:
        if self.engine is None:
            return False
        now = {"site": site, "step": self.engine.global_steps + 1, "size": self.engine.train_micro_batch_size_per_gpu()}
        if site != "optimizer":
            now["micro"] = self.micro
        found = next((one for one in self.left if now.items() <= one.items()), None)
        if found is not None:
            self.left.remove(found)
        return found is not None

    def wire(self, engine: Any) -> None:
        self.engine = engine

        def begin(module, inputs):
            if module.training:
                self.micro = engine.micro_steps % engine.gradient_accumulation_steps()

        def inside(module, inputs):
            if module.training and self.due("forward"):
                raise torch.OutOfMemoryError("injected in forward")

        def after(module, inputs, output):
            if output.requires_grad:
                output.register_hook(self.backward)

        engine.module.register_forward_pre_hook(begin)
        list(engine.module.layers[1].modules())[-1].register_forward_pre_hook(inside)
        engine.module.layers[0].register_forward_hook(after)

    def backward(self, gradient):
        if self.due("backward"):
            raise torch.OutOfMemoryError("injected in backward")
        return gradient

    def optimizer_step(self, optimizer, *args, **kwargs):
        if self.due("optimizer"):
            raise torch.OutOfMemoryError("injected in the optimizer step")
        return _adamw_step(optimizer, *args, **kwargs)


def keep_gradients(engine: Any) -> None:
    """The control: the abandoned step's gradients stay."""
    engine.micro_steps = 0


def one(item: dict[str, Any], place: Any) -> dict[str, Any]:
    arguments = train_parser().parse_args(item["argv"])
    partial_step.discard = keep_gradients if item.get("control") == "gradients" else _discard
    rng.restore = (lambda state: []) if item.get("control") == "rng" else _restore
    shortage = Shortage(item.get("inject", []), place.rank)
    torch.optim.AdamW.step = lambda self, *args, **kwargs: shortage.optimizer_step(self, *args, **kwargs)
    loop = run.prepare_run(
        run.TrainArguments(
            deepspeed_config=arguments.deepspeed_config,
            out_dir=arguments.out_dir,
            config=arguments.config,
            data=arguments.data,
            resume_from=arguments.resume_from,
            overrides=tuple(arguments.overrides),
        ),
        place,
    )
    shortage.wire(loop.engine.engine)
    TRACE.clear()
    started_at, exit_code, message = loop.step, 0, ""
    try:
        with loop.stop:
            exit_code = run.finish(loop)
    except ChatGoTError as error:
        exit_code, message = error.exit_code, str(error)
    loop.ranks.barrier()
    gathered = loop.ranks.gather((list(TRACE), exit_code, loop.engine.config.micro_batch_size, len(shortage.left)))
    found: dict[str, Any] = {}
    if place.rank == 0:
        journal = read_journal(arguments.out_dir / "metrics.jsonl")[0]
        found = {
            "started_at": started_at,
            "losses": {
                r["step"]: r["train/loss"]
                for r in live_metrics(arguments.out_dir / "metrics.jsonl")
                if "train/loss" in r
            },
            "digests": [(r["step"], r["digest"]["batch"], r["digest"]["setup"]) for r in journal if "digest" in r],
            "lines": [r["step"] for r in journal if "train/loss" in r],
            "traces": [rank[0] for rank in gathered],
            "exit_codes": [rank[1] for rank in gathered],
            "micro_batches": [rank[2] for rank in gathered],
            "unfired": [rank[3] for rank in gathered],
            "events": [e for e in read_journal(arguments.out_dir / "events.jsonl")[0]],
            "message": message,
        }
    loop.engine.engine.destroy()
    return found


def main() -> None:
    faulthandler.dump_traceback_later(300, exit=True)
    plan = json.loads(Path(sys.argv[1]).read_text())
    place = find_place()
    record_samples()
    results = {}
    for item in plan:
        print(item["name"], flush=True)
        results[item["name"]] = one(item, place)
    if place.rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
    run.leave()


if __name__ == "__main__":
    main()
