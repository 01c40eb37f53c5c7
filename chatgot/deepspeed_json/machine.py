"""What this machine has of what a DeepSpeed JSON needs, found out without importing anything heavy."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

from chatgot.deepspeed_json.findings import Findings
from chatgot.deepspeed_json.optimizers import cpu_adam_key, optimizer_arguments
from chatgot.deepspeed_json.rule_types import Subject

_MONITORS = {"tensorboard": ("tensorboard", "tensorboardX"), "comet": ("comet_ml",), "wandb": ("wandb",)}
_OFFLOADS = ("zero_optimization.offload_optimizer", "zero_optimization.offload_param")


def has_package(*names: str) -> bool:
    """Whether one of the packages can be imported; nothing is imported."""
    return any(importlib.util.find_spec(name) is not None for name in names)


def has_command(*names: str) -> bool:
    """Whether one of the programs is on the PATH."""
    return any(shutil.which(name) is not None for name in names)


def has_c_compiler(kind: str) -> bool:
    """Whether torch.compile can build what it generates: C++ on a CPU, Triton's launchers in C on a GPU."""
    asked, usual = ("CC", ("gcc", "clang", "cc")) if kind == "cuda" else ("CXX", ("g++", "clang++", "c++"))
    return has_command(*filter(None, (os.environ.get(asked), *usual)))


def has_cuda_compiler() -> bool:
    """nvcc, where DeepSpeed looks for it (torch.utils.cpp_extension)."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return has_command("nvcc") or any(home and Path(home, "bin", "nvcc").exists() for home in homes)


def has_library(name: str) -> bool:
    """Whether the dynamic linker finds lib<name>."""
    from ctypes.util import find_library  # asks other programs, so only when somebody needs to know

    return find_library(name) is not None


def note_lacks(subject: Subject, findings: Findings) -> None:
    """Note packages, compilers and folders that this configuration needs and this machine lacks."""
    values = subject.v
    for section, packages in _MONITORS.items():
        if values[f"{section}.enabled"] and not has_package(*packages):
            lost = "the run is not recorded there" if section == "wandb" else "DeepSpeed stops at the start"
            why = f"the package {' or '.join(packages)} is not installed: {lost}"
            findings.add("warning", values.name(f"{section}.enabled"), True, why, of_machine=True)
    for dotted, what in _compiled(subject).items():
        if lacks := [name for name, there in _compiler(subject, dotted).items() if not there]:
            why = f"{what} is compiled at the first start, and this machine lacks {', '.join(lacks)}"
            value = True if dotted.startswith("chatgot") else values[dotted]
            name = dotted if dotted.startswith("chatgot") else values.name(dotted)
            findings.add("warning", name, value, why, of_machine=True)
    for section in _OFFLOADS:
        path = values[f"{section}.nvme_path"]
        if values[f"{section}.device"] == "nvme" and path and not (os.path.isdir(path) and os.access(path, os.W_OK)):
            why = "is no folder that this machine can write to"
            findings.add("warning", values.name(f"{section}.nvme_path"), path, why, of_machine=True)


def _compiled(subject: Subject) -> dict[str, str]:
    """Key -> what DeepSpeed or torch compiles at the first start because of it."""
    needs: dict[str, str] = {}
    if subject.optimizer:
        kind, params = str(subject.v.optimizer.type), subject.arguments
        variant = optimizer_arguments(kind, params, subject.offloaded)
        asked = params.get("torch_adam") is False or params.get("bias_correction") is False
        asked = asked or bool(cpu_adam_key(subject.v, subject.tree))
        if variant in ("lamb", "lion/fused", "lion/cpu", "adagrad/cpu") or (
            variant in ("adam/fused", "adam/cpu") and asked
        ):
            needs["optimizer.type"] = f"DeepSpeed's {kind}"
    for section in _OFFLOADS:
        if subject.v[f"{section}.device"] == "nvme":
            needs[f"{section}.device"] = "DeepSpeed's asynchronous file access"
    if subject.v.compile.deepcompile and subject.stage:
        needs["compile.deepcompile"] = "DeepCompile"
    if subject.chatgot.compile.enabled:
        needs["chatgot.compile.enabled"] = "the model"
    return needs


def _compiler(subject: Subject, dotted: str) -> dict[str, bool]:
    """Program -> whether it is there, for what `_compiled` says of a key."""
    if dotted == "chatgot.compile.enabled" and subject.facts.kind == "cuda":
        return {"a C compiler (gcc), so that it stays eager": has_c_compiler("cuda")}
    needs = {"g++": has_command("g++", "c++")}
    if dotted != "chatgot.compile.enabled":
        needs["ninja"] = has_command("ninja") or has_package("ninja")
    on_cuda = dotted == "compile.deepcompile" or (dotted == "optimizer.type" and not subject.offloaded)
    if on_cuda and subject.facts.kind == "cuda":
        needs["nvcc (CUDA toolkit)"] = has_cuda_compiler()
    if dotted.endswith(".device"):
        needs["libaio"] = has_library("aio")
    return needs
