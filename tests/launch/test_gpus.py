"""Which GPUs the launcher counts. The machine is an nvidia-smi on PATH that lists what a driver would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from chatgot.devices import visible_gpus
from chatgot.errors import MachineError

ROOT = Path(__file__).resolve().parent.parent.parent
LISTING = "\n".join(f"GPU {index}: NVIDIA H100 80GB HBM3 (UUID: GPU-{index}aaa-bbbb)" for index in range(4))
MIG = "  MIG 1g.10gb     Device  0: (UUID: MIG-cccc-dddd)"


@pytest.fixture
def four_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    nvidia_smi = tmp_path / "nvidia-smi"
    nvidia_smi.write_text(f"#!/bin/sh\n[ \"$1\" = -L ] || exit 1\ncat <<'END'\n{LISTING}\n{MIG}\nEND\n")
    nvidia_smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(
    ("listed", "count"),
    [
        (None, 4),
        ("0", 1),
        ("3,1", 2),
        (" 0, 2 ", 2),
        ("", 0),
        ("-1", 0),
        ("0,-1,1", 1),
        ("NoDevFiles", 0),
        ("GPU-0aaa-bbbb,GPU-3aaa", 2),
        ("MIG-cccc-dddd", 1),
    ],
)
def test_visible_devices_are_counted_as_cuda_counts_them(listed: str | None, count: int) -> None:
    assert len(visible_gpus({} if listed is None else {"CUDA_VISIBLE_DEVICES": listed})) == count


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(
    ("listed", "named"), [("0,4", "GPU 4"), ("1,1", "1 twice"), ("GPU-0aaa,GPU-0aaa", "GPU-0aaa twice")]
)
def test_a_list_that_cuda_would_cut_short_is_refused(listed: str, named: str) -> None:
    with pytest.raises(MachineError, match=named):
        visible_gpus({"CUDA_VISIBLE_DEVICES": listed})


@pytest.mark.usefixtures("four_gpus")
def test_the_cpu_accelerator_sees_no_gpu() -> None:
    assert visible_gpus({"DS_ACCELERATOR": "cpu"}) == []


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(("nproc", "code"), [("auto", 0), ("1", 0), ("3", 6)])
def test_processes_are_as_many_as_visible_gpus_and_never_more(tmp_path: Path, nproc: str, code: int) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    program = Path(__file__).resolve().parent / "program.py"
    command = [
        sys.executable,
        str(ROOT / "launch" / "run"),
        "--nproc",
        nproc,
        "--script",
        str(program),
        "--",
        str(marks),
    ]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")} | {
        "CUDA_VISIBLE_DEVICES": "2,0"
    }
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == code, ended.stderr
    assert len(list(marks.glob("start.*"))) == {"auto": 2, "1": 1, "3": 0}[nproc]
    if code:
        assert "--nproc 3" in ended.stderr
        assert "the 2 visible GPUs" in ended.stderr
    else:
        assert "MALLOC_" not in (marks / "start.0").read_text(), "the allocator settings are for training on the CPU"
