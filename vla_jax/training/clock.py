"""How long training steps take, when the device runs behind the host and the first step compiles."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import jax

from vla_jax.training.metrics import peak_memory_bytes
from vla_jax.training.step import Metrics


class Clock:
    """Times the first step and the others apart; it waits for the device only where it is read or paused."""

    def __init__(self) -> None:
        self.first_step_seconds: float | None = None
        self._since = time.perf_counter()
        self._first_read = False
        self._seconds, self._timed, self._pending, self._examples = 0.0, 0, 0, 0

    @property
    def seconds_per_step(self) -> float | None:
        """Mean over all steps but the first that were waited for."""
        return self._seconds / self._timed if self._timed else None

    @property
    def examples_per_second(self) -> float | None:
        """Of the global batch."""
        return self._examples / self.seconds_per_step if self._timed else None

    def stepped(self, metrics: Metrics, examples: int) -> None:
        """Counts a step, and waits for it if it is the first: that is when the step compiles."""
        self._examples = examples
        if self.first_step_seconds is None:
            jax.block_until_ready(metrics)
            self.first_step_seconds = time.perf_counter() - self._since
            self._since = time.perf_counter()
        else:
            self._pending += 1

    def read(self, metrics: Metrics) -> dict[str, float]:
        """The first step's time, once; the others' mean since the last reading or pause; and the peak memory."""
        record: dict[str, float] = {"peak_memory_bytes": peak_memory_bytes()}
        if not self._first_read:
            record["first_step_seconds"] = self.first_step_seconds
            self._first_read = True
        timed, seconds = self._wait(metrics)
        if timed:
            record |= {"seconds_per_step": seconds / timed, "examples_per_second": self._examples * timed / seconds}
        return record

    @contextlib.contextmanager
    def paused(self, metrics: Metrics) -> Iterator[None]:
        """Leaves out the time of what is done inside."""
        self._wait(metrics)
        try:
            yield
        finally:
            self._since = time.perf_counter()

    def _wait(self, metrics: Metrics) -> tuple[int, float]:
        """Waits for all steps begun; how many there were since the last wait, and the seconds they took."""
        jax.block_until_ready(metrics)
        now = time.perf_counter()
        timed, seconds = self._pending, now - self._since
        self._since, self._pending = now, 0
        if timed:
            self._timed, self._seconds = self._timed + timed, self._seconds + seconds
        return timed, seconds
