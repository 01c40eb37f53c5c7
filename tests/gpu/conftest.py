"""What the GPU tests share: skipping without a device, one process group, freed memory, and the results file."""

from __future__ import annotations

import faulthandler
import gc
import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu import machine
from tests.gpu.report import Report, line

HERE = Path(__file__).resolve().parent
LAST = ("test_resume.py", "test_compile.py", "test_speed.py")
"""The slowest modules, run last."""
SECONDS_PER_TEST = 280
"""A test that hangs ends the session after this time, with every thread's stack on stderr; the results so far are in
the file.
"""

FIGURES = pytest.StashKey[dict[str, Any]]()
STDERR = pytest.StashKey[int]()
REPORT = Report()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STDERR] = os.dup(2)  # later, while a test runs, pytest has stderr captured


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if HERE in item.path.parents]
    reason = machine.missing()
    for item in ours:
        # Warnings of libraries on a device that developers may not have are reported, and fail nothing.
        item.add_marker(pytest.mark.filterwarnings("default"))
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
    ours.sort(key=lambda item: LAST.index(item.path.name) if item.path.name in LAST else -1)
    others = [item for item in items if HERE not in item.path.parents]
    items[:] = [*others, *ours]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if HERE not in item.path.parents:  # pytest asks every conftest.py for every test here
        return (yield)
    item.stash[FIGURES] = {}
    REPORT.begin(_name(item))
    faulthandler.dump_traceback_later(SECONDS_PER_TEST, exit=True, file=item.config.stash[STDERR])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report: pytest.TestReport = yield
    if report.when == "call" or report.outcome != "passed":
        message = None
        if report.outcome == "skipped":
            message = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        elif report.outcome == "failed":
            said = call.excinfo.exconly()[:4000] if call.excinfo is not None else report.longreprtext[-4000:]
            message = f"{report.when}: {said}"
        figures = item.stash[FIGURES]
        if machine.KIND == "cuda" and report.outcome != "skipped":
            figures["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        REPORT.end(_name(item), report.outcome, report.duration, figures, message)
        terminal = item.config.pluginmanager.get_plugin("terminalreporter")
        if terminal is not None:
            terminal.ensure_newline()
            text = "; ".join(part for part in (line(figures), (message or "").split("\n")[0]) if part)
            terminal.write_line(f"{_name(item)}: {report.outcome} in {report.duration:.1f} s: {text}")
    return report


def pytest_warning_recorded(warning_message: Any, nodeid: str) -> None:
    if nodeid.startswith("tests/gpu/"):
        text = f"{warning_message.category.__name__}: {str(warning_message.message)[:300]}"
        REPORT.warnings[text] = REPORT.warnings.get(text, 0) + 1


def _name(item: pytest.Item) -> str:
    return f"{item.path.name}::{item.name}"


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Keep figures of this test for its line and for the results file: record(worst=1e-6, step_ms=8.3)."""
    return request.node.stash[FIGURES].update


@pytest.fixture(scope="session")
def device() -> Iterator[torch.device]:
    """The device, in a process group of one rank (nccl, or gloo in a dry run) that all in-process tests share."""
    from chatgot.distributed import find_place
    from chatgot.engine.build import join
    from chatgot.training.run import leave

    os.environ["DS_ACCELERATOR"] = machine.KIND
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # read once by cuBLAS; without it it may sum in any order
    yield join(find_place(), machine.KIND)
    leave()


@pytest.fixture(autouse=True)
def _numerics_and_memory() -> Iterator[None]:
    """Full fp32 products, and the last test's memory given back."""
    torch.set_float32_matmul_precision("highest")
    if machine.KIND == "cuda":
        torch.cuda.reset_peak_memory_stats()
    yield
    gc.collect()
    if machine.KIND == "cuda":
        torch.cuda.empty_cache()


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Equal bits for equal work: PyTorch's deterministic algorithms."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def cuda_only() -> None:
    """For tests of what a CPU cannot do."""
    if machine.DRY_RUN:
        pytest.skip("dry run on the CPU: needs a CUDA device")


@pytest.fixture(scope="session")
def needs_fp16(device: torch.device) -> None:
    """For tests of fp16, which most CPUs cannot do."""
    from chatgot.devices import device_facts

    if not device_facts().fp16:
        pytest.skip("dry run on the CPU: it has no fp16")
