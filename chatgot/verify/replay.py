"""Train some steps of a run again and compare them with its journal. The run folder is only read.

`replay` needs no torch: it starts the ranks through launch/run, which run this file with the task's path.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import chatgot.run_folder as run_folder
from chatgot.checkpoint import manifest
from chatgot.checkpoint.load import Found, find, tags_in
from chatgot.data.prepare import recorded_data
from chatgot.devices import visible_gpus
from chatgot.distributed import find_place
from chatgot.errors import CheckpointError, ConfigError, DataError, MachineError, NumericsError
from chatgot.launcher.ranks import launch, refusal, run_rank
from chatgot.proof import digest
from chatgot.proof.digest import History, Setup

OUTSIDE = ("wandb", "tensorboard", "csv_monitor", "comet", "flops_profiler", "comms_logger")
"""Sections of the JSON that write somewhere else; a replay leaves them out."""

_ERRORS = {kind.exit_code: kind for kind in (ConfigError, DataError, CheckpointError, NumericsError)}


def replay(run: Path, steps: int, tag: str | None = None) -> bool:
    """Resume the run in a temporary folder, train `steps` steps and compare their digests with the journal's; returns
    whether they are the same.

    The ranks are as many as trained the journaled steps; one, within a tolerance, where there are too few GPUs.

    Args:
        tag: the checkpoint to start from; default: the oldest with `steps` journaled steps after it, or else with most.

    Raises:
        ConfigError: not a run folder, or no journaled step follows the checkpoint.
        DataError: the text is not there any more, or is another one.
        CheckpointError: the checkpoint is missing or damaged.
        ChatGoTError: the training refuses something else.
    """
    run_folder.check(run)
    known = digest.history(run)
    found, available = _choose(run, known, steps, tag)
    if available < steps:
        print(f"replay: {available} journaled steps follow {found.tag}, fewer than {steps}: those are compared")
        steps = available
    step = int(found.manifest["step"])
    data, _ = recorded_data(run, found.manifest["data"])
    setup = known.setups.get(known.digests[step + 1].setup)
    ranks = int(found.manifest["world_size"] if setup is None else setup.topology["world_size"])
    environment = _environment(setup)
    gpus = len(visible_gpus(environment))
    if 0 < gpus < ranks:
        here = f"this machine has {gpus} GPU(s): one rank, compared within a tolerance"
        print(f"replay: {ranks} ranks trained these steps, and {here}")
        ranks = 1
    with tempfile.TemporaryDirectory(prefix="chatgot-replay-") as folder:
        task = {"steps": steps, "deterministic": setup is not None and setup.deterministic}
        result = _train(run, found, data, task, ranks, environment, Path(folder))
    span = f"steps {step + 1}..{step + steps} after {found.tag}"
    if result["difference"] is not None:
        repeated = f"{result['compared']} of {steps} steps repeated, compared {result['compares']}"
        print(f"replay differs at {result['difference']} ({repeated})")
        if not result["proves"]:
            print("replay: that is more than roundings usually do, and no proof of damage")
        return not result["proves"]
    if not result["compares_anything"]:
        print(f"replay: {span} cannot be compared: {result['compares']}")
        return False
    print(f"replay verified {result['compared']}/{steps}: {span} repeat the journal ({result['compares']})")
    return True


def _choose(run: Path, known: History, steps: int, tag: str | None) -> tuple[Found, int]:
    """Choose the checkpoint to start from; returns it and the number of journaled steps that follow without a gap."""
    folder = run / run_folder.CHECKPOINTS
    manifests: dict[str, manifest.Manifest] = {}
    for name in tags_in(folder):
        with contextlib.suppress(CheckpointError):  # chatgot verify has named it
            manifests[name] = manifest.read(folder / name)
    if tag is not None:
        order = [tag]
    else:
        # The steps after a checkpoint are its own only if no resume or rollback has gone back behind it since.
        follow = {
            name: _following(known, one["step"])
            for name, one in manifests.items()
            if not any(
                other["sequence"] > one["sequence"] and other["step"] < one["step"] for other in manifests.values()
            )
        }
        order = sorted(follow, key=lambda name: (-min(follow[name], steps), manifests[name]["step"]))
    for name in order:
        try:
            found = find(folder, name)
        except CheckpointError:
            if tag is not None:
                raise
            continue
        if found is not None and (count := _following(known, found.manifest["step"])):
            return found, count
    which = f"checkpoint {tag}" if tag is not None else "a whole checkpoint"
    raise ConfigError(
        f"{run}: no journaled step follows {which}, so that there is nothing to compare a replay with; name an earlier "
        "one with --tag, or keep more (chatgot.checkpoint.keep_last)"
    )


def _following(known: History, step: int) -> int:
    """Count the journaled steps after `step` that follow without a gap and without a rollback in between."""
    offset = known.digests[step + 1].offset if step + 1 in known.digests else 0
    after = step + 1
    while after in known.digests and known.digests[after].offset == offset:
        after += 1
    return after - step - 1


def _environment(setup: Setup | None) -> dict[str, str]:
    """Make the ranks' environment: device and threads of the journal's steps, no dashboard, no rehearsed fault."""
    environment = {**os.environ, "WANDB_MODE": "disabled"}
    environment.pop("CHATGOT_FAULT", None)
    if setup is not None and str(setup.topology["device"]).startswith("cpu"):
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(setup.topology["threads"])}
    elif setup is not None and setup.deterministic:
        environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # torch.use_deterministic_algorithms asks for it
    return environment


def _train(
    run: Path, found: Found, data: str, task: dict[str, Any], ranks: int, environment: dict[str, str], folder: Path
) -> dict[str, Any]:
    """Let `ranks` processes train in `folder`; returns what `_rank` reports."""
    tree = {name: value for name, value in run_folder.read(run, run_folder.DS_CONFIG).items() if name not in OUTSIDE}
    if ranks != run_folder.read(run, run_folder.ENVIRONMENT).get("world_size"):
        tree.pop("gradient_accumulation_steps", None)  # follows from the batch, the micro batch and the ranks
    for section in ("offload_optimizer", "offload_param"):
        offload = (tree.get("zero_optimization") or {}).get(section)
        if isinstance(offload, dict) and offload.get("nvme_path"):
            offload["nvme_path"] = str(folder / "nvme")  # the run itself may be using its own
    (folder / run_folder.DS_CONFIG).write_text(json.dumps(tree), encoding="utf-8")
    arguments = {
        "deepspeed_config": str(folder / run_folder.DS_CONFIG),
        "config": str((run / run_folder.RUN).resolve()),
        "data": data,
        "resume_from": f"{run.resolve()}@{found.tag}",
    }
    task = {**task, "arguments": arguments, "out_dir": str(folder / "run"), "result": str(folder / "result.json")}
    (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")
    words = ["--script", __file__, "--", str(folder / "task.json")]
    code, said = launch(ranks, words, environment, folder / "log.txt")
    if code:
        why = f"the replay from {found.tag} could not be trained (exit {code}): {refusal(said)}"
        raise _ERRORS.get(code, MachineError)(f"{run}: {why}")
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def _rank(task: dict[str, Any]) -> None:
    """Resume, train and compare on one rank; rank 0 writes what came of it."""
    import torch

    from chatgot.training.run import TrainArguments, leave, prepare_run

    if task["deterministic"] and torch.cuda.is_available():  # as the journal's steps were; a CPU needs no asking
        torch.use_deterministic_algorithms(True)
    arguments = TrainArguments(**task["arguments"], out_dir=Path(task["out_dir"]))
    loop = prepare_run(arguments, find_place())
    for _ in range(task["steps"]):
        loop.advance()
    loop.proof.flush()
    overlap = loop.proof.overlap
    if overlap is not None:
        result = {
            "compared": overlap.compared,
            "difference": overlap.difference and "step {}: {}".format(*overlap.difference),
            "proves": overlap.difference is not None and overlap.difference[1].proves,
            "compares": overlap.compares,
            "compares_anything": overlap.compares_anything,
        }
        Path(task["result"]).write_text(json.dumps(result), encoding="utf-8")
    leave()


if __name__ == "__main__":
    run_rank(_rank)
