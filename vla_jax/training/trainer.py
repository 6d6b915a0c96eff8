"""The training loop: draw a batch, step, log, evaluate, save; and the same again from where it stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, Protocol

import jax
from tqdm.auto import tqdm

from vla_jax import names
from vla_jax.errors import UserError
from vla_jax.training.advice import Advice
from vla_jax.training.checkpoint import Checkpointer, SaveError
from vla_jax.training.clock import Clock
from vla_jax.training.interrupts import Interrupted, Interrupts
from vla_jax.training.metrics import JsonLines, Writer, peak_memory_bytes
from vla_jax.training.profile import Profiler
from vla_jax.training.skipped import FiniteWatch, NonFiniteError
from vla_jax.training.step import Batch, Metrics, TrainState
from vla_jax.training.tolerance import Tolerance

__all__ = ["Batches", "Evaluation", "Fitted", "Interrupted", "NonFiniteError", "fit"]

_log = logging.getLogger(__name__)

Evaluation = Callable[[TrainState], Mapping[str, float]]


class Batches(Protocol):
    """Batches on the device that know where they are in the data."""

    def __next__(self) -> Batch:
        """The next batch."""

    def state(self) -> Any:
        """Where the data stood after the last batch that was handed out: bytes or JSON-able."""

    def restore(self, state: Any) -> None:
        """Goes on behind the batch after which ``state`` was taken."""


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What training gives back.

    Attributes:
        state: the state after the last step.
        history: what was logged since this start, one dict with ``step`` for each logged step.
        first_step_seconds: wall time of the first batch and step, compilation and all; None if there was no step.
        seconds_per_step: mean wall time of the others, without evaluating; None if there were none.
        examples_per_second: from that time and the global batch; None likewise.
        peak_memory_bytes: the most memory the process held.
    """

    state: TrainState
    history: list[dict[str, Any]]
    first_step_seconds: float | None
    seconds_per_step: float | None
    examples_per_second: float | None
    peak_memory_bytes: int


def fit(
    state: TrainState,
    frozen: names.Tree,
    train_step: Callable[[TrainState, names.Tree, Batch], tuple[TrainState, Metrics]],
    batches: Batches,
    steps: int,
    *,
    checkpointer: Checkpointer | None = None,
    evaluations: Mapping[str, Evaluation] | None = None,
    evaluate_every: int | None = None,
    log_every: int = 20,
    writers: Sequence[Writer] = (),
    skipped: JsonLines | None = None,
    tolerance: Tolerance | None = None,
    flop: float | None = None,
    peak: float | None = None,
    profiler: Profiler | None = None,
    progress: bool | None = None,
    description: str = "training",
) -> Fitted:
    """Trains until ``steps`` steps are done, from the newest checkpoint if there is one.

    Args:
        state: the state to start from; its buffers are given to the step.
        frozen: the leaves that are not trained.
        train_step: ``(state, frozen, batch) -> (state, metrics)`` as :func:`vla_jax.training.step.make_train_step`
            builds it; ``metrics`` are scalars with a ``loss`` among them.
        batches: the training data.
        steps: how many steps the finished run has, those before an interruption included.
        checkpointer: saves and restores; nothing is saved without one. The last step is always saved.
        evaluations: by name, what to measure on a state; results are logged as ``name/metric``.
        evaluate_every: how many steps lie between evaluations; the last step is always evaluated.
        log_every: how many steps lie between logged ones. Only there does the host wait for the device.
        writers: where logged numbers go; only the first process writes. They are closed at the end.
        skipped: where steps that were not applied are named, with their examples; only the first process writes.
        tolerance: when the run stops by itself; the default of :class:`Tolerance` if None.
        flop: what a step computes on all devices together (:func:`vla_jax.flop.batch_flop`); its rate is logged.
        peak: what the devices could compute in a second; the share of it is logged as ``mfu``.
        profiler: records some of the steps.
        progress: whether the first process shows a progress bar; None shows it on a terminal only.
        description: the bar's label.

    Returns:
        The last state, the history and the timing.

    Raises:
        NonFiniteError: if too many steps in a row were not applied, or a weight about to be saved is not finite; it
            names the step.
        SaveError: if a checkpoint cannot be saved and that is not tolerated.
        UserError: if the data ends early, an interval is not positive, the checkpoint does not fit or is beyond
            ``steps``, or numbers cannot be written and that is not tolerated.
        Interrupted: after SIGINT, SIGTERM or preemption, once the step is done and saved. A second signal acts at once.
    """
    if log_every < 1 or (evaluate_every is not None and evaluate_every < 1):
        raise UserError(f"intervals must be at least 1; given log_every={log_every}, evaluate_every={evaluate_every}")
    if checkpointer is not None and checkpointer.latest_step() is not None:
        state, data_state, _ = checkpointer.restore(state)
        batches.restore(data_state)
    start = int(state.step)
    if start > steps:
        raise UserError(f"{start} steps are done already, more than the {steps} asked for; raise the number of steps")
    first_process = jax.process_index() == 0
    tolerance = tolerance or Tolerance()
    keeper = _Keeper(checkpointer, batches, tolerance.unsaved)
    log = _Log(writers if first_process else (), tolerance.unsaved)
    watch = FiniteWatch(tolerance.skipped_steps, skipped if first_process else None, keeper.latest_step)

    profiler = profiler or Profiler(None, None)
    advice = Advice(start)
    advice.frozen(frozen)

    history: list[dict[str, Any]] = []
    clock, interrupts = Clock(flop, peak), Interrupts()
    hidden = not first_process or (None if progress is None else not progress)
    bar = tqdm(total=steps, initial=start, desc=description, unit="step", disable=hidden)
    with bar, interrupts.collected(), contextlib.ExitStack() as closing:
        closing.enter_context(log.resumed(start))
        closing.callback(profiler.close)
        watch.resume(start)
        for step in range(start + 1, steps + 1):
            profiler.before(step)
            try:
                with clock.drawing():
                    batch = _draw(batches, step, steps)
            except Exception:
                # Ctrl-C in a terminal reaches data workers as well, and the pipeline fails when they die of it.
                if interrupts.received:
                    _leave(interrupts.received[0], step - 1, state, watch, keeper)
                raise
            remembered = watch.remember(batch)
            advice.before_step()
            state, metrics = train_step(state, frozen, batch)
            advice.after_step(step, batch)
            watch.stepped(step, metrics, remembered)
            clock.stepped(metrics, examples=jax.tree.leaves(batch)[0].shape[0])
            profiler.after(step, metrics)
            bar.update()

            record: dict[str, Any] = {}
            if step % log_every == 0 or step == steps:
                watch.look()
                record |= {f"train/{name}": value.item() for name, value in jax.device_get(metrics).items()}
                record |= clock.read(metrics)
                advice.logged(step, record, batch)
                bar.set_postfix(loss=f"{record['train/loss']:.4g}", refresh=False)
            if evaluations and (step == steps or (evaluate_every is not None and step % evaluate_every == 0)):
                with clock.paused(metrics):
                    for name, evaluate in evaluations.items():
                        record |= {f"{name}/{metric}": value for metric, value in evaluate(state).items()}
            if record:
                history.append({"step": step} | record)
                log.write(step, record)

            # Saved before the next batch is drawn, so that data and weights agree; and after the step's numbers are
            # written, so that a run that goes on from here lacks none.
            if stop := interrupts.after(step):
                _leave(stop, step, state, watch, keeper)
            if keeper.is_due(step, last=step == steps):
                with clock.paused(metrics):
                    watch.check_weights(step, state.trainable)
                    keeper.save(step, state)
    keeper.wait()
    if interrupts.received:  # During the last save, when nothing was left to be cut short.
        raise Interrupted(interrupts.received[0])
    return Fitted(
        state=state,
        history=history,
        first_step_seconds=clock.first_step_seconds,
        seconds_per_step=clock.seconds_per_step,
        examples_per_second=clock.examples_per_second,
        peak_memory_bytes=peak_memory_bytes(),
    )


def _draw(batches: Batches, step: int, steps: int) -> Batch:
    try:
        return next(batches)
    except StopIteration:
        raise UserError(
            f"the data ended before step {step} of {steps}; repeat the data for more epochs, or train for fewer steps"
        ) from None


def _leave(number: int, step: int, state: TrainState, watch: FiniteWatch, keeper: _Keeper) -> NoReturn:
    """Saves what is done and ends the run as the signal asked for."""
    if keeper.checkpointer is not None:
        watch.check_weights(step, state.trainable)
        keeper.save(step, state)
        keeper.wait()
    raise Interrupted(number)


class _Keeper:
    """Saves checkpoints, if there is where to, and bears what the run tolerates."""

    def __init__(self, checkpointer: Checkpointer | None, batches: Batches, tolerant: bool):
        self.checkpointer, self._batches, self._tolerant = checkpointer, batches, tolerant

    def latest_step(self) -> int | None:
        return None if self.checkpointer is None else self.checkpointer.latest_step()

    def is_due(self, step: int, *, last: bool) -> bool:
        return self.checkpointer is not None and (last or self.checkpointer.should_save(step))

    def save(self, step: int, state: TrainState) -> None:
        self.wait()  # apart, so that this step is saved although the save before it failed
        with self._borne():
            self.checkpointer.save(step, state, self._batches.state(), force=True)

    def wait(self) -> None:
        if self.checkpointer is not None:
            with self._borne():
                self.checkpointer.wait()

    @contextlib.contextmanager
    def _borne(self) -> Iterator[None]:
        try:
            yield
        except SaveError as error:
            if not self._tolerant:
                raise
            _log.warning("%s. Training goes on, and tries again when the next one is due", error)


class _Log:
    """Writes numbers, and bears what the run tolerates."""

    def __init__(self, writers: Sequence[Writer], tolerant: bool):
        self._writers, self._tolerant = writers, tolerant
        self._failing: set[int] = set()  # told once, until it goes well again

    @contextlib.contextmanager
    def resumed(self, step: int) -> Iterator[None]:
        """Goes on behind a step inside, and closes all writers at the end."""
        self._each(lambda writer: writer.resume(step))
        try:
            yield
        finally:
            self._each(lambda writer: writer.close())

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        self._each(lambda writer: writer.write(step, record))

    def _each(self, do: Callable[[Writer], None]) -> None:
        for number, writer in enumerate(self._writers):
            try:
                do(writer)
                self._failing.discard(number)
            except OSError as error:
                problem = f"the run's numbers cannot be written ({type(writer).__name__}): {error}"
                if not self._tolerant:
                    raise UserError(f"{problem}; make room, or let the run bear it with tolerance.unsaved") from error
                if number not in self._failing:
                    _log.warning("%s. Training goes on without them", problem)
                self._failing.add(number)
