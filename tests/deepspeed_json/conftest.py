"""A small valid JSON to break, and the devices to read it for."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chatgot.deepspeed_json.resolve import EngineConfig
from chatgot.devices import DeviceFacts
from chatgot.errors import ConfigError
from tests.support import read_engine_config

GPU = DeviceFacts("cuda", bf16=True, fp16=True, name="H100")
OLD_GPU = DeviceFacts("cuda", bf16=False, fp16=True, name="V100")
CPU = DeviceFacts("cpu", bf16=True, fp16=False)

VALID: dict[str, Any] = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 1},
    "timers": {"throughput": {"enabled": False}},
}


def with_keys(changes: dict[str, Any], base: dict[str, Any] = VALID) -> dict[str, Any]:
    """A copy of `base` with dotted keys set; the value `...` takes a key out."""
    tree = copy.deepcopy(base)
    for dotted, value in changes.items():
        *sections, key = dotted.split(".")
        here = tree
        for section in sections:
            here = here.setdefault(section, {})
        if value is ...:
            here.pop(key)
        else:
            here[key] = copy.deepcopy(value)
    return tree


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], Path]:
    """Write a tree, or a text as it stands, to ds.json."""

    def write(tree: Any) -> Path:
        path = tmp_path / "ds.json"
        if isinstance(tree, bytes):
            path.write_bytes(tree)
        else:
            path.write_text(tree if isinstance(tree, str) else json.dumps(tree), encoding="utf-8")
        return path

    return write


@pytest.fixture
def read(write: Callable[[Any], Path]) -> Callable[..., EngineConfig]:
    """Read VALID with dotted changes, or a text, for one rank of a modern GPU."""

    def read(changes: Any = None, overrides: dict[str, Any] | None = None, **more: Any) -> EngineConfig:
        more.setdefault("world_size", 1)
        more.setdefault("facts", GPU)
        path = write(changes if isinstance(changes, (str, bytes)) else with_keys(changes or {}))
        return read_engine_config(path, overrides, **more)

    return read


@pytest.fixture
def refused(read: Callable[..., EngineConfig], tmp_path: Path) -> Callable[..., list[str]]:
    """The lines of the refusal, the file's folder and line numbers cut off."""

    def refused(changes: Any = None, overrides: dict[str, Any] | None = None, **more: Any) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            read(changes, overrides, **more)
        assert caught.value.exit_code == 2
        text = str(caught.value).replace(f"{tmp_path}/", "")
        return re.sub(r"^ds\.json:\d+: ", "ds.json: ", text, flags=re.MULTILINE).splitlines()

    return refused
