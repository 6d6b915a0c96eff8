"""Readers that stand still and data workers that die."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from light_examples import Halting, Noisy

from vla_jax.data.pipeline import Pipeline
from vla_jax.data.reader import Reader
from vla_jax.errors import UserError


class Counting:
    """Counts, as a Grain data set would; ``hook`` is called before each number with it."""

    def __init__(self, end: int, hook: Callable[[int], None]):
        self.end, self.hook, self.closed = end, hook, False

    def __iter__(self) -> Counting:
        self.next = 0
        return self

    def __next__(self) -> int:
        if self.next == self.end:
            raise StopIteration
        self.hook(self.next)
        self.next += 1
        return self.next - 1

    def get_state(self) -> dict[str, int]:
        return {"next": self.next}

    def set_state(self, state: dict[str, int]) -> None:
        self.next = state["next"]

    def close(self) -> None:
        self.closed = True


def reader(hook: Callable[[int], None], workers: int = 2, patience: float = 0.1) -> Reader:
    return Reader(lambda: Counting(6, hook), workers, patience)


def dies(times: int, at: int = 3) -> Callable[[int], None]:
    left = [times]

    def hook(number: int) -> None:
        if number == at and left[0]:
            left[0] -= 1
            raise RuntimeError("Worker process was terminated unexpectedly with exit code -9.")

    return hook


@pytest.mark.parametrize("times", [0, 1, 2])
def test_workers_that_die_are_started_again_where_they_stopped(times: int, caplog: pytest.LogCaptureFixture) -> None:
    given = reader(dies(times))
    assert list(given) == list(range(6))
    assert caplog.text.count("started again where they stopped") == times
    given.close()


def test_workers_that_die_again_and_again_end_the_run() -> None:
    given = reader(dies(3))
    with pytest.raises(UserError, match=r"a data worker died \(.*code -9\.\) 3 times in a row\. Look at .*memory"):
        list(given)


def test_a_reader_that_stands_still_begins_again_or_ends_the_run(caplog: pytest.LogCaptureFixture) -> None:
    stuck = [2]

    def hook(number: int) -> None:
        if number == 4 and stuck[0]:
            stuck[0] -= 1
            time.sleep(60)

    with caplog.at_level(logging.WARNING):
        assert list(reader(hook)) == list(range(6))
    assert caplog.text.count("2 data workers gave no batch for 0.1 s") == 2
    stuck[0] = 3
    with pytest.raises(UserError, match=r"2 data workers gave no batch for 0\.1 s 3 times in a row"):
        list(reader(hook))
    # Threads of this process cannot be started again: what they wait for would be waited for once more.
    stuck[0] = 1
    with pytest.raises(UserError, match=r"reading the data gave no batch for 0\.1 s\. Look at"):
        list(reader(hook, workers=0))


def test_other_errors_come_as_they_were_raised() -> None:
    def hook(number: int) -> None:
        if number == 2:
            raise KeyError("image")

    given = reader(hook)
    assert list(islice(given, 2)) == [0, 1]
    with pytest.raises(KeyError, match="image"):
        next(given)


def test_an_interruption_loses_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    given = reader(lambda number: None, workers=0, patience=5)
    assert next(given) == 0
    answers = given._answers

    class Interrupting:
        def get(self, timeout: float) -> Any:
            raise KeyboardInterrupt

    given._answers = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        next(given)
    given._answers = answers
    assert list(given) == [1, 2, 3, 4, 5]


def _batches(folder: Path, halt: str, workers: int = 1, patience: float = 60) -> Pipeline:
    """Of the second of two processes; one worker reads in the order of none."""
    source = Halting(str(folder), halt)
    return Pipeline(source, Noisy(), 8, True, workers=workers, patience=patience, process_index=1, process_count=2)


def _indices(batches: list[dict[str, np.ndarray]]) -> list[list[int]]:
    return [batch["index"].tolist() for batch in batches]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "stuck"])
def test_a_real_worker_is_started_again_and_nothing_changes(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    iterator = iter(_batches(tmp_path, "never", workers=0))
    expected = _indices(list(islice(iterator, 12)))
    iterator.close()
    before = set(multiprocessing.active_children())
    killed = how == "killed"
    iterator = iter(_batches(tmp_path, "never" if killed else "once", patience=60 if killed else 8))
    found = list(islice(iterator, 6 if killed else 12))
    if killed:
        (worker,) = set(multiprocessing.active_children()) - before
        os.kill(worker.pid, signal.SIGKILL)
        found += list(islice(iterator, 6))
    iterator.close()
    assert _indices(found) == expected
    message = "a data worker died (Worker process" if killed else "1 data workers gave no batch for 8 s"
    assert message in caplog.text
