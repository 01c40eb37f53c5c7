"""Try a few real optimizer steps in processes of their own: running out of memory, or being killed, costs nothing here.

Run as a program it is one rank of a probe: `python -m chatgot.tuning.probe TASK`, with the rank in the environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from chatgot.config.run import ModelConfig
from chatgot.deepspeed_json.resolve import EngineConfig, build_engine_config
from chatgot.devices import GIB, Device, DeviceFacts, device_facts, is_out_of_memory
from chatgot.distributed import find_place, free_port, python_path
from chatgot.errors import EXIT_ENVIRONMENT, ChatGoTError, MachineError
from chatgot.launcher.command import ATTEMPT
from chatgot.launcher.entry import rank_environment
from chatgot.launcher.supervisor import dies_with_this_process
from chatgot.model.shapes import count_parameters
from chatgot.plan.estimate import estimate

OUTSIDE = ("wandb", "tensorboard", "csv_monitor", "comet", "flops_profiler", "comms_logger", "scheduler")
"""Sections of the JSON that a probe leaves out: they write somewhere else, or have no say in memory and speed."""
CERTAIN = 1.5
"""A probe is left out if the plan's peak is this many times what there is, far beyond its errors (BENCHMARKS.md)."""

_KILLED = (-9, 137)


@dataclass(frozen=True)
class Task:
    """Settings to try: a DeepSpeed JSON's tree with numbers for micro-batch and accumulation, and a model."""

    tree: dict[str, Any]
    model: dict[str, Any]
    """Fields of ModelConfig."""
    vocab_size: int
    steps: int = 2
    """Optimizer steps; the first one is not timed."""


@dataclass(frozen=True)
class Outcome:
    """What all ranks together measured: it fits only if it fits on each of them."""

    fits: bool
    reason: str = ""
    """Why not."""
    peak_bytes: int = 0
    """Most memory in use at a time on any rank: of its device, or on a CPU of the process."""
    limit_bytes: int = 0
    """What that rank could have had."""
    tokens_per_sec: float = 0.0
    """Over all ranks, at the pace of the slowest."""
    error: str = ""
    """Why a rank failed, where memory was not the reason."""


@dataclass
class Probes:
    """Starts one process for each of some ranks, and watches them together with those of other machines."""

    device: Device
    """The one with the least memory; the same everywhere, so that all leave out the same probes."""
    ranks: tuple[int, ...]
    """Those started here, in the order of LOCAL_RANK from `first_local` on."""
    world_size: int
    margin: float
    """Share of the memory that must stay free."""
    address: str = "127.0.0.1"
    first_local: int = 0
    share: Callable[[Any], list[Any]] = field(default=lambda value: [value])
    """Every starter's value, everywhere. Collective where there are several."""
    program: tuple[str, ...] = ("-m", "chatgot.tuning.probe")

    def outcome(self, task: Task) -> Outcome:
        """Run the probe, unless the plan is sure that it cannot fit."""
        model, config = read_task(task, self.world_size, self.device.facts)
        plan = estimate(model, task.vocab_size, config, self.world_size, self.device)
        needed = plan.needed - plan.margin
        if needed <= CERTAIN * plan.capacity:
            return self.run(task)
        sizes = f"{needed / GIB:.2f} GiB, of {plan.capacity / GIB:.2f} GiB"
        return Outcome(False, f"not tried: chatgot plan says {sizes}")

    def run(self, task: Task) -> Outcome:
        """Probe on all ranks; the same answer everywhere.

        Raises:
            MachineError: a rank ended for another reason than memory.
        """
        port = self.share(free_port())[0]
        with tempfile.TemporaryDirectory(prefix="chatgot-probe-") as name:
            folder = Path(name)
            (folder / "task.json").write_text(json.dumps(asdict(task)), encoding="utf-8")
            processes: list[subprocess.Popen] = []
            try:
                for local_rank, rank in enumerate(self.ranks, self.first_local):
                    processes.append(self._start(folder, rank, local_rank, port))
                codes = self._wait(processes)
            finally:
                for process in processes:
                    process.kill()
                    process.wait()
            mine = [self._result(folder, rank, code) for rank, code in zip(self.ranks, codes) if code is not None]
        return _together([one for each in self.share(mine) for one in each])

    def _start(self, folder: Path, rank: int, local_rank: int, port: int) -> subprocess.Popen:
        """Start a rank in the environment that launch/run gives to one, so that a probe is as fast as the run."""
        local_ranks = max(len(self.ranks), int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        given = rank_environment(os.environ, rank, local_ranks, port, self.device.on_cuda)
        environment = {
            name: value
            for name, value in given.items()
            if name not in ("CHATGOT_FAULT", ATTEMPT) and not name.startswith("TORCHELASTIC_")
        } | {
            "PYTHONPATH": python_path(),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": self.address,
        }
        command = [sys.executable, *self.program, str(folder / "task.json")]
        with open(folder / f"log.{rank}", "wb") as log:
            return subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=dies_with_this_process(),
            )

    def _wait(self, processes: list[subprocess.Popen]) -> list[int | None]:
        """Wait until all ranks have ended, or one has failed and the others had time to.

        Returns:
            The exit codes; None for a rank that is still running.
        """
        last_chance = None
        while True:
            codes = [process.poll() for process in processes]
            states = self.share((any(codes), None in codes))
            if last_chance is None and any(bad for bad, _ in states):
                # A rank that lost its peer may end before the one that says that memory ran out.
                last_chance = time.monotonic() + 1.0
            late = any(self.share(last_chance is not None and time.monotonic() > last_chance))
            if late or not any(running for _, running in states):
                return codes
            time.sleep(0.05)

    def _result(self, folder: Path, rank: int, code: int) -> Outcome:
        """What the end of a rank means: it fits, memory ran out, or an error."""
        if code == 0:
            outcome = Outcome(True, **json.loads((folder / f"result.{rank}.json").read_text(encoding="utf-8")))
            if outcome.peak_bytes <= outcome.limit_bytes * (1 - self.margin):
                return outcome
            used = f"{outcome.peak_bytes / GIB:.2f} of {outcome.limit_bytes / GIB:.2f} GiB in use"
            return replace(outcome, fits=False, reason=f"leaves less than {self.margin:.0%} free ({used})")
        log = (folder / f"log.{rank}").read_text(encoding="utf-8", errors="replace")
        if code in _KILLED:
            return Outcome(False, f"rank {rank} was killed, as the kernel does when memory runs out")
        if code == EXIT_ENVIRONMENT and "chatgot-probe: out of memory" in log:
            return Outcome(False, f"rank {rank} ran out of memory")
        if "std::bad_alloc" in log:
            return Outcome(False, f"rank {rank} ran out of memory (std::bad_alloc)")
        error = f"rank {rank} of a probe ended with {code}, not for want of memory:\n{log[-3000:].strip()}"
        return Outcome(False, error=error)


def _together(outcomes: list[Outcome]) -> Outcome:
    """Combine over ranks. A rank's error counts only where no rank ran out of memory, for it may have lost its peer."""
    bad = [one for one in outcomes if not one.fits]
    of_memory = [one for one in bad if not one.error]
    if bad and not of_memory:
        raise MachineError(bad[0].error)
    fullest = max(outcomes, key=lambda one: one.peak_bytes, default=Outcome(True))
    slowest = min((one.tokens_per_sec for one in outcomes if one.peak_bytes), default=0.0)
    reason = of_memory[0].reason if bad else ""
    return Outcome(not bad, reason, fullest.peak_bytes, fullest.limit_bytes, slowest)


def read_task(task: Task, world_size: int, facts: DeviceFacts) -> tuple[ModelConfig, EngineConfig]:
    """Resolve the settings of a task, without what a probe leaves out."""
    model = ModelConfig(**task.model)
    n_params = count_parameters(model, task.vocab_size)
    tree = {key: value for key, value in task.tree.items() if key not in OUTSIDE}
    return model, build_engine_config(tree, "probe", world_size=world_size, facts=facts, n_params=n_params)


def measure(task: Task) -> dict[str, Any]:
    """Train `task.steps` steps on random tokens as one rank; returns its memory and speed."""
    import torch

    from chatgot.checkpoint import rng
    from chatgot.engine.build import build, join
    from chatgot.model.gpt import GPT
    from chatgot.observe import meters

    place, facts = find_place(), device_facts()
    model_config, config = read_task(task, place.world_size, facts)
    device = join(place, facts.kind)
    free_before = meters.available_bytes(device)
    model = GPT(model_config, task.vocab_size)
    rng.seed(0, place.rank)
    model.init_weights(0)
    engine = build(model, config, device)
    ids = partial(torch.randint, task.vocab_size, (config.micro_batch_size, model_config.max_seq_length))
    began = time.perf_counter()
    for step in range(task.steps):
        if step == 1:
            began = time.perf_counter()
        loss = engine.train_step((ids(), ids()) for _ in range(config.accumulation))
        float(loss)  # waits for the device
    seconds = (time.perf_counter() - began) / max(task.steps - 1, 1)
    tokens = config.train_batch_size * model_config.max_seq_length
    return {**meters.peak_bytes(device, free_before), "tokens_per_sec": tokens / seconds}


def main(path: str) -> int:
    """Run one rank of a probe; returns its exit code."""
    task = Task(**json.loads(Path(path).read_text(encoding="utf-8")))
    try:
        result = measure(task)
    except (ChatGoTError, RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) and "out of memory" not in str(error):
            raise
        print(f"chatgot-probe: out of memory: {error}", file=sys.stderr, flush=True)
        return EXIT_ENVIRONMENT
    Path(path).with_name(f"result.{os.environ['RANK']}.json").write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1])
    sys.stdout.flush()
    os._exit(code)  # the process group is still joined, see cli.train
