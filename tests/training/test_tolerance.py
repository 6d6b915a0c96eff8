"""What a run bears: steps that are not finite, a disk without room."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from toy_training import FROZEN, STEP, Numbers, assert_same, new_checkpointer, new_state

from vla_jax.errors import UserError
from vla_jax.training import checksums
from vla_jax.training.checkpoint import SaveError
from vla_jax.training.metrics import JsonLines, read_records
from vla_jax.training.tolerance import Tolerance
from vla_jax.training.trainer import Fitted, NonFiniteError, fit


@pytest.fixture(scope="module")
def uninterrupted() -> Fitted:
    return fit(new_state(), FROZEN, STEP, Numbers(), 14, log_every=1)


class Broken(Numbers):
    """Numbers of which some batches are none; examples have places."""

    def __init__(self, broken: set[int]):
        super().__init__()
        self.broken = broken

    def __next__(self) -> dict[str, jax.Array]:
        batch = super().__next__()
        first = 6 * (self.position - 1)
        image = batch["image"].at[2].set(jnp.nan) if self.position in self.broken else batch["image"]
        return batch | {"image": image, "index": jnp.arange(first, first + 6, dtype=jnp.int32)}


def test_steps_that_are_not_finite_change_nothing_and_are_written_down(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run(folder: Path, steps: int) -> Fitted:
        with new_checkpointer(folder) as checkpointer:
            return fit(
                *(new_state(), FROZEN, STEP, Broken({3, 6, 7}), steps),
                checkpointer=checkpointer,
                log_every=5,
                skipped=JsonLines(folder / "skipped.jsonl"),
            )

    whole = run(tmp_path / "whole", 10)
    state, batches = new_state(), Broken(set())
    for step in range(1, 11):
        batch = {name: array for name, array in next(batches).items() if name != "index"}
        if step in (3, 6, 7):
            state = dataclasses.replace(state, step=state.step + 1)
        else:
            state, _ = STEP(state, FROZEN, batch)
    assert_same(whole.state, state)
    assert [(record["step"], record["train/skipped"]) for record in whole.history] == [(5, 0), (10, 0)]
    written = read_records(tmp_path / "whole" / "skipped.jsonl")
    assert [(record["step"], record["loss"], record["examples"]) for record in written] == [
        (step, "nan", list(range(6 * step - 6, 6 * step))) for step in (3, 6, 7)
    ]
    assert "step 3 was not applied: its loss is nan and its gradient's norm nan; its examples: 12, 13" in caplog.text
    # A run that goes on writes no step twice.
    run(tmp_path / "cut", 7)
    (tmp_path / "cut" / "checkpoints" / "7").rename(tmp_path / "away")
    assert_same(run(tmp_path / "cut", 10).state, state)
    assert read_records(tmp_path / "cut" / "skipped.jsonl") == written


def test_too_many_steps_in_a_row_that_are_not_finite_end_the_run(tmp_path: Path) -> None:
    def run(broken: set[int]) -> Fitted:
        with new_checkpointer(tmp_path) as checkpointer:
            return fit(
                *(new_state(), FROZEN, STEP, Broken(broken), 14),
                checkpointer=checkpointer,
                log_every=7,
                skipped=JsonLines(tmp_path / "skipped.jsonl"),
                tolerance=Tolerance(skipped_steps=3),
            )

    with pytest.raises(NonFiniteError, match="3 steps in a row, 5 to 7, were not applied") as raised:
        run({1, 2, 5, 6, 7})
    assert raised.match(
        "the checkpoint of step 4 is still good. Look at these steps' examples, named in .*skipped.jsonl"
    )
    with new_checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() == 4
    assert run({1, 2, 5, 6, 8, 9, 11, 12}).history[-1]["step"] == 14
    with pytest.raises(UserError, match="skipped_steps is 0; allowed: 1"):
        Tolerance(skipped_steps=0)


@pytest.mark.parametrize("bears", [False, True])
def test_numbers_that_cannot_be_written(tmp_path: Path, bears: bool, caplog: pytest.LogCaptureFixture) -> None:
    class Full(JsonLines):
        def write(self, step: int, values: Mapping[str, float]) -> None:
            if step in (2, 3, 5):
                raise OSError(28, "No space left on device")
            super().write(step, values)

    def run() -> Fitted:
        writers = [Full(tmp_path / "metrics.jsonl")]
        tolerance = Tolerance(unsaved=bears)
        return fit(new_state(), FROZEN, STEP, Numbers(), 6, log_every=1, writers=writers, tolerance=tolerance)

    if not bears:
        with pytest.raises(UserError, match=r"numbers cannot be written \(Full\): .*No space left.*tolerance\.unsaved"):
            run()
        return
    run()
    assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl")] == [1, 4, 6]
    assert caplog.text.count("No space left on device") == 2  # at 2 and 5


@pytest.mark.parametrize("bears", [False, True])
@pytest.mark.parametrize("wait", [False, True])
def test_a_save_that_fails(
    tmp_path: Path,
    uninterrupted: Fitted,
    wait: bool,
    bears: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write = checksums.write

    def full(folder: Any, told: Mapping[str, Any]) -> None:
        if folder.name.startswith(("8", "12")):
            raise OSError(28, "No space left on device")
        write(folder, told)

    monkeypatch.setattr(checksums, "write", full)

    def run() -> Fitted:
        tolerance = Tolerance(unsaved=bears)
        with new_checkpointer(tmp_path, wait=wait) as checkpointer:
            return fit(new_state(), FROZEN, STEP, Numbers(), 14, checkpointer=checkpointer, tolerance=tolerance)

    if not bears:
        with pytest.raises(
            SaveError, match=r"step 8 could not be saved in .*No space left.*that of step 4 is still good"
        ):
            run()
        assert sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir()) == ["4"]
        return
    assert_same(run().state, uninterrupted.state)
    assert sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir()) == ["14", "4"]
    for step in (8, 12):
        assert caplog.text.count(f"the checkpoint of step {step} could not be saved") == 1
    with new_checkpointer(tmp_path) as checkpointer:
        assert_same(checkpointer.restore(new_state()).state, uninterrupted.state)
