"""The loop: a resumed run is the uninterrupted run, bit for bit, and nothing broken is ever saved."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import signal
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import SingleDeviceSharding
from tensorboardX.proto import event_pb2
from toy_pictures import Pictures, to_row
from toy_training import FROZEN, STEP, Numbers, assert_same, new_checkpointer, new_state, values

from vla_jax.data.batches import Batches
from vla_jax.data.pipeline import Pipeline
from vla_jax.errors import UserError
from vla_jax.training.metrics import JsonLines, TensorBoard, read_records, run_record
from vla_jax.training.step import TrainState
from vla_jax.training.trainer import Fitted, Interrupted, NonFiniteError, fit


class Killed(BaseException):
    """Stands for a process that dies: no handler runs."""


def dies_at(position: int) -> Callable[[int], None]:
    def hook(now: int) -> None:
        if now == position:
            raise Killed

    return hook


@pytest.fixture(scope="module")
def uninterrupted() -> Fitted:
    return fit(new_state(), FROZEN, STEP, Numbers(), 14, log_every=1)


def test_the_loop_is_the_plain_loop(uninterrupted: Fitted) -> None:
    state, batches, losses = new_state(), Numbers(), []
    for _ in range(14):
        state, metrics = STEP(state, FROZEN, next(batches))
        losses.append(float(metrics["loss"]))
    assert_same(uninterrupted.state, state)
    assert [record["train/loss"] for record in uninterrupted.history] == losses
    assert losses[-1] < losses[0]
    assert {"train/loss", "train/accuracy", "train/gradient_norm"} <= uninterrupted.history[0].keys()


def test_timing(uninterrupted: Fitted) -> None:
    assert uninterrupted.first_step_seconds > 0
    assert uninterrupted.examples_per_second == pytest.approx(6 / uninterrupted.seconds_per_step)
    assert uninterrupted.peak_memory_bytes > 1024**2
    assert uninterrupted.history[0]["first_step_seconds"] == uninterrupted.first_step_seconds
    assert "seconds_per_step" not in uninterrupted.history[0]
    assert all("first_step_seconds" not in record for record in uninterrupted.history[1:])


def test_time_of_evaluating_is_left_out() -> None:
    def slow(state: TrainState) -> dict[str, float]:
        time.sleep(0.4)
        return {"score": 1.0}

    fitted = fit(new_state(), FROZEN, STEP, Numbers(), 6, log_every=3, evaluations={"slow": slow}, evaluate_every=1)
    assert 5 * fitted.seconds_per_step < 6 * 0.4  # Five timed steps, six evaluations of which five lie between them.


@pytest.mark.parametrize("died_at", [5, 8, 9])
def test_resumes_bit_for_bit(tmp_path: Path, uninterrupted: Fitted, died_at: int) -> None:
    with new_checkpointer(tmp_path) as checkpointer, pytest.raises(Killed):
        fit(new_state(), FROZEN, STEP, Numbers(hook=dies_at(died_at)), 14, checkpointer=checkpointer, log_every=1)
    batches = Numbers()
    with new_checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() == died_at // 4 * 4
        resumed = fit(new_state(), FROZEN, STEP, batches, 14, checkpointer=checkpointer, log_every=1)
        assert checkpointer.latest_step() == 14  # The last step is saved although 14 is no multiple of 4.
    assert_same(resumed.state, uninterrupted.state)
    expected = values(uninterrupted)
    assert values(resumed) == {step: expected[step] for step in range(died_at // 4 * 4 + 1, 15)}
    assert batches.position == 14


def test_a_finished_run_does_nothing_more(tmp_path: Path, uninterrupted: Fitted) -> None:
    for _ in range(2):
        with new_checkpointer(tmp_path) as checkpointer:
            fitted = fit(new_state(), FROZEN, STEP, Numbers(), 14, checkpointer=checkpointer)
    assert_same(fitted.state, uninterrupted.state)
    assert fitted.history == []
    assert fitted.first_step_seconds is None
    assert fitted.seconds_per_step is None
    with new_checkpointer(tmp_path) as checkpointer, pytest.raises(UserError, match="14 steps are done already"):
        fit(new_state(), FROZEN, STEP, Numbers(), 10, checkpointer=checkpointer)


def test_written_lines_of_a_resumed_run_are_those_of_an_uninterrupted_one(tmp_path: Path) -> None:
    """Killed between log lines and checkpoint, so that the file is ahead of the weights it is resumed from."""

    def run(folder: Path, hook: Callable[[int], None] = lambda position: None) -> None:
        evaluations = {"held_out": lambda state: {"norm": float(optax.tree.norm(state.trainable))}}
        with new_checkpointer(folder, every=5) as checkpointer:
            fit(
                new_state(),
                FROZEN,
                STEP,
                Numbers(hook=hook),
                14,
                checkpointer=checkpointer,
                log_every=2,
                evaluations=evaluations,
                evaluate_every=3,
                writers=[JsonLines(folder / "metrics.jsonl"), TensorBoard(folder / "events")],
            )

    run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "cut", dies_at(9))
    assert [record["step"] for record in read_records(tmp_path / "cut" / "metrics.jsonl")] == [2, 3, 4, 6, 8, 9]
    run(tmp_path / "cut")
    whole, cut = (read_records(tmp_path / name / "metrics.jsonl") for name in ("whole", "cut"))
    steps = [2, 3, 4, 6, 8, 9, 10, 12, 14]
    assert [record["step"] for record in cut] == steps
    assert values(cut) == values(whole)
    assert {"held_out/norm"} == values(cut)[3].keys() - {"step"}
    assert {"held_out/norm", "train/loss"} <= values(cut)[14].keys()
    logged = [(record["step"], record["train/loss"]) for record in whole if "train/loss" in record]
    assert [step for step, _ in logged] == [2, 4, 6, 8, 10, 12, 14]
    assert scalars(tmp_path / "cut" / "events", "train/loss") == logged


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    """What TensorBoard shows: events in file order, of which a restart drops those at or beyond its step."""
    shown: list[tuple[int, float]] = []
    for file in sorted(folder.iterdir()):
        content, position = file.read_bytes(), 0
        while position < len(content):
            (length,) = struct.unpack_from("<Q", content, position)
            event = event_pb2.Event.FromString(content[position + 12 : position + 12 + length])
            position += 12 + length + 4
            if event.HasField("session_log"):
                shown = [(step, value) for step, value in shown if step < event.step]
            shown += [(event.step, value.simple_value) for value in event.summary.value if value.tag == tag]
    return shown


def test_a_line_that_is_not_written_whole_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.write(1, {"loss": 1.0})
    opened = Path.open

    class Full(io.FileIO):
        def write(self, content: bytes) -> int:
            if len(content) < 10:
                raise OSError(28, "No space left on device")
            return super().write(content[:7])

    monkeypatch.setattr(Path, "open", lambda path, mode, **_: Full(path, mode))
    with pytest.raises(OSError, match="No space left"):
        lines.write(2, {"loss": 2.0})
    monkeypatch.setattr(Path, "open", opened)
    lines.write(3, {"loss": 3.0, "examples": [4, 5], "why": "nan", "nothing": None})
    assert [json.loads(line) for line in lines.path.read_text().splitlines()] == [
        {"step": 1, "loss": 1.0},
        {"step": 3, "loss": 3.0, "examples": [4, 5], "why": "nan", "nothing": None},
    ]


def test_json_lines_survive_a_torn_line_and_keep_to_json(tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "metrics.jsonl"
    lines = JsonLines(path)
    lines.resume(3)
    for step in (1, 2, 3):
        lines.write(step, {"loss": np.float32(step), "count": step, "share": float("nan")})
    path.write_text(path.read_text() + '{"step": 4, "lo')
    lines.resume(2)
    lines.write(3, {"loss": 7.0})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 1.0, "count": 1, "share": None},
        {"step": 2, "loss": 2.0, "count": 2, "share": None},
        {"step": 3, "loss": 7.0},
    ]


def breaks_at(step: int, part: str) -> Callable[..., Any]:
    """The training step, with a loss or a weight that is not a number after ``step``."""

    def broken(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        state, metrics = STEP(state, frozen, batch)
        if int(state.step) == step and part == "loss":
            metrics["loss"] = jnp.float32(jnp.nan)
        if int(state.step) == step and part == "weight":
            state = dataclasses.replace(state, trainable=jax.tree.map(lambda leaf: leaf / 0, state.trainable))
        return state, metrics

    return broken


@pytest.mark.parametrize(
    ("part", "message"), [("loss", "the loss of step 7 is nan"), ("weight", "weight .* after step 8")]
)
def test_what_is_not_finite_ends_the_run_and_is_not_saved(tmp_path: Path, part: str, message: str) -> None:
    """Nothing is logged between, so the step that broke is found before the save of step 8."""
    step = breaks_at(7 if part == "loss" else 8, part)
    with new_checkpointer(tmp_path) as checkpointer, pytest.raises(NonFiniteError, match=message) as raised:
        fit(new_state(), FROZEN, step, Numbers(), 14, checkpointer=checkpointer, log_every=100)
    assert raised.match("the checkpoint of step 4 is still good")
    with new_checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() == 4


def test_a_loss_that_is_not_finite_without_checkpoints() -> None:
    with pytest.raises(NonFiniteError, match=r"the loss of step 3 is nan; no checkpoint was saved"):
        fit(new_state(), FROZEN, breaks_at(3, "loss"), Numbers(), 14, log_every=5)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_leaves_a_checkpoint_of_the_step_in_progress(
    tmp_path: Path, uninterrupted: Fitted, number: signal.Signals, status: int
) -> None:
    before = signal.getsignal(number)

    def hook(position: int) -> None:
        if position == 5:
            os.kill(os.getpid(), number)

    with new_checkpointer(tmp_path) as checkpointer, pytest.raises(Interrupted) as raised:
        fit(new_state(), FROZEN, STEP, Numbers(hook=hook), 14, checkpointer=checkpointer)
    assert raised.value.code == status
    assert signal.getsignal(number) is before
    with new_checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() == 6
        resumed = fit(new_state(), FROZEN, STEP, Numbers(), 14, checkpointer=checkpointer)
    assert_same(resumed.state, uninterrupted.state)


def test_a_pipeline_that_dies_of_the_signal_too_costs_no_step(tmp_path: Path, uninterrupted: Fitted) -> None:
    def hook(position: int) -> None:
        if position == 5:
            os.kill(os.getpid(), signal.SIGINT)
            raise RuntimeError("a worker died")

    with new_checkpointer(tmp_path) as checkpointer, pytest.raises(Interrupted):
        fit(new_state(), FROZEN, STEP, Numbers(hook=hook), 14, checkpointer=checkpointer)
    with new_checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() == 5
        resumed = fit(new_state(), FROZEN, STEP, Numbers(), 14, checkpointer=checkpointer)
    assert_same(resumed.state, uninterrupted.state)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A process that a shell started in the background ignores SIGINT, as no run at a terminal does."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_second_signal_acts_at_once() -> None:
    def hook(position: int) -> None:
        if position == 2:
            # To this thread: one sent to the process may reach Python late, and two that arrive together are one.
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(new_state(), FROZEN, STEP, Numbers(hook=hook), 14)


def test_the_host_waits_only_where_it_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []
    get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: fetched.append(1) or get(tree))
    fit(new_state(), FROZEN, STEP, Numbers(), 12, log_every=4)
    assert len(fetched) == 2 * 3  # The interval's losses and the step's metrics, three times.


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"the data ended before step 6 of 14; repeat"):
        fit(new_state(), FROZEN, STEP, Numbers(end=5), 14)
    with pytest.raises(UserError, match="given log_every=0, evaluate_every=None"):
        fit(new_state(), FROZEN, STEP, Numbers(), 14, log_every=0)


def test_progress_is_shown_when_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    fit(new_state(), FROZEN, STEP, Numbers(), 3, log_every=1)
    assert capfd.readouterr().err == ""
    fit(new_state(), FROZEN, STEP, Numbers(), 3, log_every=1, progress=True, description="toy")
    assert "toy: 100%" in capfd.readouterr().err


def test_run_record(tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class Inner:
        rates: tuple[float, ...] = (0.1, 0.2)

    @dataclasses.dataclass(frozen=True)
    class Config:
        inner: Inner = dataclasses.field(default_factory=Inner)
        folder: Path = Path("somewhere")

    run_record(tmp_path / "run", Config())
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == {
        "inner": {"rates": [0.1, 0.2]},
        "folder": "somewhere",
    }
    found = json.loads((tmp_path / "run" / "versions.json").read_text())
    assert found["jax"] == jax.__version__
    assert found["devices"] == 8
    assert found["cores"] == os.cpu_count()
    assert {"python", "flax", "optax", "orbax-checkpoint", "vla_jax", "commit", "device"} <= found.keys()


@pytest.mark.slow
def test_resumes_bit_for_bit_with_data_workers(tmp_path: Path) -> None:
    def run(folder: Path, stop_at: int | None = None) -> Fitted:
        pipeline = Pipeline(Pictures(), to_row, batch_size=6, training=True, seed=5, workers=2)
        batches = Batches(iter(pipeline), SingleDeviceSharding(jax.devices()[0]))
        drawn = 0

        class Watched:
            state, restore = batches.state, batches.restore

            def __next__(self) -> dict[str, jax.Array]:
                nonlocal drawn
                if drawn == stop_at:
                    raise Killed
                drawn += 1
                return next(batches)

        try:
            with new_checkpointer(folder) as checkpointer:
                return fit(new_state(), FROZEN, STEP, Watched(), 14, checkpointer=checkpointer, log_every=1)
        finally:
            batches.close()

    whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "cut", stop_at=10)
    resumed = run(tmp_path / "cut")
    assert_same(resumed.state, whole.state)
    assert values(resumed) == {step: record for step, record in values(whole).items() if step > 8}
    assert len({record["train/loss"] for record in whole.history}) == 14
    assert not math.isnan(resumed.history[-1]["train/loss"])
