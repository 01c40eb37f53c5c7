"""What this machine has of what a DeepSpeed JSON needs, found out without importing anything heavy."""

from __future__ import annotations

import importlib.util
import os
import shutil
from functools import partial
from pathlib import Path

from chatgot.deepspeed_json.optimizers import cpu_adam_key, variant
from chatgot.deepspeed_json.rule_types import Rule, Subject, warning


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


def _lacks(s: Subject, what: str, also: str = "") -> dict[str, str] | None:
    """What this machine lacks to compile something at the first start: g++, and what `also` names."""
    there = {
        "g++": has_command("g++", "c++"),
        "ninja": "ninja" not in also or has_command("ninja") or has_package("ninja"),
        "nvcc (CUDA toolkit)": "nvcc" not in also or s.facts.kind != "cuda" or has_cuda_compiler(),
        "libaio": "aio" not in also or has_library("aio"),
    }
    lacks = ", ".join(name for name, found in there.items() if not found)
    return {"what": what, "lacks": lacks} if lacks else None


def _optimizer(s: Subject) -> dict[str, str] | None:
    built, arguments = variant(s), s.arguments
    asked = arguments.get("torch_adam") is False or arguments.get("bias_correction") is False or cpu_adam_key(s)
    if built in ("lamb", "lion/fused", "lion/cpu", "adagrad/cpu") or (built in ("adam/fused", "adam/cpu") and asked):
        return _lacks(s, f"DeepSpeed's {s.v.optimizer.type}", "ninja" if s.offloaded else "ninja, nvcc")
    return None


def _model(s: Subject) -> dict[str, str] | None:
    if s.facts.kind == "cuda":
        eager = "a C compiler (gcc), so that it stays eager"
        return None if has_c_compiler("cuda") else {"what": "the model", "lacks": eager}
    return _lacks(s, "the model")


_COMPILED = "{what} is compiled at the first start, and this machine lacks {lacks}"
_OFFLOADS = ("zero_optimization.offload_optimizer", "zero_optimization.offload_param")
_machine = partial(warning, machine=True)
# fmt: off
RULES: tuple[Rule, ...] = (
    *(_machine(f"{section}.enabled", lambda s, on, packages=packages: on and not has_package(*packages),
               f"the package {' or '.join(packages)} is not installed: {lost}") for section, packages, lost in (
        ("tensorboard", ("tensorboard", "tensorboardX"), "DeepSpeed stops at the start"),
        ("comet", ("comet_ml",), "DeepSpeed stops at the start"),
        ("wandb", ("wandb",), "the run is not recorded there"))),
    _machine("optimizer.type", lambda s, _: s.optimizer and _optimizer(s), _COMPILED),
    _machine(" ".join(f"{section}.device" for section in _OFFLOADS), lambda s, device: device == "nvme"
             and _lacks(s, "DeepSpeed's asynchronous file access", "ninja, aio"), _COMPILED),
    _machine("compile.deepcompile", lambda s, on: on and s.stage and _lacks(s, "DeepCompile", "ninja, nvcc"),
             _COMPILED),
    _machine("chatgot.compile.enabled", lambda s, on: on and _model(s), _COMPILED),
    *(_machine(f"{section}.nvme_path", lambda s, path, section=section: s.v[f"{section}.device"] == "nvme" and path
               and not (os.path.isdir(path) and os.access(path, os.W_OK)),
               "is no folder that this machine can write to") for section in _OFFLOADS),
)
"""The rows of rules.RULES about this machine: packages, compilers and folders that it may lack."""
# fmt: on
