"""What the device says of itself, and which errors mean that memory ran out."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from chatgot.devices import deterministic, device_facts, device_name, is_out_of_memory
from tests.support import environment


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: ..."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_errors_that_mean_out_of_memory(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", [RuntimeError("shapes cannot be multiplied"), ValueError("CUDA out of memory")])
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
