"""The table of GPUs, what this machine shows and says of itself, and which errors mean that memory ran out."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from chatgot.devices import (
    DEVICES,
    GIB,
    DeviceFacts,
    assumed_device,
    cgroup_memory,
    deterministic,
    device_facts,
    device_name,
    device_of_machine,
    find_device,
    is_out_of_memory,
    peak_flops,
    visible_gpus,
)
from chatgot.errors import ConfigError, MachineError
from tests.support import ROOT, environment


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: ..."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),  # cudaHostAlloc
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        torch.distributed.DistBackendError(
            "NCCL error in: ProcessGroupNCCL.cpp:3356, unhandled cuda error\nncclUnhandledCudaError: "
            "Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'"
        ),
        torch.distributed.DistBackendError("ncclUnhandledCudaError ... Failed to CUDA calloc async 608 bytes"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
)
def test_errors_that_mean_out_of_memory(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes cannot be multiplied"),
        ValueError("CUDA out of memory"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        torch.distributed.DistBackendError("ncclRemoteError: ... Last error: Connection reset by peer"),
    ],
)
def test_other_errors_do_not(error):
    assert not is_out_of_memory(error)


def test_torchs_own_refusal_of_an_impossible_size_is_one():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_a_cpu_is_deterministic_and_its_name_holds_the_vector_unit():
    cpu = torch.device("cpu")
    assert deterministic(cpu)
    assert device_name(cpu) == f"cpu {torch.backends.cpu.get_cpu_capability()}"
    assert device_facts().bf16


def test_importing_it_loads_no_torch():
    program = "import sys, chatgot.devices; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], env=environment(), check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H200", "fp16", 989e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA A100 80GB PCIe", "tf32", 156e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("NVIDIA L4", "bf16", 121e12),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2e12),
        ("NVIDIA GeForce RTX 3090", "fp32", 35.6e12),
        ("NVIDIA GeForce RTX 3090 Ti", "fp32", 40e12),
        ("Tesla V100-SXM2-16GB", "fp16", 125e12),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("Tesla T4", "fp16", 65e12),
        ("NVIDIA A10G", "bf16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),
        ("cpu", "fp32", None),
    ],
)
def test_peaks_are_of_exactly_the_named_device(name, dtype, peak):
    assert peak_flops(name, dtype) == peak


def test_devices_by_name_and_size():
    assert find_device("24GiB").memory == 24 * GIB
    assert find_device("80GB").memory == find_device("80e9").memory == 80 * 10**9
    assert not find_device("cpu").on_cuda
    for device in DEVICES.values():
        assert peak_flops(device.facts.name, "fp16") is not None, device.name
    for wrong in ("0", "GB", "-5", "24 parsecs"):
        with pytest.raises(ConfigError, match="no such device"):
            find_device(wrong)


@pytest.mark.parametrize(
    ("own", "groups", "limits"),
    [
        ("0::/\n", {".": "max\n"}, []),
        ("0::/\n", {".": "2147483648\n"}, [2 << 30]),
        ("0::/a/b\n", {"a": "1000\n", "a/b": "max\n"}, [1000]),
        ("0::/a/b\n", {"a": "1000\n", "a/b": "900\n"}, [900, 1000]),
        ("7:cpu:/x\n5:memory,pids:/job\n", {"memory/job": "4096\n"}, [4096]),
        ("0::/\n", {}, []),
    ],
)
def test_a_container_has_the_memory_that_its_cgroup_allows(
    own: str, groups: dict[str, str], limits: list[int], tmp_path: Path
) -> None:
    for group, limit in groups.items():
        first = "memory" in group
        files = {
            "memory.limit_in_bytes" if first else "memory.max": limit,
            "memory.usage_in_bytes" if first else "memory.current": "17\n",
            "memory.stat": "cache 9\ninactive_file 3\n" + ("total_inactive_file 4\n" if first else ""),
        }
        (tmp_path / group).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (tmp_path / group / name).write_text(text)
    (tmp_path / "own").write_text(own)
    assert cgroup_memory(tmp_path / "own", tmp_path) == [(limit, 13 if "memory" in own else 14) for limit in limits]
    assert cgroup_memory(tmp_path / "not there", tmp_path) == []


def test_the_cpu_has_no_more_memory_than_its_cgroup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chatgot.devices.cgroup_memory", lambda: [(123, 7), (456, 8)])
    assert find_device("cpu").memory == 123
    assert "its cgroup's limit" in find_device("cpu").note


def test_device_is_this_machines_unless_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    guess = assumed_device("auto")
    assert (guess.kind, guess.bf16, guess.certain) == ("cpu", True, False)
    assert (assumed_device("cuda").kind, assumed_device("cuda").certain) == ("cuda", True)
    assert assumed_device("cpu").fp16 is False


def test_guess_about_fp16_is_what_torch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert assumed_device("auto").fp16 == bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


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
    program = ROOT / "tests" / "launch" / "program.py"
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
    surroundings = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")} | {
        "CUDA_VISIBLE_DEVICES": "2,0"
    }
    ended = subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=300)
    assert ended.returncode == code, ended.stderr
    assert len(list(marks.glob("start.*"))) == {"auto": 2, "1": 1, "3": 0}[nproc]
    if code:
        assert "--nproc 3" in ended.stderr
        assert "the 2 visible GPUs" in ended.stderr
    else:
        assert "MALLOC_" not in (marks / "start.0").read_text(), "the allocator settings are for training on the CPU"


def test_a_gpu_is_the_same_device_by_its_name_and_on_the_machine(monkeypatch):
    """But for the exact size of its memory, which the machine knows better."""

    class Properties:
        total_memory = 79 * GIB
        major = 9

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    named = DEVICES["h100"]
    here = device_of_machine(named.facts)
    assert here == dataclasses.replace(named, name="NVIDIA H100 80GB HBM3", memory=79 * GIB)
    unknown = device_of_machine(DeviceFacts("cuda", bf16=True, fp16=True, name="NVIDIA H999"))
    assert unknown.library_bytes == named.library_bytes
    assert unknown.link_gb == find_device("24GiB").link_gb


def test_a_cpu_of_the_machine_keeps_what_was_found_out_about_it():
    facts = DeviceFacts("cpu", bf16=True, fp16=True, name="cpu")
    assert device_of_machine(facts) == dataclasses.replace(find_device("cpu"), facts=facts)
