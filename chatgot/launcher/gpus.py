"""Which NVIDIA GPUs the ranks of this machine will see, found without torch."""

from __future__ import annotations

import glob
import re
import shutil
import subprocess
from collections.abc import Mapping

from chatgot.errors import MachineError


def present_gpus() -> list[str]:
    """NVIDIA GPUs of this machine: their UUIDs from nvidia-smi, else the names of their device files; no CUDA context
    is made.

    MachineError if nvidia-smi hangs, which it does when a GPU or the driver does.
    """
    if shutil.which("nvidia-smi") is not None:
        try:
            listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
        except subprocess.TimeoutExpired as error:
            raise MachineError(
                "nvidia-smi -L did not answer within 60 s: a GPU or its driver hangs; set DS_ACCELERATOR=cpu to train "
                "without GPUs"
            ) from error
        if listing.returncode == 0:
            return re.findall(r"^GPU \d+: .*\(UUID: (\S+)\)", listing.stdout, flags=re.MULTILINE)
    return sorted(glob.glob("/dev/nvidia[0-9]*"))


def visible_gpus(environ: Mapping[str, str]) -> list[str]:
    """GPUs that the ranks will see, in their order: those of CUDA_VISIBLE_DEVICES (indices or UUIDs), else all. Empty:
    train on the CPU.

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
                raise MachineError(
                    f"CUDA_VISIBLE_DEVICES={listed}: names GPU {entry}, but this machine has {len(present)}; give 0 "
                    f"to {len(present) - 1}"
                )
        elif not entry.startswith(("GPU-", "MIG-")):
            break
        if entry in chosen:
            raise MachineError(
                f"CUDA_VISIBLE_DEVICES={listed}: names {entry} twice, and CUDA then shows no GPU at all; name it once"
            )
        chosen.append(entry)
    return chosen
