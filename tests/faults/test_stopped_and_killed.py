"""Processes that are asked to stop, killed, or started twice in one place."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from processes import Run, steps

from vla_jax.training import checksums
from vla_jax.training.checkpoint_folder import steps as saved_steps

pytestmark = pytest.mark.slow

KILLS, EVERY, STEPS = 20, 4, 200
LONG = (f"--config.steps={STEPS}", f"--config.every={EVERY}", "--config.width=4000")


def trained(workdir: Path) -> dict[str, np.ndarray]:
    with np.load(workdir / "trained.npz") as content:
        return dict(content)


def assert_same(one: Path, other: Path) -> None:
    """The runs ended with the same weights, bit for bit, the same predictions and the same numbers on the way."""
    found, expected = trained(one), trained(other)
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)
    assert (one / "result.json").read_text() == (other / "result.json").read_text()
    assert steps(one) == steps(other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = Run(folder, *LONG)
    assert done.end() == 0, done.said
    assert steps(folder) == list(range(1, STEPS + 1))
    return folder


def test_sigterm_saves_leaves_with_0_and_the_next_start_goes_on_bit_for_bit(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    stopped = Run(folder, *LONG, "--config.seconds=0.02")
    stopped.until(lambda: len(stopped.steps()) >= 7)
    stopped.signal(signal.SIGTERM)
    assert stopped.end() == 0, stopped.said
    assert "the same command goes on" in stopped.said
    assert saved_steps(epath.Path(folder / "checkpoints"))[-1] == steps(folder)[-1] < STEPS
    assert not (folder / "result.json").exists()
    assert Run(folder, *LONG).end() == 0
    assert_same(folder, whole)


def unfinished(checkpoints: epath.Path) -> bool:
    """Whether a save has begun and is not complete."""
    return any(checkpoints.glob("*.orbax-checkpoint-tmp"))


def reaches(workdir: Path, step: int) -> Callable[[], bool]:
    """A moment of a run: at once, where the run before it came as far."""
    return lambda: max(steps(workdir), default=0) >= step


@pytest.mark.parametrize("wait", [False, True], ids=["in the background", "waiting"])
def test_killed_twenty_times_also_while_saving(whole: Path, tmp_path: Path, wait: bool) -> None:
    """Every other kill comes when a save has begun and is not complete; the others at any moment of a start."""
    # Also: the same command gives the same bits, however often it is stopped.
    chance, folder = random.Random(0), tmp_path / "run"
    started = ("--config.seconds=0.02", *(["--config.wait"] if wait else []))
    checkpoints, lost, in_saves = epath.Path(folder / "checkpoints"), [], 0
    for kill in range(KILLS):
        newest = max(saved_steps(checkpoints), default=0)
        run = Run(folder, *LONG, *started)
        if kill % 2:
            run.until(lambda: not unfinished(checkpoints))  # what the last kill left is cleaned up
            run.until(lambda: unfinished(checkpoints), every=0)
        else:
            run.until(reaches(folder, newest + chance.randrange(2 * EVERY)), every=chance.uniform(0, 0.02))
        run.signal(signal.SIGKILL)
        assert run.end() == -signal.SIGKILL, run.said
        in_saves += unfinished(checkpoints)
        reached, saved = max(steps(folder), default=0), saved_steps(checkpoints)
        for step in saved[-1:]:
            assert checksums.problem(checkpoints / str(step)) is None
        newest = max(saved, default=0)
        lost.append(reached - newest)
        # What was due at the last multiple may have been on its way; the one before it is there.
        assert not wait or lost[-1] <= EVERY, (reached, saved)
        assert newest >= reached // EVERY * EVERY - EVERY, (reached, saved)
    assert in_saves >= KILLS // 4
    assert max(lost) > 0
    assert Run(folder, *LONG).end() == 0
    assert_same(folder, whole)


def test_a_second_run_in_one_work_directory_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = Run(folder, "--config.seconds=0.05", "--config.steps=2000")
    first.until(lambda: len(first.steps()) >= 2)
    before = (folder / "config.json").read_bytes()
    second = Run(folder, "--config.steps=12")
    assert second.end() == 2, second.said
    assert "another run is using the work directory" in second.said
    assert f"process {first.process.pid} on " in second.said
    assert (folder / "config.json").read_bytes() == before
    # The lock goes with the process, however that ends.
    first.signal(signal.SIGKILL)
    first.end()
    shutil.rmtree(folder / "checkpoints")
    assert Run(folder).end() == 0
