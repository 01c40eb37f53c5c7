"""Drives the real training program for a list of runs, as a launcher would start it, and reports what an outsider could
compare.

Each run: {"name", "argv" (of train.py), "abandon_after": step or null, "control": null or what is deliberately not
restored}.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from chatgot.checkpoint import rng
from chatgot.checkpoint.load import find
from chatgot.checkpoint.portable import fp32_weights
from chatgot.cli import train_parser
from chatgot.data.loader import TrainBatches
from chatgot.distributed import find_place
from chatgot.training import loop as loop_module
from chatgot.training import preparation, run
from tests.support import live_metrics

TRACE: list[list[int]] = []


def record_samples() -> None:
    original = TrainBatches.micro_batches

    def micro_batches(self: TrainBatches, first_sample: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        TRACE.append([int(i) for i in self.order.starts(self.indices(first_sample))])
        return original(self, first_sample)

    TrainBatches.micro_batches = micro_batches


def sabotage(control: str | None) -> None:
    """Negative controls: leave out one part of a resume."""
    if control == "rng":
        rng.restore = lambda state: []
    elif control == "position":
        original = preparation.resume

        def resume(*arguments: Any):
            client_state, notes = original(*arguments)
            client_state["next_sample"] = 0
            return client_state, notes

        preparation.resume = resume
    elif control == "moments":
        original = preparation.resume

        def forgetting(engine: Any, *arguments: Any):
            resumed = original(engine, *arguments)
            for state in engine.basic_optimizer.state.values():
                for value in state.values():
                    if isinstance(value, torch.Tensor):
                        value.zero_()
            return resumed

        preparation.resume = forgetting
    elif control == "rate":
        factor = loop_module.schedule_factor
        loop_module.schedule_factor = lambda step, max_steps, config: (1 + 1e-6) * factor(step, max_steps, config)
    elif control == "schedule":
        factor = loop_module.schedule_factor
        loop_module.schedule_factor = lambda step, max_steps, config: factor(
            step % (max_steps // 2), max_steps, config
        )  # starts again at half-way


def weights_digest(out_dir: Path) -> str:
    found = find(out_dir / "checkpoints")
    assert found is not None
    digest = hashlib.sha256()
    for name, tensor in sorted(fp32_weights(found).items()):
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    place = find_place()
    record_samples()
    results = {}
    for item in plan:
        sabotage(item.get("control"))
        arguments = train_parser().parse_args(item["argv"])
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
        TRACE.clear()
        started_at = loop.step
        if item.get("abandon_after") is None:
            with loop.stop:
                run.finish(loop)
        else:
            for step in loop.steps():
                if step == item["abandon_after"]:
                    break  # as if killed: nothing is closed or saved
        loop.ranks.barrier()
        traces = loop.ranks.gather(list(TRACE))
        if place.rank == 0:
            metrics = live_metrics(arguments.out_dir / "metrics.jsonl")
            results[item["name"]] = {
                "started_at": started_at,
                "losses": {r["step"]: float.hex(r["train/loss"]) for r in metrics if "train/loss" in r},
                "lr": {r["step"]: float.hex(r["optim/lr"]) for r in metrics if "optim/lr" in r},
                "grad_norm": {
                    r["step"]: float.hex(float(r["optim/grad_norm"])) for r in metrics if "optim/grad_norm" in r
                },
                "trace": traces,
                "weights": weights_digest(arguments.out_dir) if item.get("abandon_after") is None else None,
            }
        loop.engine.engine.destroy()
    if place.rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
    run.leave()


if __name__ == "__main__":
    main()
