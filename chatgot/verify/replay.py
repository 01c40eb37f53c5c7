"""Train some steps of a run again and compare them with its journal. The run folder is only read; needs no torch in
this process.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chatgot import run_folder
from chatgot.checkpoint import manifest
from chatgot.checkpoint.load import Found, find, tags_in
from chatgot.devices import visible_gpus
from chatgot.errors import (
    EXIT_CHECKPOINT,
    EXIT_CONFIG,
    EXIT_DATA,
    EXIT_NUMERICS,
    ChatGoTError,
    CheckpointError,
    ConfigError,
    DataError,
    MachineError,
    NumericsError,
)
from chatgot.proof import digest
from chatgot.proof.digest import History, Setup

OUTSIDE = ("wandb", "tensorboard", "csv_monitor", "comet", "flops_profiler", "comms_logger")
"""Sections of the JSON that write somewhere else; a replay leaves them out."""

_ERRORS = {
    EXIT_CONFIG: ConfigError,
    EXIT_DATA: DataError,
    EXIT_CHECKPOINT: CheckpointError,
    EXIT_NUMERICS: NumericsError,
}


def replay(run: Path, steps: int, tag: str | None = None, say: Callable[[str], None] = print) -> bool:
    """Resume the run in a temporary folder, train `steps` steps and compare their digests; whether they are the
    journal's.

    The ranks are as many as trained the journaled steps, started by launch/run; one, within a tolerance, where there
    are too few GPUs.

    Args:
        tag: the checkpoint to start from; default: the oldest with `steps` journaled steps after it, or else with most.

    Raises:
        ConfigError: not a run folder, or no journaled step follows the checkpoint.
        DataError: the text is not there any more, or is another one.
        CheckpointError: the checkpoint is missing or damaged.
        ChatGoTError: whatever else the training refuses.
    """
    run_folder.check(run)
    known = digest.history(run)
    found, available = _choose(run, known, steps, tag)
    if available < steps:
        say(f"replay: {available} journaled steps follow {found.tag}, fewer than {steps}: those are compared")
        steps = available
    step = int(found.manifest["step"])
    data = _data(run, found)
    setup = known.setups.get(known.digests[step + 1].setup)
    ranks = int(found.manifest["world_size"] if setup is None else setup.topology["world_size"])
    environment = _environment(setup)
    gpus = len(visible_gpus(environment))
    if 0 < gpus < ranks:
        say(
            f"replay: {ranks} ranks trained these steps, and this machine has {gpus} GPU(s): one rank, compared "
            f"within a tolerance"
        )
        ranks = 1
    with tempfile.TemporaryDirectory(prefix="chatgot-replay-") as folder:
        task = {"steps": steps, "data": data, "deterministic": setup is not None and setup.deterministic}
        result = _train(run, found, task, ranks, environment, Path(folder))
    span = f"steps {step + 1}..{step + steps} after {found.tag}"
    if result["difference"] is not None:
        say(
            f"replay differs at {result['difference']} ({result['compared']} of {steps} steps repeated, compared "
            f"{result['compares']})"
        )
        return False
    if not result["compares_anything"]:
        say(f"replay: {span} cannot be compared: {result['compares']}")
        return False
    say(f"replay verified {result['compared']}/{steps}: {span} repeat the journal ({result['compares']})")
    return True


def _choose(run: Path, known: History, steps: int, tag: str | None) -> tuple[Found, int]:
    """The checkpoint to start from and the number of journaled steps that follow it without a gap."""
    folder = run / run_folder.CHECKPOINTS
    manifests: dict[str, dict[str, Any]] = {}
    for name in tags_in(folder):
        with contextlib.suppress(CheckpointError):  # chatgot verify has named it
            manifests[name] = manifest.read(folder / name)
    if tag is None:
        # The steps after a checkpoint are its own only if no resume or rollback has gone back behind it since.
        own = {name: _following(known, one["step"]) for name, one in manifests.items() if not _left(one, manifests)}
        order = sorted(own, key=lambda name: (-min(own[name], steps), manifests[name]["step"]))
    else:
        order = [tag]
    for name in order:
        try:
            found = find(folder, name)
        except CheckpointError:
            if tag is not None:
                raise
            continue
        if found is not None and (count := _following(known, found.manifest["step"])):
            return found, count
    raise ConfigError(
        f"{run}: no journaled step follows {f'checkpoint {tag}' if tag is not None else 'a whole checkpoint'}, so "
        f"that there is nothing to "
        "compare a replay with; name an earlier one with --tag, or keep more (chatgot.checkpoint.keep_last)"
    )


def _left(one: dict[str, Any], manifests: dict[str, dict[str, Any]]) -> bool:
    return any(other["sequence"] > one["sequence"] and other["step"] < one["step"] for other in manifests.values())


def _following(known: History, step: int) -> int:
    count = 0
    first = known.digests.get(step + 1)
    while (
        first is not None
        and (following := known.digests.get(step + count + 1)) is not None
        and following.offset == first.offset
    ):
        count += 1
    return count


def _data(run: Path, found: Found) -> str:
    """The data spec of the run, once it has been seen to give the same tokens."""
    from chatgot.config.run import load_run_config
    from chatgot.data.cache import prepare_cached

    environ = run_folder.read(run, run_folder.ENVIRONMENT)
    spec = str(environ.get("data", {}).get("spec"))
    elsewhere = Path(environ.get("cwd", "")) / spec
    if not Path(spec).exists() and elsewhere.exists():
        spec = str(elsewhere)
    data = prepare_cached(spec, load_run_config(str(run / run_folder.RUN)).data)
    if data.fingerprint != found.manifest["data"]:
        raise DataError(
            f"--data {spec}: is not the data that {run} was trained on (fingerprint {data.fingerprint[:12]}…, the "
            f"checkpoint has "
            f"{str(found.manifest['data'])[:12]}…), so that its steps cannot be trained again"
        )
    return spec


def _environment(setup: Setup | None) -> dict[str, str]:
    """Of the ranks: the kind of device and the number of threads that the journal's steps had, no dashboard, no
    rehearsed disaster.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "CHATGOT_FAULT")
    }
    package = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (package, environment.get("PYTHONPATH"))))
    environment["WANDB_MODE"] = "disabled"
    if setup is not None and str(setup.topology["device"]).startswith("cpu"):
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(setup.topology["threads"])}
    elif setup is not None and setup.deterministic:
        environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # torch.use_deterministic_algorithms asks for it
    return environment


def _train(
    run: Path, found: Found, task: dict[str, Any], ranks: int, environment: dict[str, str], folder: Path
) -> dict[str, Any]:
    """What replay_rank reports of its task, done by `ranks` processes in `folder`."""
    tree = {name: value for name, value in run_folder.read(run, run_folder.DS_CONFIG).items() if name not in OUTSIDE}
    if ranks != run_folder.read(run, run_folder.ENVIRONMENT).get("world_size"):
        tree.pop("gradient_accumulation_steps", None)  # follows from the batch, the micro batch and the ranks
    for section in ("offload_optimizer", "offload_param"):
        offload = (tree.get("zero_optimization") or {}).get(section)
        if isinstance(offload, dict) and offload.get("nvme_path"):
            offload["nvme_path"] = str(folder / "nvme")  # the run itself may be using its own
    (folder / run_folder.DS_CONFIG).write_text(json.dumps(tree), encoding="utf-8")
    task = {
        **task,
        "deepspeed_config": str(folder / run_folder.DS_CONFIG),
        "config": str((run / run_folder.RUN).resolve()),
        "out_dir": str(folder / "run"),
        "resume_from": f"{run.resolve()}@{found.tag}",
        "result": str(folder / "result.json"),
    }
    (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")
    start = "import sys; from chatgot.launcher import main; sys.exit(main(sys.argv[1:]))"
    program = Path(__file__).with_name("replay_rank.py")
    command = [
        sys.executable,
        "-c",
        start,
        "--nproc",
        str(ranks),
        "--script",
        str(program),
        "--",
        str(folder / "task.json"),
    ]
    with open(folder / "log.txt", "w+", encoding="utf-8", errors="replace") as log:
        done = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
        log.seek(0)
        said = log.read()
    if done.returncode:
        raise _error(done.returncode, said, run, found)
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def _error(code: int, said: str, run: Path, found: Found) -> ChatGoTError:
    refusal = said.rpartition("\nchatgot: ")[2].strip() if "\nchatgot: " in said else said[-2000:].strip()
    kind = _ERRORS.get(code, MachineError)
    return kind(f"{run}: the replay from {found.tag} could not be trained (exit {code}): {refusal}")
