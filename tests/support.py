"""What several tests need: a small text, a small configuration, and ranks as real processes."""

from __future__ import annotations

import atexit
import base64
import functools
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TypeVar

from chatgot.deepspeed_json.read import read_document
from chatgot.deepspeed_json.resolve import EngineConfig, resolve
from chatgot.observe.journal import Branch, read_journal

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent

_SENTENCE = (
    "the night is dark and full of terrors winter came for house after house with fire ice crown sword raven wolf"
)
WORDS = tuple(_SENTENCE.split(" "))

TINY_MODEL: dict[str, Any] = {
    "architecture": "modern",
    "d_model": 32,
    "n_layers": 2,
    "n_head": 2,
    "d_hid": 48,
    "max_seq_length": 16,
    "dropout": 0.0,
}


def encoded(tree: dict[str, Any]) -> str:
    """A JSON as DeepSpeed takes it in place of a path."""
    return base64.urlsafe_b64encode(json.dumps(tree).encode()).decode()


def write_text(path: Path, characters: int = 20_000, seed: int = 0) -> Path:
    """A deterministic text of words in sentences, some characters beyond ASCII among them."""
    draw = random.Random(seed)
    lines: list[str] = []
    size = 0
    while size < characters:
        line = " ".join(draw.choices(WORDS, k=draw.randint(3, 9))).capitalize() + draw.choice([".", "…", ", ē’á!", "?"])
        lines.append(line)
        size += len(line) + 1
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


VAL_FRACTION = 0.02
"""Of write_run_yaml; every run ends with a pass over it."""


def write_run_yaml(path: Path, *, model: dict[str, Any] | None = None, **train: Any) -> Path:
    """A run YAML with the tiny model."""
    import yaml

    tree = {
        "model": {**TINY_MODEL, **(model or {})},
        "data": {"val_fraction": VAL_FRACTION},
        "train": {
            "max_steps": 6,
            "log_every": 1,
            "eval_every": None,
            "sample_every": None,
            "sample_prompts": ["The night"],
            "sample_max_new_tokens": 8,
            **train,
        },
    }
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def read_engine_config(
    path: str | Path, overrides: dict[str, Any] | None = None, n_params: int | None = None, **more: Any
) -> EngineConfig:
    """A DeepSpeed JSON read, resolved and completed; `more` goes to `resolve`."""
    return resolve(read_document(Path(path)), overrides, **more).complete(n_params).engine_config()


def engine_json(
    stage: int = 0,
    precision: str = "fp32",
    batch: int = 8,
    micro: int | str = 4,
    offload: bool = False,
    offload_param: bool = False,
    activation_checkpointing: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    chatgot: dict[str, Any] | None = None,
    **top_level: Any,
) -> dict[str, Any]:
    """A DeepSpeed JSON of the kind that ds_configs/ ships, small."""
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": False,
        "reduce_bucket_size": 50_000,
        "allgather_bucket_size": 50_000,
    }
    if stage == 3:
        # Otherwise every small parameter would stay whole on every rank, and nothing would be gathered.
        zero.update(
            stage3_param_persistence_threshold=0,
            stage3_prefetch_bucket_size=50_000,
            stage3_max_live_parameters=0,
            stage3_max_reuse_distance=0,
        )
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    if offload_param:
        zero["offload_param"] = {"device": "cpu", "pin_memory": False}
    tree: dict[str, Any] = {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_clipping": 1.0,
        "optimizer": optimizer
        or {
            "type": "AdamW",
            "params": {"lr": 3e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "torch_adam": True},
        },
        "zero_optimization": zero,
        "chatgot": {
            "schedule": {"type": "cosine", "warmup_steps": 2, "min_lr_ratio": 0.1},
            "checkpoint": {"every_steps": None, "every_minutes": None, "keep_best": 0},
            **(chatgot or {}),
        },
        **top_level,
    }
    if precision == "bf16":
        tree["bf16"] = {"enabled": True, "check_grad_overflow": True}
        tree["data_types"] = {"grad_accum_dtype": "fp32"}
    elif precision == "fp16":
        tree["fp16"] = {"enabled": True, "initial_scale_power": 10}
    elif precision == "autocast_bf16":
        tree["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    if activation_checkpointing is not None:
        tree["activation_checkpointing"] = activation_checkpointing
    return tree


def write_json(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(json.dumps(tree, indent=2))
    return path


@functools.cache
def takes_fp16() -> bool:
    """Whether the accelerator of the tests, a CPU, computes in fp16: few do (AVX512-FP16, AMX-FP16).

    Cases that need it are marked `fp16`. CHATGOT_TEST_FP16=0 or 1 forces the answer, see tests/forced/sitecustomize.py.
    """
    import torch

    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def present(value: T | None) -> T:
    """The value, which is there."""
    assert value is not None
    return value


def environment(**extra: str) -> dict[str, str]:
    """Of a rank on the CPU: one thread, no dashboard or report, this checkout on the path."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "WANDB_MODE": "disabled",
        "CHATGOT_REPORT": "off",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        **extra,
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@functools.cache
def start_warm_python() -> Path:
    """Start tests/warm_server.py; the file that is returned is there when it listens. It ends with this process."""
    folder = Path(tempfile.mkdtemp(prefix="chatgot-warm-"))
    command = [sys.executable, "-m", "tests.warm_server", str(folder)]
    server = subprocess.Popen(command, env=environment(), cwd=ROOT, stdin=subprocess.PIPE)

    def close() -> None:
        server.communicate()
        shutil.rmtree(folder)

    atexit.register(close)
    return folder / "python"


@functools.cache
def warm_python() -> str:
    """What runs a program as Python does, in a process forked from one that has imported torch, DeepSpeed and ChatGoT:
    tests/warm_server.py, which the workers of a test run share.

    Not for what is about Python's start, imports, signals meanwhile, or who the parent of a process is.
    """
    python, deadline = start_warm_python(), time.monotonic() + 300
    while not python.exists():
        assert time.monotonic() < deadline, "tests/warm_server.py does not start"
        time.sleep(0.05)
    return str(python)


def place_of(rank: int, world_size: int, port: int) -> dict[str, str]:
    """The variables that a launcher here gives to a rank."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}}


def run_ranks(
    program: list[str],
    world_size: int,
    timeout: float = 600.0,
    check: bool = True,
    afresh: bool = False,
    env: dict[str, str] | None = None,
) -> list[subprocess.CompletedProcess[str]]:
    """Run `python program` as `world_size` real processes joined by gloo; returns them in rank order.

    With `check`, a rank that fails or outlives `timeout` fails the test with every rank's output. The ranks are run by
    warm_python, or with `afresh` by Python.
    """
    port, late, processes = free_port(), False, list[subprocess.Popen[bytes]]()
    with tempfile.TemporaryDirectory() as folder:
        # Files and not pipes: a pipe that nobody reads yet would stop its rank, and with it all the others.
        logs = [[Path(folder, f"{rank}.{name}") for name in ("stdout", "stderr")] for rank in range(world_size)]
        for rank, (stdout, stderr) in enumerate(logs):
            command = [sys.executable if afresh else warm_python(), *program]
            variables = environment(**place_of(rank, world_size, port), **(env or {}))
            with stdout.open("w") as out, stderr.open("w") as errors:
                processes.append(subprocess.Popen(command, env=variables, cwd=ROOT, stdout=out, stderr=errors))
        deadline = time.monotonic() + timeout
        for process in processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                late = True
                for other in processes:
                    other.kill()
        done = [
            subprocess.CompletedProcess(program, process.wait(), *(path.read_text() for path in paths))
            for process, paths in zip(processes, logs)
        ]
    if late or (check and any(rank.returncode for rank in done)):
        raise AssertionError(
            f"{program}: {'did not end in time' if late else 'failed'}\n"
            + "\n".join(
                f"--- rank {i} ended with {p.returncode}\n{p.stdout[-3000:]}\n{p.stderr[-6000:]}"
                for i, p in enumerate(done)
            )
        )
    return done


def live_metrics(path: Path) -> list[dict[str, Any]]:
    """One record per logged step of the run as it stands, sorted by step; of two values of a step the later counts."""
    branch: Branch[dict[str, Any]] = Branch()
    for record in read_journal(path)[0]:
        step = record["step"]
        branch.go_to(step)
        if record.pop("digest", None) is None:
            branch.by_step[step] = {**branch.by_step.get(step, {}), **record}
    return [branch.by_step[step] for step in sorted(branch.by_step)]
