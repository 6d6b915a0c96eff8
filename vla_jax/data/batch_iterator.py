"""The batches of one process, with a position that can be saved, and the count of what could not be read."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vla_jax.data.reader import Reader
from vla_jax.data.stages import Row
from vla_jax.errors import UserError

if TYPE_CHECKING:
    from vla_jax.data.pipeline import Pipeline

_log = logging.getLogger(__name__)

# Before this many examples a share says little: one bad picture among the first ten is 10 %.
ENOUGH_TO_JUDGE = 1000


class BatchIterator(Iterator[Row]):
    """The batches of a :class:`Pipeline` on this process, as numpy arrays, with a state that can be saved.

    Attributes:
        seen: examples read so far, those passed over included.
        skipped: examples passed over because their picture could not be decoded.
    """

    def __init__(self, pipeline: Pipeline):
        """Starts at the beginning of the pipeline's stream."""
        self._pipeline = pipeline
        self._start = 0  # the global batch with which the data set being read begins
        self._reader = self._read_from(0)
        self.seen = 0
        self.skipped = 0

    def __next__(self) -> Row:
        """The next batch.

        Raises:
            StopIteration: at the end of an evaluation pass.
            UserError: if the share of unreadable pictures is above the pipeline's ``max_bad_share``.
        """
        while True:
            record = next(self._reader)
            self._account(int(record["seen"]), record["skipped"])
            if record["batch"]:
                return record["batch"]

    def state(self) -> dict[str, Any]:
        """Where the iterator stands, after the last batch it gave: JSON-able, one for each process.

        Under ``position`` is what any number of processes can go on from, or None: with workers the order depends on
        their number, and processes that passed over pictures do not stand at the same place.
        """
        pipeline = self._pipeline
        whole = pipeline.training and not pipeline.workers and not self.skipped
        position = {"batches": self.seen // pipeline.local_batch_size, "setup": self._shared_setup()}
        return {
            "grain": self._reader.get_state(),
            "start": self._start,
            "seen": self.seen,
            "skipped": self.skipped,
            "setup": self._setup(),
            "position": position if whole else None,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to where ``state`` was taken: the next batch is the one that followed it.

        Args:
            state: from :meth:`state` of the same process; or ``{"position": ...}`` of it, of a process of any number.

        Raises:
            UserError: if the state was taken with another setup (source length, batch size, seed, workers, processes).
        """
        if "grain" in state:
            self._check(state["setup"], self._setup())
            if (start := state.get("start", 0)) != self._start:  # earlier versions always began at the start
                self._go_to(start)
            self._reader.set_state(state["grain"])
            self.seen, self.skipped = int(state["seen"]), int(state["skipped"])
            return
        position = state["position"]
        self._check(position["setup"], self._shared_setup())
        self._go_to(position["batches"])
        self.seen, self.skipped = self._start * self._pipeline.local_batch_size, 0

    def close(self) -> None:
        """Ends threads and worker processes; the iterator cannot be used any more."""
        self._reader.close()

    def _go_to(self, start: int) -> None:
        """Reads a data set that begins with the global batch ``start``."""
        self._reader.close()
        self._start, self._reader = start, self._read_from(start)

    def _read_from(self, start: int) -> Reader:
        pipeline = self._pipeline
        return Reader(functools.partial(pipeline.dataset, start), pipeline.workers, pipeline.patience)

    def _setup(self) -> dict[str, Any]:
        # Workers take groups of rows in turn; without them the order is the same however rows are grouped.
        fields = ("process_index", "process_count", *(["rows_at_once"] if self._pipeline.workers else []))
        return self._shared_setup() | {name: getattr(self._pipeline, name) for name in fields}

    def _shared_setup(self) -> dict[str, Any]:
        """What is the same for any number of processes."""
        fields = ("batch_size", "training", "seed", "workers")
        return {"examples": len(self._pipeline.source)} | {name: getattr(self._pipeline, name) for name in fields}

    @staticmethod
    def _check(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
        if changed := [key for key in mine if theirs.get(key) != mine[key]]:
            shown = ", ".join(f"{key} was {theirs.get(key)!r} and is now {mine[key]!r}" for key in changed)
            raise UserError(f"the data cannot go on from where it stopped: {shown}. Resume with the old value(s)")

    def _account(self, seen: int, skipped: Sequence[str]) -> None:
        self.seen += seen
        self.skipped += len(skipped)
        for name in skipped:
            _log.warning("passed over %s (%d of %d examples so far)", name, self.skipped, self.seen)
        allowed = self._pipeline.max_bad_share * max(self.seen, self._pipeline.enough_to_judge)
        if skipped and self.skipped > allowed:
            raise UserError(
                f"{self.skipped} of {self.seen} pictures cannot be decoded, the last of them {skipped[-1]}; at most "
                f"{self._pipeline.max_bad_share:.2%} may be. Mend the data, or raise max_bad_share"
            )
