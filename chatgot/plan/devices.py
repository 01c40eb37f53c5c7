"""Devices that a plan can be made for: memory, what they can compute in, and how fast data moves to and from them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from chatgot.devices import DeviceFacts
from chatgot.errors import ConfigError

GIB = 2**30
_UNITS = {
    "": 1,
    "b": 1,
    "kib": 2**10,
    "mib": 2**20,
    "gib": GIB,
    "tib": 2**40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}


@dataclass(frozen=True)
class Device:
    """One device per rank."""

    name: str
    memory: int
    """Bytes that CUDA reports as total (a CPU: of the machine, shared by its ranks)."""
    facts: DeviceFacts
    link_gb: float = 12.0
    """GB/s of a collective between ranks, per rank."""
    host_gb: float = 12.0
    """GB/s between device and host memory."""
    library_bytes: int = 9 * 2**20
    """cuBLAS workspaces that PyTorch allocates."""
    note: str = ""

    @property
    def on_cuda(self) -> bool:
        """Whether it is a GPU."""
        return self.facts.kind == "cuda"


def _gpu(
    name: str,
    gib: float,
    facts_name: str,
    bf16: bool = True,
    link: float = 12.0,
    host: float = 20.0,
    library_mib: int = 9,
) -> Device:
    facts = DeviceFacts("cuda", bf16=bf16, fp16=True, name=facts_name)
    return Device(name, round(gib * GIB), facts, link, host, library_mib * 2**20)


DEVICES = {
    device.name: device
    for device in (
        _gpu("b200", 178.3, "NVIDIA B200", link=600, host=50, library_mib=33),
        _gpu("h200", 139.8, "NVIDIA H200", link=300, host=45, library_mib=33),
        _gpu("h100", 79.1, "NVIDIA H100 80GB HBM3", link=300, host=45, library_mib=33),
        _gpu("a100-80", 79.1, "NVIDIA A100-SXM4-80GB", link=200),
        _gpu("a100-40", 39.4, "NVIDIA A100-SXM4-40GB", link=200),
        _gpu("l40s", 44.4, "NVIDIA L40S"),
        _gpu("a6000", 47.4, "NVIDIA RTX A6000"),
        _gpu("a10", 22.1, "NVIDIA A10"),
        _gpu("l4", 22.0, "NVIDIA L4", host=10),
        _gpu("rtx5090", 31.3, "NVIDIA GeForce RTX 5090", host=40),
        _gpu("rtx4090", 23.5, "NVIDIA GeForce RTX 4090"),
        _gpu("rtx3090", 23.6, "NVIDIA GeForce RTX 3090"),
        _gpu("v100-32", 31.7, "Tesla V100-SXM2-32GB", bf16=False, link=100, host=10),
        _gpu("v100-16", 15.8, "Tesla V100-SXM2-16GB", bf16=False, link=100, host=10),
        _gpu("t4", 14.6, "Tesla T4", bf16=False, host=10),
    )
}
"""GPUs by the names that --device takes. Memory as CUDA reports it; link and host rates are typical ones, for the
estimate of speed.
"""


def find_device(text: str) -> Device:
    """A device by name, `cpu`, or a GPU of so many bytes (`25e9`, `24GiB`, `80GB`).

    Raises:
        ConfigError: neither a name nor a size.
    """
    name = text.strip().lower()
    if name in DEVICES:
        return DEVICES[name]
    if name == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        facts = DeviceFacts("cpu", bf16=True, fp16=False, name="cpu")
        return Device("cpu", memory, facts, note="memory of this machine, shared by its ranks")
    size = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*([kmgt]?i?b)?", name)
    if size is None or (size[2] or "") not in _UNITS or float(size[1]) <= 0:
        raise ConfigError(
            f"--device {text}: no such device (known: {', '.join(DEVICES)}, cpu; or a size: 24GiB, 80GB, 25e9)"
        )
    memory = int(float(size[1]) * _UNITS[size[2] or ""])
    return Device(
        text,
        memory,
        DeviceFacts("cuda", bf16=True, fp16=True, name=text),
        note="a GPU of this size; its speed is not known",
    )
