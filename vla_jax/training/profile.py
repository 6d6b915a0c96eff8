"""A profile of some steps of a run, for TensorBoard, XProf or Perfetto."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax

from vla_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Span:
    """The steps that are profiled.

    Attributes:
        first: the first one; steps count from 1.
        last: the last one.
    """

    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> Span | None:
        """The span that ``"10:15"`` names, both ends included; None for an empty text.

        Raises:
            UserError: if it names none.
        """
        if not text:
            return None
        found = re.fullmatch(r"(\d+):(\d+)", text)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise UserError(
                f"profile {text!r} names no steps; write FIRST:LAST, both included, such as 10:15. Steps count from 1"
            )
        return cls(int(found[1]), int(found[2]))


class Profiler:
    """Records the steps of a span as they pass; without a span, nothing."""

    def __init__(self, span: Span | None, folder: Path | None):
        """Args:
        span: which steps.
        folder: where the profile goes: ``plugins/profile/<time>/`` with a file for TensorBoard and XProf, and
            ``perfetto_trace.json.gz`` for https://ui.perfetto.dev.
        """
        self._span, self._folder, self._recording = span, folder, False

    def before(self, step: int) -> None:
        """Begins the record if this is the span's first step, or one within it after a resume."""
        if self._span is not None and not self._recording and self._span.first <= step <= self._span.last:
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._recording = True

    def after(self, step: int, results: Any) -> None:
        """Ends the record with the span's last step, once the device is done with it."""
        if self._recording and step >= self._span.last:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Writes what was recorded, also of a span that the run ended within."""
        if self._recording:
            self._recording = False
            jax.profiler.stop_trace()
