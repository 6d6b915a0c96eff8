"""Two and four processes train, evaluate, save and go on as one does, and stop and refuse together."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath
from processes import Run, steps, together

from vla_jax.training.checkpoint_folder import steps as saved_steps
from vla_jax.training.metrics import read_records

pytestmark = pytest.mark.slow


def losses(workdir: Path) -> list[float]:
    return [record["train/loss"] for record in read_records(workdir / "metrics.jsonl")]


def result(workdir: Path) -> dict[str, Any]:
    return json.loads((workdir / "result.json").read_text())


def trained(workdir: Path) -> dict[str, np.ndarray]:
    with np.load(workdir / "trained.npz") as content:
        return dict(content)


def finish(runs: list[Run]) -> None:
    assert [run.end() for run in runs] == [0] * len(runs), "\n".join(run.said for run in runs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("several")


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """One process with one device."""
    finish([Run(folder / "alone")])
    return folder / "alone"


@pytest.fixture(scope="module")
def two(folder: Path) -> list[Run]:
    """Two processes, with two devices each."""
    runs = together(folder / "two", 2, devices=2)
    finish(runs)
    return runs


@pytest.fixture(scope="module")
def stopped(folder: Path) -> Path:
    """Two processes, of which one was told to stop."""
    runs = together(folder / "stopped", 2, "--config.seconds=0.1", devices=2)
    runs[0].until(lambda: len(steps(folder / "stopped")) >= 2)
    runs[1].signal(signal.SIGTERM)
    finish(runs)
    (saved,) = saved_steps(epath.Path(folder / "stopped" / "checkpoints"))[-1:]
    assert steps(folder / "stopped") == list(range(1, saved + 1))
    assert 2 <= saved < 12
    return folder / "stopped"


def test_two_processes_train_and_measure_as_one(alone: Path, two: list[Run]) -> None:
    workdir = two[0].workdir
    np.testing.assert_allclose(losses(workdir), losses(alone), rtol=1e-5)
    assert result(workdir) == result(alone)
    assert result(workdir)["index"] == list(range(21))  # each once, although 21 is no multiple of anything
    for name, leaf in trained(alone).items():
        np.testing.assert_allclose(trained(workdir)[name], leaf, rtol=1e-3, atol=1e-5, err_msg=name)


def test_the_first_process_alone_speaks(two: list[Run]) -> None:
    assert "finished" in two[0].said
    assert two[1].said == ""


def test_a_signal_to_one_stops_all_and_the_next_start_goes_on_bit_for_bit(two: list[Run], stopped: Path) -> None:
    workdir = stopped.with_name("again")
    shutil.copytree(stopped, workdir)
    finish(together(workdir, 2, devices=2))
    assert losses(workdir) == losses(two[0].workdir)
    assert result(workdir) == result(two[0].workdir)
    for name, leaf in trained(two[0].workdir).items():
        np.testing.assert_array_equal(trained(workdir)[name], leaf, err_msg=name)


def test_when_one_is_killed_the_other_ends_and_the_next_start_goes_on(alone: Path, tmp_path: Path) -> None:
    """With one device each the loss of a process is seen at once; otherwise JAX's heartbeat tells, after 100 s."""
    workdir = tmp_path / "run"
    runs = together(workdir, 2, "--config.seconds=0.1")
    runs[0].until(lambda: len(steps(workdir)) >= 6)
    runs[1].signal(signal.SIGKILL)
    assert runs[0].end() not in (0, None)
    finish(together(workdir, 2))
    np.testing.assert_allclose(losses(workdir), losses(alone), rtol=1e-5)
    assert result(workdir) == result(alone)


@pytest.mark.parametrize(("count", "tensor"), [(1, 1), (4, 1), (4, 2)])
def test_another_number_of_processes_goes_on_from_it(alone: Path, stopped: Path, count: int, tensor: int) -> None:
    workdir = stopped.with_name(f"by_{count}_{tensor}")
    shutil.copytree(stopped, workdir)
    mesh = f"--config.mesh.tensor={tensor}"
    finish([Run(workdir, mesh)] if count == 1 else together(workdir, count, mesh))
    assert steps(workdir) == list(range(1, 13))
    np.testing.assert_allclose(losses(workdir), losses(alone), rtol=1e-5)
    assert result(workdir) == result(alone)


def test_processes_that_do_not_run_the_same_refuse_together(tmp_path: Path) -> None:
    runs = together(tmp_path / "run", 2, own={1: "--config.steps=13"})
    assert [run.end() for run in runs] == [2, 2]
    for run in runs:
        assert "the processes do not run the same program" in run.said
        assert "--config.steps is 13 on process 1 and 12 on process 0" in run.said
    assert not (tmp_path / "run").exists()


def test_what_one_refuses_all_refuse(tmp_path: Path) -> None:
    runs = together(tmp_path / "run", 2, own={1: "--config.stebs=13"})
    assert [run.end() for run in runs] == [2, 2]
    assert "error: process 1 cannot go on: unknown argument --config.stebs" in runs[0].said
    assert "error: unknown argument --config.stebs; did you mean --config.steps" in runs[1].said


@pytest.mark.parametrize("devices", [1, 2])
def test_tensor_may_reach_over_processes(alone: Path, tmp_path: Path, devices: int) -> None:
    """Two processes to a copy of the model then need the same rows, of which each reads its own."""
    workdir = tmp_path / "run"
    finish(together(workdir, 4, f"--config.mesh.tensor={2 * devices}", devices=devices))
    np.testing.assert_allclose(losses(workdir), losses(alone), rtol=1e-5)
    assert result(workdir) == result(alone)


def test_a_tensor_axis_over_unequal_parts_of_processes_is_refused(tmp_path: Path) -> None:
    runs = together(tmp_path / "run", 3, "--config.mesh.tensor=3", devices=2)
    assert [run.end() for run in runs] == [2, 2, 2]
    assert "mesh axis 'tensor' is 3, and a process has 2 devices" in runs[0].said


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_comparison_chooses_and_finds_the_same_in_two_processes(tmp_path: Path, tensor: int) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    mesh = f"--config.mesh.tensor={tensor}"
    finish([Run(one, experiment="toy_comparison")])
    finish(together(two, 2, mesh, experiment="toy_comparison"))
    expected = json.loads((one / "outcome.json").read_text())
    assert len(set(expected["validation"].values())) > 1  # there was something to choose
    assert json.loads((two / "outcome.json").read_text()) == expected

    def files(folder: Path) -> set[str]:
        kept = (file.relative_to(folder).as_posix() for file in (folder / "runs").rglob("*") if file.is_file())
        return {name for name in kept if "/adapters/" not in name and "events." not in name}

    assert files(two) == files(one)
    # What is finished is read, by all processes.
    (two / "outcome.json").unlink()
    before = {name: (two / name).stat().st_mtime_ns for name in files(two)}
    finish(together(two, 2, mesh, experiment="toy_comparison"))
    assert json.loads((two / "outcome.json").read_text()) == expected
    assert {name: (two / name).stat().st_mtime_ns for name in files(two)} == before
