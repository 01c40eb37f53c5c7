"""The energy that this machine's GPUs have taken, as NVIDIA's driver counts it.

The driver's library is called as it is: torch tells the power of a moment only, and through a package that few have.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


def energy_counter(device: torch.device, world_size: int) -> Callable[[], float] | None:
    """Return what reads the joules of the GPUs on rank 0's machine that the run trains on; None: nobody counts them.

    Args:
        world_size: ranks of the run, of which each takes a GPU; machines beyond rank 0's are not counted.
    """
    if device.type != "cuda":
        return None
    import torch

    try:
        return tolerant_counter(gpu_energy(min(world_size, torch.cuda.device_count())))
    except (OSError, AttributeError) as error:  # no driver of NVIDIA's, or one that is older than the counter
        logger.info(f"energy is left out of the run's account: {error}")
        return None


def tolerant_counter(joules: Callable[[], float]) -> Callable[[], float]:
    """Return a reader of the counter that gives its last value while it fails, which is said: no run ends for it."""
    last, fails = joules(), False

    def read() -> float:
        nonlocal last, fails
        try:
            last, fails = joules(), False
        except OSError as error:
            if not fails:
                logger.warning(f"energy: what the GPUs take is not counted for now: {error}")
            fails = True
        return last

    return read


def gpu_energy(count: int) -> Callable[[], float]:
    """Return a function that reads the joules which the first `count` visible GPUs have taken since the driver started.

    Raises:
        OSError, AttributeError: there is no NVIDIA driver, or one of the GPUs has no counter (those before Volta, parts
            of a GPU).
    """
    import torch

    nvml = ctypes.CDLL("libnvidia-ml.so.1")

    def call(name: str, *arguments: object) -> None:
        if code := getattr(nvml, name)(*arguments):
            raise OSError(f"{name} of NVIDIA's driver: error {code}")

    def read(handle: ctypes.c_void_p) -> float:
        millijoules = ctypes.c_ulonglong()
        call("nvmlDeviceGetTotalEnergyConsumption", handle, ctypes.byref(millijoules))
        return millijoules.value / 1000

    def joules() -> float:
        return sum(map(read, handles))

    call("nvmlInit_v2")
    handles = [ctypes.c_void_p() for _ in range(count)]
    for index, handle in enumerate(handles):
        uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
        call("nvmlDeviceGetHandleByUUID", uuid.encode(), ctypes.byref(handle))
    return joules
