"""Batches on the mesh, with a state that belongs to the batch in use and not to those fetched ahead."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from vla_jax.data.pipeline import BatchIterator
from vla_jax.errors import UserError
from vla_jax.mesh import as_read


class Batches(Iterator[dict[str, jax.Array]]):
    """Puts the batches of a pipeline on devices, a few ahead of their use.

    The transfer of the next batches runs while the current one is computed with, so the pipeline is always ahead of the
    training step. Saving the pipeline's own position would skip the batches in between on resuming; so each batch keeps
    the position that follows it, and :meth:`state` gives that of the last batch handed out. A loop that saves with
    ``state()`` after step n and before it draws the next batch resumes with the batch of step n + 1. The state is a
    JSON-able dict of this process, small enough to be saved inside the training checkpoint.
    """

    def __init__(self, iterator: BatchIterator, sharding: Sharding, *, prefetch: int = 2):
        """Wraps a pipeline's iterator.

        Args:
            iterator: the host batches of this process, ``iter(pipeline)``.
            sharding: of every array; its first axis is the batch.
            prefetch: batches held ready beyond the one handed out.
        """
        self._iterator = iterator
        self._as_read = as_read(sharding)
        # Where several processes need the same rows, each reads some of them and the devices exchange them: a picture
        # is decoded once. Every process draws its batches in the same order, as programs over all devices must be.
        self._exchange = jax.jit(lambda batch: batch, out_shardings=sharding) if self._as_read is not sharding else None
        self._prefetch = prefetch
        self._ahead: collections.deque[tuple[dict[str, jax.Array], dict[str, Any]]] = collections.deque()
        self._state = iterator.state()

    def __next__(self) -> dict[str, jax.Array]:
        """The next batch: global arrays, of which this process gave its share of rows."""
        # Transfers are asynchronous: those of the batches ahead run while the caller computes with this one.
        self._fill(1 + self._prefetch)
        if not self._ahead:
            raise StopIteration
        batch, self._state = self._ahead.popleft()
        return batch

    def state(self) -> dict[str, Any]:
        """The position after the last batch handed out; JSON-able."""
        return self._state

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to a position from :meth:`state`; the next batch is the one that followed it.

        Raises:
            UserError: if the pipeline is set up otherwise than when the state was taken.
        """
        self._ahead.clear()
        self._iterator.restore(state)
        self._state = self._iterator.state()

    def close(self) -> None:
        """Ends the pipeline's threads and worker processes."""
        self._ahead.clear()
        self._iterator.close()

    def _fill(self, count: int) -> None:
        while len(self._ahead) < count:
            try:
                batch = next(self._iterator)
            except StopIteration:
                return
            # A batch may be more than a dict: one of a mixture says which task it is of.
            arrays = jax.tree.map(self._placed, batch)
            self._ahead.append((self._exchange(arrays) if self._exchange else arrays, self._iterator.state()))

    def _placed(self, rows: np.ndarray) -> jax.Array:
        array = jax.make_array_from_process_local_data(self._as_read, rows)
        # Only the project's own axes are known well enough to be mended.
        if array.shape[0] != len(rows) * jax.process_count():
            raise UserError(
                f"the sharding {self._as_read} gives {array.shape[0]} rows of a batch to {jax.process_count()} "
                f"processes that read {len(rows)} each: some would hold the same rows and have read others. Cut the "
                "batch along every axis of the mesh that reaches over processes"
            )
        return array
