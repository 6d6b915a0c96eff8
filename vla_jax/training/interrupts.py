"""How a run learns that it is to stop: Ctrl-C, a scheduler's SIGTERM, the preemption of one of several hosts."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils


class Interrupted(SystemExit):
    """Training was asked to stop by SIGINT, SIGTERM or preemption, and left a checkpoint if it had where to.

    Its status is 130 after SIGINT, and 0 after the other two: what was asked for was done, and a scheduler that sees
    another status may take the run for a broken one.
    """

    def __init__(self, number: int):
        """Args:
        number: the signal.
        """
        super().__init__(130 if number == signal.SIGINT else 0)


class Interrupts:
    """Collects SIGINT and SIGTERM instead of dying of the first, so that the step in progress is finished and saved.

    A second signal acts as it did before. Several processes must agree on the step at which they stop: for them JAX's
    runtime takes SIGTERM, and sets the next step that none of them has begun.

    Attributes:
        received: the signals so far.
    """

    # JAX counts how often processes have asked, and a comparison trains many times: steps of one training alone would
    # begin anew, and a signal between two trainings would be heard a whole training later.
    _asked_before = 0

    def __init__(self) -> None:
        self.received: list[int] = []
        self._alone = jax.process_count() == 1
        self._before = Interrupts._asked_before

    @contextlib.contextmanager
    def collected(self) -> Iterator[None]:
        """Collects signals inside."""
        if not self._alone or threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.getsignal(number) or signal.SIG_DFL for number in (signal.SIGINT, signal.SIGTERM)}

        def remember(number: int, _: Any) -> None:
            self.received.append(number)
            signal.signal(number, previous[number])

        for number in previous:
            signal.signal(number, remember)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def after(self, step: int) -> int | None:
        """The signal that asks to stop after this step, the same on every process, or None."""
        if self._alone:
            return self.received[0] if self.received else None
        Interrupts._asked_before = self._before + step
        asked = multihost_utils.reached_preemption_sync_point(Interrupts._asked_before)
        return int(signal.SIGTERM) if asked else None
