from __future__ import annotations

import gc
import os
import runpy
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests import support
from tests.support import ROOT, takes_fp16, warm_python, write_text

settings.register_profile("busy", suppress_health_check=[HealthCheck.too_slow])  # so may be the machine, not the test
settings.load_profile("busy")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CHATGOT_REPORT"] = "off"  # a process more at the end of every run; tests of it unset this
if (compiler := shutil.which("c++")) and not compiler.startswith(str(ROOT)):
    os.environ["PATH"] = os.pathsep.join([str(ROOT / "tests" / "compiler"), os.environ["PATH"]])
    os.environ["TORCH_EXTENSIONS_DIR"] = str(ROOT / ".pytest_cache" / "torch_extensions")  # nobody trains with these
if os.environ.get("CHATGOT_TEST_FP16"):
    path = [str(ROOT / "tests" / "forced"), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(path)  # for the processes that tests start
    runpy.run_path(str(ROOT / "tests" / "forced" / "sitecustomize.py"))


LAUNCHING = ("tests/distributed", "tests/faults", "tests/launch", "tests/gpu", "tests/test_packaging.py")
"""Where tests start several processes; elsewhere those do whose module uses one of STARTS."""
STARTS = ("run_ranks", "subprocess", "Probes", "in_process.train(")


LONG = (
    "tests/plan",
    "tests/distributed",
    "tests/training/test_guard.py",
    "tests/training/test_watchdog.py",
    "tests/launch",
    "tests/checkpoint",
    "tests/training",
    "tests/inference",
    "tests/observe",
    "tests/exchange/test_export.py",
    "tests/tuning",
    "tests/faults",
    "tests/proof",
    "tests/engine",
    "tests/verify",
    "tests/test_bench.py",
    "tests/test_packaging.py",
    "tests/test_api.py",
    "tests/test_documented_commands.py",
    "tests/data",
    "tests/deepspeed_json",
)
"""What takes longest goes first, so that all workers end at the same time."""


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Of every worker, here in the process that starts them: they share one warm Python."""
    node.workerinput["warm_python"] = str(support.start_warm_python())


def pytest_configure(config: pytest.Config) -> None:
    """In a worker: take that one."""
    if path := getattr(config, "workerinput", {}).get("warm_python"):
        support.start_warm_python = lambda: Path(path)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long ones first, and mark `launches` what starts processes or trains: `make test-fast` leaves it out."""

    def place(item: pytest.Item) -> int:
        path = item.path.relative_to(ROOT).as_posix()
        return next((number for number, long in enumerate(LONG) if path.startswith(long)), len(LONG))

    items.sort(key=place)
    sources: dict[Path, bool] = {}
    for item in items:
        path = item.path
        if path not in sources:
            text = path.read_text(encoding="utf-8")
            folder = path.relative_to(ROOT).as_posix().startswith(LAUNCHING)
            sources[path] = folder or any(word in text for word in STARTS)
        if sources[path]:
            item.add_marker(pytest.mark.launches)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Let signals in again that launch/run blocks where a test calls it here: what is started later inherits that."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    try:
        return (yield)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs fp16 where the CPU has none, before any fixture is set up."""
    if item.get_closest_marker("fp16") and not takes_fp16():
        pytest.skip("this CPU does not compute in fp16")


@pytest.fixture(scope="session", autouse=True)
def _frozen_imports() -> None:
    """What collection has imported is never garbage: DeepSpeed collects garbage whenever it builds a ZeRO-3 engine."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Prepared data of the tests stays out of the user's cache, also in the processes that tests start."""
    os.environ["CHATGOT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def warm_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ChatGoT starts with sys.executable is run by support.warm_python."""
    monkeypatch.setattr(sys, "executable", warm_python())


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text, the same in every test."""
    return write_text(tmp_path_factory.mktemp("text") / "night.txt")
