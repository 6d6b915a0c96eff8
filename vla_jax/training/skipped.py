"""Steps that were not applied, since their loss or gradient was not finite: what they saw, and when it is too many.

The compiled step decides (:func:`vla_jax.training.step.make_train_step`) and says so in its metric ``skipped``; here
the host follows, only where it waits for the device anyway.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.distributed import on_host
from vla_jax.errors import UserError
from vla_jax.training.metrics import JsonLines
from vla_jax.training.step import Batch, Metrics

_log = logging.getLogger(__name__)

_READ = ("loss", "gradient_norm", "skipped")


class NonFiniteError(UserError):
    """Training left the finite numbers; no checkpoint holds the broken weights."""


class _Seen(NamedTuple):
    metrics: Metrics  # on the device, until the next look at them
    examples: jax.Array | None
    task: str | None


class FiniteWatch:
    """Looks, now and then, at the steps since the last look."""

    def __init__(self, limit: int, writer: JsonLines | None, saved: Callable[[], int | None]):
        """Args:
        limit: after so many steps in a row that were not applied, looking raises.
        writer: where steps that were not applied are written, with the examples of their batches.
        saved: the step of the newest checkpoint, or None.
        """
        self._limit, self._writer, self._saved = limit, writer, saved
        self._pending: dict[int, _Seen] = {}
        self._row: list[int] = []

    def resume(self, step: int) -> None:
        """Forgets what was written for steps after ``step``, before the run goes on from there."""
        with self._written():
            if self._writer is not None:
                self._writer.resume(step)

    @staticmethod
    def remember(batch: Batch) -> tuple[jax.Array | None, str | None]:
        """What is to be remembered of a batch before the step has it: the examples' places, and the task if it has one.

        Streams that were computed before have places of their own; ``position`` then is that in the data.
        """
        return batch.get("position", batch.get("index")), getattr(batch, "task", None)

    def stepped(self, step: int, metrics: Metrics, remembered: tuple[jax.Array | None, str | None]) -> None:
        """Remembers a step; waits for nothing."""
        self._pending[step] = _Seen({name: metrics[name] for name in _READ if name in metrics}, *remembered)

    def look(self) -> None:
        """Waits for the steps since the last look.

        Raises:
            NonFiniteError: if a step was applied although its loss was not finite, or too many in a row were not
                applied.
        """
        pending, self._pending = self._pending, {}
        for step, metrics in jax.device_get({step: seen.metrics for step, seen in pending.items()}).items():
            if metrics.get("skipped", 0):
                self._skipped(step, metrics, pending[step])
            elif not np.isfinite(metrics["loss"]):
                raise self._error(f"the loss of step {step} is {metrics['loss']}")
            else:
                self._row = []

    def check_weights(self, step: int, trainable: Any) -> None:
        """Looks at the steps, and at trained weights about to be saved.

        Raises:
            NonFiniteError: as :meth:`look`, and if a weight is not finite.
        """
        self.look()
        if not _all_finite(trainable):
            raise self._error(f"a trained weight is not finite after step {step}, though its loss was")

    def _skipped(self, step: int, metrics: dict[str, np.ndarray], seen: _Seen) -> None:
        self._row.append(step)
        examples = None if seen.examples is None else on_host(seen.examples).ravel().tolist()
        told = {"loss": str(metrics["loss"]), "gradient_norm": str(metrics.get("gradient_norm")), "examples": examples}
        if seen.task is not None:
            told["task"] = seen.task
        with self._written():
            if self._writer is not None:
                self._writer.write(step, told)
        shown = "" if examples is None else f"; its examples: {', '.join(map(str, examples[:8]))}"
        _log.warning(
            "step %d was not applied: its loss is %s and its gradient's norm %s%s%s",
            *(step, told["loss"], told["gradient_norm"], shown, ", ..." if examples and len(examples) > 8 else ""),
        )
        if len(self._row) >= self._limit:
            raise self._error(
                f"{len(self._row)} steps in a row, {self._row[0]} to {step}, were not applied, since loss or gradient "
                "was not finite"
            )

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # what is written here is logged as well
            _log.warning("%s cannot be written: %s", self._writer.path, error)

    def _error(self, problem: str) -> NonFiniteError:
        latest = self._saved()
        kept = "no checkpoint was saved" if latest is None else f"the checkpoint of step {latest} is still good"
        named = self._row and self._writer is not None
        look = f"look at these steps' examples, named in {self._writer.path}; or " if named else ""
        mend = f"{look}lower the learning rate, warm up for longer, clip the gradient norm, or compute in float32"
        return NonFiniteError(f"{problem}; {kept}. {mend[0].upper()}{mend[1:]}")


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()
