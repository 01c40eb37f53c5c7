"""What training costs: tokens per second, time to go, model FLOPs utilization, and memory. Imports no torch unless a
CUDA device's memory is asked for.
"""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import psutil
from tqdm.std import EMA  # pyright: ignore[reportAttributeAccessIssue]  (its stubs lack it)

from chatgot.devices import Precision, cgroup_memory, peak_flops

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Interval(NamedTuple):
    """Training between two readings of the meter, paused sections excluded."""

    steps: int
    tokens: int
    """Tokens of all ranks."""
    seconds: float

    @property
    def tokens_per_sec(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def step_ms(self) -> float:
        return 1000.0 * self.seconds / self.steps


class Throughput:
    """Counts steps and global tokens over the time spent training.

    Sections run under `paused("eval")` are excluded and summed by kind. A section inside another is charged to the
    inner kind only, so that all the times add up to the time since construction.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._mark = clock()
        self._kinds: list[str] = []
        self._active = 0.0
        self.paused_seconds: dict[str, float] = {}
        """Seconds per kind of paused section, since construction."""
        self.waited_seconds = 0.0
        """Seconds of training that `waiting` has seen, since construction."""
        self._steps = self._tokens = 0
        self._since = 0.0
        """Active seconds at the interval's start."""
        self._first_step_at: float | None = None
        self._paused_before_first_step = 0.0
        self._total_steps = 0
        self._step_seconds = EMA(smoothing=0.1)

    @contextmanager
    def paused(self, kind: str) -> Iterator[None]:
        """Keep the enclosed work (kind: eval, save, sample, ...) out of the throughput."""
        self._charge()
        self._kinds.append(kind)
        try:
            yield
        finally:
            self._charge()
            self._kinds.pop()

    def waiting(self, batches: Iterator[T]) -> Iterator[T]:
        """Give back the batches, and count how long they were waited for. That stays part of the throughput."""
        while True:
            before = self._clock()
            batch = next(batches, None)
            self.waited_seconds += self._clock() - before
            if batch is None:
                return
            yield batch

    def active(self) -> tuple[float, float | None, float | None]:
        """Seconds of training since construction: in all, until the first step was done, and of a later step."""
        self._charge()
        later = self._total_steps - 1
        if self._first_step_at is None or not later:
            return self._active, self._first_step_at, None
        return self._active, self._first_step_at, (self._active - self._first_step_at) / later

    def step(self, tokens: int) -> None:
        """An optimizer step over `tokens` tokens (all ranks) is done."""
        self._charge()
        self._steps += 1
        self._tokens += tokens
        self._total_steps += 1
        if self._first_step_at is None:
            self._first_step_at = self._active
            self._paused_before_first_step = sum(self.paused_seconds.values())

    def interval(self) -> Interval | None:
        """The steps since the last call, or None if there were none. Starts the next interval."""
        self._charge()
        if not self._steps:
            return None
        steps, since = self._steps, self._since
        if self._total_steps == steps and self._first_step_at is not None:
            steps, since = steps - 1, self._first_step_at
        if steps:
            self._step_seconds((self._active - since) / steps)
        reading = Interval(self._steps, self._tokens, self._active - self._since)
        self._steps = self._tokens = 0
        self._since = self._active
        return reading

    def eta_seconds(self, steps_left: int) -> float | None:
        """Seconds until `steps_left` more steps are done, or None before the second step has been read by `interval`.

        Training time follows an exponential average of the intervals' step times (on a GPU single steps only measure
        the launch of kernels). The process's first step, which compiles and allocates, is left out of it. Paused
        sections are expected to go on at the rate seen since the first step.
        """
        if steps_left <= 0:
            return 0.0
        if not self._step_seconds.calls:
            return None
        paused = sum(self.paused_seconds.values()) - self._paused_before_first_step
        return steps_left * (self._step_seconds() + paused / self._total_steps)

    def _charge(self) -> None:
        now = self._clock()
        elapsed, self._mark = now - self._mark, now
        if self._kinds:
            self.paused_seconds[self._kinds[-1]] = self.paused_seconds.get(self._kinds[-1], 0.0) + elapsed
        else:
            self._active += elapsed


class Mfu:
    """Model FLOPs utilization: achieved model FLOP/s over the devices' peak (PaLM, appendix B)."""

    def __init__(self, flops_per_token: float, device_name: str, dtype: Precision, n_devices: int) -> None:
        self._flops_per_token = flops_per_token
        self._peak = (peak_flops(device_name, dtype) or 0.0) * n_devices
        if not self._peak:
            logger.info(f"perf/mfu is left out: the {dtype} peak of {device_name!r} is not known")

    def __call__(self, tokens_per_sec: float) -> float | None:
        """A share of the peak (0.4 = 40 %), or None where the peak is unknown. tokens_per_sec counts all ranks."""
        return self._flops_per_token * tokens_per_sec / self._peak if self._peak else None


def available_bytes(device: torch.device) -> int:
    """Measure what this process could take now, above what it has."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    bounds = [psutil.virtual_memory().available, *(limit - used for limit, used in cgroup_memory())]
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        bounds.append(limit - psutil.Process().memory_info().vms)
    return max(min(bounds), 0)


def peak_bytes(device: torch.device, available_before: int) -> dict[str, int]:
    """Measure the most memory that was in use, and the limit: {"peak_bytes", "limit_bytes"}; `available_before` is what
    `available_bytes` said at the start.
    """
    if device.type == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info(device)
        others = total - free - torch.cuda.memory_reserved(device)
        return {"peak_bytes": others + torch.cuda.max_memory_reserved(device), "limit_bytes": total}
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit - _status("VmPeak") < available_before:
        return {"peak_bytes": _status("VmPeak"), "limit_bytes": limit}
    used = _status("VmHWM")
    return {"peak_bytes": used, "limit_bytes": used + min(available_bytes(device), available_before)}


def peak_memory_gib(device_kind: str) -> float:
    """Measure the most memory that this rank has held, in GiB: tensors on the CUDA device, else the resident set."""
    if device_kind == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**30
    return _status("VmHWM") / 2**30  # ru_maxrss is handed down through fork and exec, the launcher's peak included


def _status(name: str) -> int:
    """Bytes of the line 'name:  1234 kB' of this process's status, which psutil does not read."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024
