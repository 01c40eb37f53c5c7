"""Where the wall time of a run has gone over all its starts: the goodput ledger, whose parts add up to the clock.

The energy is what the driver of this machine's GPUs counts. Its library is called as it is: torch tells the power of a
moment only, and through a package that few have.
"""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatgot.observe.journal import Tolerant, read_lines
from chatgot.observe.meters import Throughput
from chatgot.observe.progress import human_seconds

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

PARTS = {
    "compute": "training",
    "data": "waiting for batches",
    "evaluation": "evaluation",
    "sampling": "sampling",
    "saving": "saving",
    "startup": "start-up",
    "compilation": "the first step's compilation",
    "other": "rollbacks and diagnoses",
    "lost": "steps trained again",
    "downtime": "between two starts",
}
"""Every part of the wall time, and what a person calls it. Only `compute` is goodput."""
_PAUSES = {"eval": "evaluation", "sample": "sampling", "save": "saving"}
"""What the meter's pauses count as; the others are `other`."""
EVERY_SECONDS = 60.0
"""How often events.jsonl gets the ledger while a run only trains, so that a kill leaves little unaccounted for."""


class Ledger:
    """Rank 0's account of the run's wall time, in seconds.

    This start's time is the meter's, and what came before the meter is start-up. The time of earlier starts is taken
    from events.jsonl. When the run goes back to a checkpoint, the compute since that checkpoint becomes `lost`.
    """

    def __init__(
        self,
        meter: Throughput,
        began: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        joules: Callable[[], float] | None = None,
    ) -> None:
        """Args: began: when this start began, by `clock`; default: now. joules: reads an energy counter."""
        self._meter, self._clock, self._counter = meter, clock, joules
        self._joules, self._reading = 0.0, Tolerant("readings of the GPUs' energy", "taken")
        """The counter's last reading; 0 where there is none."""
        self._read_counter()
        self._joules_before = -self._joules
        """What earlier starts took, less the counter's value when this ledger was made."""
        self._began = clock() if began is None else began
        self._before = dict.fromkeys(PARTS, 0.0)
        """What other starts spent, and what has been moved from `compute` to `lost` since."""
        self._compute_at: dict[int, float] = {0: 0.0}
        """Compute by step at which it was told, of the run as it stands."""
        self._told = float("-inf")
        self.lost_steps = 0

    def go_on(self, events: Iterable[Mapping[str, Any] | None], journal: Path, step: int) -> None:
        """Take over the account of the run's earlier starts, of which the last may have been killed, and go back to
        the checkpoint of `step`. Without such an account (an old run, another folder) it begins with this start.
        """
        told = [event for event in events if event is not None and _is_account(event)]
        if not told:
            return
        for event in told:
            self._compute_at = {at: compute for at, compute in self._compute_at.items() if at < event["step"]}
            self._compute_at[event["step"]] = event["seconds"]["compute"]
        last = told[-1]
        self._before |= last["seconds"]
        self.lost_steps = last["lost_steps"]
        self._joules_before += last.get("joules", 0.0)
        seen, trained = sum(last["seconds"].values()), set[int]()
        for record in read_lines(journal, after=min(step, last["step"])):
            if record is None or not isinstance(at := record.get("step"), int):
                continue
            if at > step and "digest" in record:
                trained.add(at)
            seen = max(seen, record.get("goodput/wall_seconds", 0.0))
        gap = (datetime.now(timezone.utc) - datetime.fromisoformat(last["time"])).total_seconds()
        gap = max(0.0, gap - (self._clock() - self._began))
        alive = min(gap, seen - sum(last["seconds"].values()))
        self._before["compute"] += alive
        self._before["downtime"] += gap - alive
        self._give_up(step, len(trained), self._before["compute"])

    def go_back(self, from_step: int, to_step: int) -> None:
        """The run is rolled back: the steps in between are lost."""
        self._give_up(to_step, from_step - to_step, self.seconds()["compute"])

    def _give_up(self, step: int, steps: int, compute: float) -> None:
        self._compute_at = {at: seconds for at, seconds in self._compute_at.items() if at <= step}
        lost = max(0.0, compute - max(self._compute_at.values())) if steps else 0.0
        self._before["compute"] -= lost
        self._before["lost"] += lost
        self.lost_steps += steps

    def seconds(self) -> dict[str, float]:
        """The seconds of every part up to now; together they are the run's wall time."""
        meter, parts = self._meter, dict(self._before)
        training, first, later = meter.active()
        parts["startup"] += self._clock() - self._began - training - sum(meter.paused_seconds.values())
        for kind, seconds in meter.paused_seconds.items():
            parts[_PAUSES.get(kind, "other")] += seconds
        compilation = 0.0 if first is None or later is None else max(0.0, first - later)
        parts["compilation"] += compilation
        parts["data"] += meter.waited_seconds
        parts["compute"] += training - compilation - meter.waited_seconds
        return parts

    def due(self) -> bool:
        """Whether it is time to tell the account again, though nothing but training happened."""
        return self._clock() - self._told >= EVERY_SECONDS

    def tell(self, step: int) -> dict[str, Any]:
        """The account after a step, as fields of an event."""
        self._told, seconds = self._clock(), self.seconds()
        self._compute_at = {at: compute for at, compute in self._compute_at.items() if at < step}
        self._compute_at[step] = seconds["compute"]
        wall = sum(seconds.values())
        told: dict[str, Any] = {
            "wall_seconds": round(wall, 3),
            "goodput": round(seconds["compute"] / wall, 4) if wall else 0.0,
            "lost_steps": self.lost_steps,
            "seconds": {part: round(value, 3) for part, value in seconds.items()},
        }
        self._reading.attempt(self._read_counter)
        joules = self._joules_before + self._joules
        return {**told, "joules": round(joules, 1)} if joules else told

    def _read_counter(self) -> None:
        if self._counter is not None:
            self._joules = self._counter()


def describe(told: Mapping[str, Any]) -> str:
    """Say on one line where the time went: '12m03s in all: 93.1 % training, 4.0 % start-up, ...'."""
    wall = told["wall_seconds"] or 1.0
    shares = sorted(((seconds / wall, part) for part, seconds in told["seconds"].items()), reverse=True)
    said = [f"{100 * share:.1f} % {PARTS[part]}" for share, part in shares if share >= 0.0005]
    again = f"; {told['lost_steps']} steps were trained again" if told["lost_steps"] else ""
    energy = f"; {told['joules'] / 3600:.3g} Wh" if "joules" in told else ""
    return f"{human_seconds(told['wall_seconds'])} in all: {', '.join(said)}{again}{energy}"


def _is_account(event: Mapping[str, Any]) -> bool:
    """Whether it is a whole event of this kind: a run folder may come from elsewhere."""
    kinds = {"step": int, "lost_steps": int, "time": str, "seconds": dict}
    if event.get("event") != "goodput" or not all(isinstance(event.get(name), kind) for name, kind in kinds.items()):
        return False
    return event["seconds"].keys() == PARTS.keys() and all(
        isinstance(number, (int, float)) for number in (*event["seconds"].values(), event.get("joules", 0))
    )


def energy_counter(device: torch.device, world_size: int) -> Callable[[], float] | None:
    """Return what reads the joules of the GPUs on rank 0's machine that the run trains on; None: nobody counts them.

    Args:
        world_size: ranks of the run, of which each takes a GPU; machines beyond rank 0's are not counted.
    """
    if device.type != "cuda":
        return None
    import torch

    try:
        counter = gpu_energy(min(world_size, torch.cuda.device_count()))
        counter()
        return counter
    except (OSError, AttributeError) as error:  # no driver of NVIDIA's, or one that is older than the counter
        logger.info(f"energy is left out of the run's account: {error}")
        return None


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
