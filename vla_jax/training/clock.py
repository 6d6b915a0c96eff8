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

    def __init__(self, flop: float | None = None, peak: float | None = None) -> None:
        """Args:
        flop: what a step computes, all devices together; None leaves rates out.
        peak: what the devices could compute in a second; None leaves the share of it out.
        """
        self.first_step_seconds: float | None = None
        self._flop, self._peak = flop, peak
        self._since = time.perf_counter()
        self._first_read = False
        self._seconds, self._timed, self._pending, self._examples = 0.0, 0, 0, 0
        self._last: Metrics = {}
        self._waited = 0.0

    @property
    def seconds_per_step(self) -> float | None:
        """Mean over all steps but the first that were waited for."""
        return self._seconds / self._timed if self._timed else None

    @property
    def examples_per_second(self) -> float | None:
        """Of the global batch."""
        return self._examples / self.seconds_per_step if self._timed else None

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """Notes the time of what is done inside if the device had nothing left to do at its end."""
        start = time.perf_counter()
        yield
        if all(value.is_ready() for value in self._last.values()):
            self._waited += time.perf_counter() - start

    def stepped(self, metrics: Metrics, examples: int) -> None:
        """Counts a step, and waits for it if it is the first: that is when the step compiles."""
        self._examples, self._last = examples, metrics
        if self.first_step_seconds is None:
            jax.block_until_ready(metrics)
            self.first_step_seconds = time.perf_counter() - self._since
            self._since, self._waited = time.perf_counter(), 0.0
        else:
            self._pending += 1

    def read(self, metrics: Metrics) -> dict[str, float]:
        """The first step's time, once; of the others since the last reading or pause, means and shares; peak memory.

        ``data_wait_share`` is the share of the time in which a batch was waited for at whose arrival the device was
        idle: an upper bound of the device's own wait for data. ``mfu`` is the model's FLOP over the devices' published
        rate (:mod:`vla_jax.flop`).
        """
        record: dict[str, float] = {"peak_memory_bytes": peak_memory_bytes()}
        if not self._first_read:
            record["first_step_seconds"] = self.first_step_seconds
            self._first_read = True
        waited, (timed, seconds) = self._waited, self._wait(metrics)
        if timed:
            record |= {"seconds_per_step": seconds / timed, "examples_per_second": self._examples * timed / seconds}
            record["data_wait_share"] = min(1.0, waited / seconds)
        if timed and self._flop is not None:
            record["flop_per_second"] = self._flop * timed / seconds
            if self._peak is not None:
                record["mfu"] = record["flop_per_second"] / self._peak
        return record

    @contextlib.contextmanager
    def paused(self, metrics: Metrics) -> Iterator[None]:
        """Leaves out the time of what is done inside."""
        self._wait(metrics)
        try:
            yield
        finally:
            self._since, self._waited = time.perf_counter(), 0.0

    def _wait(self, metrics: Metrics) -> tuple[int, float]:
        """Waits for all steps begun; how many there were since the last wait, and the seconds they took."""
        jax.block_until_ready(metrics)
        now = time.perf_counter()
        timed, seconds = self._pending, now - self._since
        self._since, self._pending, self._waited = now, 0, 0.0
        if timed:
            self._timed, self._seconds = self._timed + timed, self._seconds + seconds
        return timed, seconds
