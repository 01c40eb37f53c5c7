"""What training costs: tokens per second, milliseconds per step, time to go, model FLOPs utilization."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from chatgot.devices import Precision, peak_flops

_EMA_DECAY_PER_STEP = 0.99

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Interval:
    """Training between two readings of the meter, paused sections excluded."""

    steps: int
    tokens: int
    """Tokens of all ranks."""
    seconds: float
    tokens_per_sec: float
    step_ms: float


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
        self._steps = self._tokens = 0
        self._since = 0.0
        """Active seconds at the interval's start."""
        self._first_step_at: float | None = None
        self._paused_before_first_step = 0.0
        self._total_steps = 0
        self._ema_seconds = self._ema_weight = 0.0

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
        seconds = self._active - self._since
        self._update_ema()
        reading = Interval(
            steps=self._steps,
            tokens=self._tokens,
            seconds=seconds,
            tokens_per_sec=self._tokens / seconds if seconds > 0 else 0.0,
            step_ms=1000.0 * seconds / self._steps,
        )
        self._steps = self._tokens = 0
        self._since = self._active
        return reading

    def eta_seconds(self, steps_left: int) -> float | None:
        """Seconds until `steps_left` more steps are done, or None before the second step has been read by `interval`.

        Training time follows an exponential average of the step time, updated once per interval (on a GPU single steps
        only measure the launch of kernels). The process's first step, which compiles and allocates, is left out of it.
        Paused sections are expected to go on at the rate seen since the first step.
        """
        if steps_left <= 0:
            return 0.0
        if not self._ema_weight:
            return None
        paused = sum(self.paused_seconds.values()) - self._paused_before_first_step
        return steps_left * (self._ema_seconds / self._ema_weight + paused / self._total_steps)

    def _charge(self) -> None:
        now = self._clock()
        elapsed, self._mark = now - self._mark, now
        if self._kinds:
            self.paused_seconds[self._kinds[-1]] = self.paused_seconds.get(self._kinds[-1], 0.0) + elapsed
        else:
            self._active += elapsed

    def _update_ema(self) -> None:
        steps, since = self._steps, self._since
        if self._total_steps == self._steps and self._first_step_at is not None:
            steps, since = steps - 1, self._first_step_at
        if steps:
            decay = _EMA_DECAY_PER_STEP**steps
            step_seconds = (self._active - since) / steps
            self._ema_seconds = decay * self._ema_seconds + (1 - decay) * step_seconds
            self._ema_weight = decay * self._ema_weight + (1 - decay)


class Mfu:
    """Model FLOPs utilization: achieved model FLOP/s over the devices' peak (PaLM, appendix B)."""

    def __init__(self, flops_per_token: float, device_name: str, dtype: Precision, n_devices: int) -> None:
        self._flops_per_token = flops_per_token
        peak = peak_flops(device_name, dtype)
        self._peak = peak * n_devices if peak else None
        if self._peak is None:
            logger.info(f"perf/mfu is left out: the {dtype} peak of {device_name!r} is not known")

    def __call__(self, tokens_per_sec: float) -> float | None:
        """A share of the peak (0.4 = 40 %), or None where the peak is unknown. tokens_per_sec counts all ranks."""
        return self._flops_per_token * tokens_per_sec / self._peak if self._peak else None
