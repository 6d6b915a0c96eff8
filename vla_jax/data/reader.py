"""Reading a Grain data set so that data workers that stand still or die are noticed, and started again."""

from __future__ import annotations

import copy
import logging
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import grain

from vla_jax.errors import UserError

_log = logging.getLogger(__name__)

# How often in a row workers are started again without a batch in between.
_RESTARTS = 2

# How Grain says that a worker process is gone. What a transformation raises comes as it was raised.
_DEATH = "Worker process was terminated unexpectedly"


class Reader(Iterator[Any]):
    """The records of a data set, read in a thread of its own, so that waiting for one can be given up.

    Worker processes that die, or give nothing for too long, are started again where the last record ended: the records
    are the same as if nothing had happened.
    """

    def __init__(self, make: Callable[[], grain.IterDataset], workers: int, patience: float):
        """Args:
        make: makes the data set.
        workers: its worker processes; 0 if it reads in threads of this process.
        patience: seconds without a record after which reading counts as stuck.
        """
        self._make, self._workers, self._patience = make, workers, patience
        self._state: Any = None  # after the last record, where there are workers
        self._begin()

    def __next__(self) -> Any:
        """The next record.

        Raises:
            StopIteration: at the end.
            UserError: if reading is stuck, or workers die, again and again.
        """
        for attempt in range(1 + _RESTARTS):
            try:
                record = self._read()
            except _Trouble as trouble:
                if not self._workers or attempt == _RESTARTS:
                    raise UserError(
                        f"{trouble}{f' {1 + attempt} times in a row' if attempt else ''}. {_MEND}"
                    ) from None
                _log.warning("%s; the data workers are started again where they stopped", trouble)
                self._begin_again()
            else:
                if self._workers:
                    self._state = copy.deepcopy(self._iterator.get_state())  # Grain may go on writing into its own
                return record
        raise AssertionError("the last attempt returns or raises")

    def get_state(self) -> Any:
        """Where the data set stands after the last record, JSON-able."""
        return copy.deepcopy(self._iterator.get_state())

    def set_state(self, state: Any) -> None:
        """Goes to where :meth:`get_state` was called."""
        self._iterator.set_state(copy.deepcopy(state))
        self._state = copy.deepcopy(state)

    def close(self) -> None:
        """Ends threads and worker processes."""
        self._requests.put(None)
        self._iterator.close()

    def _read(self) -> Any:
        if not self._asked:  # what was asked for before an interruption is still to come
            self._requests.put(next)
            self._asked = True
        try:
            record, error = self._answers.get(timeout=self._patience)
            self._asked = False
        except queue.Empty:
            what = f"{self._workers} data workers gave" if self._workers else "reading the data gave"
            raise _Trouble(f"{what} no batch for {self._patience:g} s") from None
        if isinstance(error, RuntimeError) and _DEATH in str(error):
            raise _Trouble(f"a data worker died ({error})")
        if error is not None:
            raise error
        return record

    def _begin(self) -> None:
        self._iterator = iter(self._make())
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._asked = False
        # A thread that is stuck cannot be ended, and must not keep the process.
        queues = (self._requests, self._answers)
        threading.Thread(target=_serve, args=(self._iterator, *queues), name="data-reader", daemon=True).start()
        # Whoever forgets to close the reader keeps neither the thread nor, through it, the data set.
        weakref.finalize(self, self._requests.put, None)

    def _begin_again(self) -> None:
        # Closing may wait for a worker that is stuck before it kills it.
        threading.Thread(target=self._iterator.close, name="data-reader-close", daemon=True).start()
        self._requests.put(None)
        self._begin()
        if self._state is not None:
            self._iterator.set_state(copy.deepcopy(self._state))


class _Trouble(Exception):
    """Workers are stuck or gone."""


_MEND = (
    "Look at the messages above for what ended a worker (too little memory most often), at the data's disk or network, "
    "and at transformations that may wait for ever; fewer workers need less memory, and patience can be raised"
)


def _serve(iterator: Any, requests: queue.SimpleQueue[Any], answers: queue.SimpleQueue[Any]) -> None:
    while requests.get() is not None:
        try:
            answers.put((next(iterator), None))
        except BaseException as error:  # the end of the data among them; raised where the record was asked for
            answers.put((None, error))
