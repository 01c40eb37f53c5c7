"""What ranks run on: what a device can compute in, the table of known GPUs, and which GPUs this machine shows.

torch is imported only by functions that ask it about this machine.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from chatgot.errors import ConfigError, MachineError

if TYPE_CHECKING:
    import torch

Precision = Literal["bf16", "fp16", "tf32", "fp32"]
GIB = 2**30
_MIB = 2**20


@dataclass(frozen=True)
class DeviceFacts:
    """Found out by `device_facts`; a check for another machine states them by hand."""

    kind: Literal["cpu", "cuda"]
    bf16: bool
    """Whether bfloat16 training is supported."""
    fp16: bool
    """Whether float16 training is supported."""
    name: str = ""
    """For messages: 'NVIDIA H100 80GB HBM3'."""
    certain: bool = True
    """False: a guess about another machine, so that what the device lacks is a warning and no refusal."""


@dataclass(frozen=True)
class Device:
    """One device per rank, as plans know it."""

    name: str
    memory: int
    """Bytes that CUDA reports as total (a CPU: of the machine, shared by its ranks)."""
    facts: DeviceFacts
    link_gb: float = 12.0
    """GB/s of a collective between ranks, per rank."""
    host_gb: float = 12.0
    """GB/s between device and host memory."""
    library_bytes: int = 9 * _MIB
    """cuBLAS workspaces that PyTorch allocates."""
    note: str = ""

    @property
    def on_cuda(self) -> bool:
        """Whether it is a GPU."""
        return self.facts.kind == "cuda"


@dataclass(frozen=True)
class _Chip:
    """One kind of GPU. Peaks are dense (no 2:4 sparsity) TFLOP/s of NVIDIA's data sheets with fp32 accumulation."""

    pattern: str
    """All of CUDA's name after NVIDIA or Tesla: a laptop chip, a MIG slice or a "D" variant is another device."""
    half: float
    """fp16, and bf16 where `bf16`."""
    tf32: float | None
    """None: no such unit."""
    fp32: float
    models: tuple[tuple[str, float, str], ...] = ()
    """Sold as: name for --device, GiB as CUDA reports them, CUDA's name."""
    bf16: bool = True
    link: float = 12.0
    host: float = 20.0
    """Typical GB/s, for the estimate of speed."""
    library_mib: int = 9

    def device(self, name: str, memory: int, facts: DeviceFacts) -> Device:
        """A device with this chip."""
        return Device(name, memory, facts, self.link, self.host, self.library_mib * _MIB)


_HOPPER: dict[str, Any] = {"link": 300, "host": 45, "library_mib": 33}
_A100 = (("a100-80", 79.1, "NVIDIA A100-SXM4-80GB"), ("a100-40", 39.4, "NVIDIA A100-SXM4-40GB"))
_V100 = (("v100-32", 31.7, "Tesla V100-SXM2-32GB"), ("v100-16", 15.8, "Tesla V100-SXM2-16GB"))
_H100 = (("h100", 79.1, "NVIDIA H100 80GB HBM3"),)
_CHIPS = (
    _Chip(r"GB200.*", 2500, 1250, 80, link=600, host=50, library_mib=33),
    _Chip(r"B200.*", 2250, 1125, 75, (("b200", 178.3, "NVIDIA B200"),), link=600, host=50, library_mib=33),
    _Chip(r"H200 NVL", 835.5, 417.5, 60, **_HOPPER),
    _Chip(r"H200|GH200.*", 989, 494.5, 67, (("h200", 139.8, "NVIDIA H200"),), **_HOPPER),
    _Chip(r"H[18]00 PCIe", 756, 378, 51, **_HOPPER),
    _Chip(r"H100 NVL", 835.5, 417.5, 60, **_HOPPER),
    _Chip(r"H[18]00(-SXM5.*| \d+GB HBM\S*| SXM5.*)?", 989, 494.5, 67, _H100, **_HOPPER),
    _Chip(r"A[18]00(-| ).*\d+GB.*", 312, 156, 19.5, _A100, link=200),
    _Chip(r"A30", 165, 82, 10.3),
    _Chip(r"L40S", 362, 183, 91.6, (("l40s", 44.4, "NVIDIA L40S"),)),
    _Chip(r"L40", 181, 90.5, 90.5),
    _Chip(r"RTX A6000", 154.8, 77.4, 38.7, (("a6000", 47.4, "NVIDIA RTX A6000"),)),
    _Chip(r"RTX 6000 Ada Generation", 364.2, 182.1, 91.1),
    _Chip(r"A40", 149.7, 74.8, 37.4),
    _Chip(r"A10", 125, 62.5, 31.2, (("a10", 22.1, "NVIDIA A10"),)),
    _Chip(r"L4", 121, 60, 30.3, (("l4", 22.0, "NVIDIA L4"),), host=10),
    _Chip(r"GeForce RTX 5090", 209.5, 104.8, 104.8, (("rtx5090", 31.3, "NVIDIA GeForce RTX 5090"),), host=40),
    _Chip(r"GeForce RTX 4090", 165.2, 82.6, 82.6, (("rtx4090", 23.5, "NVIDIA GeForce RTX 4090"),)),
    _Chip(r"GeForce RTX 4080", 97.5, 48.7, 48.7),
    _Chip(r"GeForce RTX 3090 Ti", 80, 40, 40),
    _Chip(r"GeForce RTX 3090", 71, 35.6, 35.6, (("rtx3090", 23.6, "NVIDIA GeForce RTX 3090"),)),
    _Chip(r"GeForce RTX 3080", 59.5, 29.8, 29.8),
    _Chip(r"V100-SXM2.*", 125, None, 15.7, _V100, bf16=False, link=100, host=10),
    _Chip(r"V100-PCIE.*", 112, None, 14, bf16=False, host=10),
    _Chip(r"T4", 65, None, 8.1, (("t4", 14.6, "Tesla T4"),), bf16=False, host=10),
)

DEVICES = {
    name: chip.device(name, round(gib * GIB), DeviceFacts("cuda", bf16=chip.bf16, fp16=True, name=cuda_name))
    for chip in _CHIPS
    for name, gib, cuda_name in chip.models
}
"""GPUs by the names that --device takes."""


def _chip(cuda_name: str) -> _Chip | None:
    name = re.sub(r"^(NVIDIA|Tesla)\s+", "", re.sub(r"^NVIDIA\s+Tesla", "Tesla", cuda_name.strip()))
    if " MIG " in name:
        return None
    return next((chip for chip in _CHIPS if re.fullmatch(chip.pattern, name)), None)


def peak_flops(cuda_name: str, dtype: Precision) -> float | None:
    """The device's peak in FLOP/s (dense), or None if the table does not know the device or it lacks the unit."""
    chip = _chip(cuda_name)
    if chip is None or (dtype == "bf16" and not chip.bf16):
        return None
    peak = {"fp32": chip.fp32, "tf32": chip.tf32}.get(dtype, chip.half)
    return None if peak is None else peak * 1e12


def matmul_precision(precision: str) -> Precision:
    """What matrix products are computed in under EngineConfig.precision: "autocast_bf16" -> "bf16"."""
    return "bf16" if precision.endswith("bf16") else "fp16" if precision.endswith("fp16") else "fp32"


def find_device(text: str) -> Device:
    """A device by name, `cpu`, or a GPU of so many bytes (`25e9`, `24GiB`, `80GB`).

    Raises:
        ConfigError: neither a name nor a size.
    """
    name = text.strip().lower()
    if name in DEVICES:
        return DEVICES[name]
    if name == "cpu":
        installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        memory = min([installed, *(limit for limit, _ in cgroup_memory())])
        of = "this machine" if memory == installed else "this container (its cgroup's limit)"
        return Device("cpu", memory, assumed_device("cpu"), note=f"memory of {of}, shared by its ranks")
    size = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*(?:([kmgt]?)(i?)b)?", name)
    if size is None or (size[3] and not size[2]) or float(size[1]) <= 0:
        known = f"known: {', '.join(DEVICES)}, cpu; or a size: 24GiB, 80GB, 25e9"
        raise ConfigError(f"--device {text}: no such device ({known})")
    power = " kmgt".index(size[2] or " ")
    memory = int(float(size[1]) * (1024 if size[3] else 1000) ** power)
    facts = DeviceFacts("cuda", bf16=True, fp16=True, name=text)
    return Device(text, memory, facts, note="a GPU of this size; its speed is not known")


def cgroup_memory(
    groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> list[tuple[int, int]]:
    """Bytes that each of this process's control groups, version 1 or 2, allows and uses, files that the kernel could
    drop not counted; those without a limit, or with one that cannot be read, are left out.
    """
    limits: list[tuple[int, int]] = []
    with contextlib.suppress(OSError):  # not Linux, or hidden
        for line in groups.read_text(encoding="utf-8", errors="replace").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            top, files = root, ("memory.max", "memory.current")
            if controllers:
                top, files = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
            place = top / path.lstrip("/")
            for folder in (place, *place.parents):
                with contextlib.suppress(OSError, ValueError):  # not there, or "max"
                    if folder.is_relative_to(top):
                        limit, used = (int((folder / file).read_text(encoding="utf-8")) for file in files)
                        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                        limits.append((limit, used - int(stat.get("total_inactive_file", stat["inactive_file"]))))
    return limits


def device_of_machine(facts: DeviceFacts, device: torch.device | None = None) -> Device:
    """This rank's own device, which `device_facts` describes; `device` None: CUDA's current one."""
    if facts.kind == "cpu":
        return replace(find_device("cpu"), facts=facts)
    import torch

    properties = torch.cuda.get_device_properties(device if device is not None else torch.cuda.current_device())
    chip = _chip(facts.name)
    if chip is not None:
        return chip.device(facts.name, properties.total_memory, facts)
    workspace = 33 if properties.major in (9, 10) else 9  # CUDAContext's default differs by architecture
    return Device(facts.name or "cuda", properties.total_memory, facts, library_bytes=workspace * _MIB)


def assumed_device(kind: str) -> DeviceFacts:
    """What `check --device` names: a modern GPU ("cuda"), a CPU without fp16 kernels ("cpu"), this machine's ("auto").

    Without torch, auto is a guess: a CUDA device where the driver shows one and the environment does not hide it, with
    all types; else the CPU, which trains in fp16 with AVX512-FP16 or AMX-FP16 only (oneDNN).
    """
    hidden = os.environ.get("DS_ACCELERATOR") == "cpu" or os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    shown = not hidden and bool(glob.glob("/dev/nvidia[0-9]*") or glob.glob("/proc/driver/nvidia/gpus/*"))
    certain = kind != "auto"
    if kind == "cuda" or (kind == "auto" and shown):
        return DeviceFacts("cuda", bf16=True, fp16=True, name="cuda", certain=certain)
    return DeviceFacts("cpu", bf16=True, fp16=kind == "auto" and _cpu_has_fp16(), name="cpu", certain=certain)


def _cpu_has_fp16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return False
    return "avx512_fp16" in flags or "amx_fp16" in flags


def present_gpus() -> list[str]:
    """UUIDs of this machine's NVIDIA GPUs from nvidia-smi, else the names of their device files; makes no CUDA context.

    MachineError if nvidia-smi hangs, which it does when a GPU or the driver does.
    """
    if shutil.which("nvidia-smi") is not None:
        try:
            listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
        except subprocess.TimeoutExpired as error:
            remedy = "set DS_ACCELERATOR=cpu to train without GPUs"
            raise MachineError(
                f"nvidia-smi -L did not answer within 60 s: a GPU or its driver hangs; {remedy}"
            ) from error
        if listing.returncode == 0:
            return re.findall(r"^GPU \d+: .*\(UUID: (\S+)\)", listing.stdout, flags=re.MULTILINE)
    return sorted(glob.glob("/dev/nvidia[0-9]*"))


def visible_gpus(environ: Mapping[str, str]) -> list[str]:
    """GPUs that the ranks will see, in their order, by CUDA_VISIBLE_DEVICES (indices or UUIDs); none: train on the CPU.

    As CUDA does, the list is read up to its first entry that names no device, such as -1. MachineError for an index
    the machine lacks or a device named twice, for which CUDA would show fewer devices than listed, or none.
    """
    if environ.get("DS_ACCELERATOR") == "cpu":
        return []
    present = present_gpus()
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None or not present:
        return present
    chosen: list[str] = []
    for entry in (part.strip() for part in listed.split(",")):
        if entry.isdecimal():
            if int(entry) >= len(present):
                allowed = f"this machine has {len(present)}; give 0 to {len(present) - 1}"
                raise MachineError(f"CUDA_VISIBLE_DEVICES={listed}: names GPU {entry}, but {allowed}")
        elif not entry.startswith(("GPU-", "MIG-")):
            break
        if entry in chosen:
            remedy = "CUDA then shows no GPU at all; name it once"
            raise MachineError(f"CUDA_VISIBLE_DEVICES={listed}: names {entry} twice, and {remedy}")
        chosen.append(entry)
    return chosen


def device_facts() -> DeviceFacts:
    """What this machine's accelerator can compute in."""
    import torch

    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        # fp16 needs tensor cores to be worth it, but every CUDA device computes it. Emulated bf16 (before Ampere) is
        # slower than fp32.
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return DeviceFacts(kind="cuda", bf16=bf16, fp16=True, name=torch.cuda.get_device_name())
    return DeviceFacts(kind="cpu", bf16=True, fp16=bool(torch.ops.mkldnn._is_mkldnn_fp16_supported()), name="cpu")


def device_name(device: torch.device) -> str:
    """What decides how a sum is rounded, beside threads: the GPU's name, or the CPU's vector unit ('cpu AVX512')."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu {torch.backends.cpu.get_cpu_capability()}"


def deterministic(device: torch.device) -> bool:
    """Whether the same step on the same device gives the same bits: CUDA's kernels promise it on request only."""
    import torch

    return device.type == "cpu" or torch.are_deterministic_algorithms_enabled()


_WITHOUT_MEMORY = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|CUDA out of memory|CUDA error: out of memory"
    r"|CU\w+_STATUS_ALLOC_FAILED|CUDNN_STATUS_INTERNAL_ERROR_(HOST|DEVICE)_ALLOCATION_FAILED"
    r"|Cuda failure (\d+ )?'out of memory'|Failed to (CUDA|Cuda) \w*alloc"  # NCCL
    r"|Triton Error \[CUDA\]: out of memory|cudaErrorMemoryAllocation"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, one of CUDA's libraries or Python could not allocate: the device's memory, or the host's."""
    import torch

    without_memory = isinstance(error, RuntimeError) and _WITHOUT_MEMORY.search(str(error)) is not None
    return without_memory or isinstance(error, (torch.OutOfMemoryError, MemoryError))
