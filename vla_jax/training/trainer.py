"""The training loop: draw a batch, step, log, evaluate, save; and the same again from where it stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from tqdm.auto import tqdm

from vla_jax import names
from vla_jax.errors import UserError
from vla_jax.training.checkpoint import Checkpointer
from vla_jax.training.clock import Clock
from vla_jax.training.metrics import Writer, peak_memory_bytes
from vla_jax.training.step import Batch, Metrics, TrainState

Evaluation = Callable[[TrainState], Mapping[str, float]]


class Batches(Protocol):
    """Batches on the device that know where they are in the data."""

    def __next__(self) -> Batch:
        """The next batch."""

    def state(self) -> Any:
        """Where the data stood after the last batch that was handed out: bytes or JSON-able."""

    def restore(self, state: Any) -> None:
        """Goes on behind the batch after which ``state`` was taken."""


class NonFiniteError(UserError):
    """Training left the finite numbers; no checkpoint holds the broken weights."""


class Interrupted(SystemExit):
    """Training was asked to stop by SIGINT, SIGTERM or preemption, and left a checkpoint if it had where to."""


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
        progress: whether the first process shows a progress bar; None shows it on a terminal only.
        description: the bar's label.

    Returns:
        The last state, the history and the timing.

    Raises:
        NonFiniteError: if the loss, or a weight about to be saved, is not finite; it names the step.
        UserError: if the data ends early, an interval is not positive, or the checkpoint does not fit or is beyond
            ``steps``.
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
    writers = writers if first_process else ()

    history: list[dict[str, Any]] = []
    losses: dict[int, jax.Array] = {}  # On the device, until the next look at them.
    clock = Clock()
    hidden = not first_process or (None if progress is None else not progress)
    bar = tqdm(total=steps, initial=start, desc=description, unit="step", disable=hidden)
    with bar, _signals() as received, contextlib.ExitStack() as closing:
        for writer in writers:
            writer.resume(start)
            closing.callback(writer.close)
        for step in range(start + 1, steps + 1):
            try:
                batch = _draw(batches, step, steps)
            except Exception:
                # Ctrl-C in a terminal reaches data workers as well, and the pipeline fails when they die of it.
                if received:
                    _leave(received[0], step - 1, state, losses, batches, checkpointer)
                raise
            state, metrics = train_step(state, frozen, batch)
            losses[step] = metrics["loss"]
            clock.stepped(metrics, examples=jax.tree.leaves(batch)[0].shape[0])
            bar.update()

            record: dict[str, Any] = {}
            if step % log_every == 0 or step == steps:
                _require_finite(losses, checkpointer)
                record |= {f"train/{name}": value.item() for name, value in jax.device_get(metrics).items()}
                record |= clock.read(metrics)
                bar.set_postfix(loss=f"{record['train/loss']:.4g}", refresh=False)
            if evaluations and (step == steps or (evaluate_every is not None and step % evaluate_every == 0)):
                with clock.paused(metrics):
                    for name, evaluate in evaluations.items():
                        record |= {f"{name}/{metric}": value for metric, value in evaluate(state).items()}
            if record:
                history.append({"step": step} | record)
                for writer in writers:
                    writer.write(step, record)

            # Saved before the next batch is drawn, so that data and weights agree; and after the step's numbers are
            # written, so that a run that goes on from here lacks none.
            if stop := _stop_signal(received, step):
                _leave(stop, step, state, losses, batches, checkpointer)
            if checkpointer is not None and (step == steps or checkpointer.should_save(step)):
                with clock.paused(metrics):
                    _require_finite(losses, checkpointer, state)
                    checkpointer.save(step, state, batches.state(), force=True)
    if checkpointer is not None:
        checkpointer.wait()
    if received:  # During the last save, when nothing was left to be cut short.
        raise Interrupted(128 + received[0])
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


def _leave(
    number: int,
    step: int,
    state: TrainState,
    losses: dict[int, jax.Array],
    batches: Batches,
    checkpointer: Checkpointer | None,
) -> NoReturn:
    """Saves what is done and ends the run as the signal asked for."""
    if checkpointer is not None:
        _require_finite(losses, checkpointer, state)
        checkpointer.save(step, state, batches.state(), force=True)
        checkpointer.wait()
    raise Interrupted(128 + number)


def _require_finite(
    losses: dict[int, jax.Array], checkpointer: Checkpointer | None, state: TrainState | None = None
) -> None:
    """Raises if a loss since the last look, or a trained weight of ``state``, is not finite; forgets those losses."""
    broken = [
        f"the loss of step {step} is {loss}" for step, loss in jax.device_get(losses).items() if not np.isfinite(loss)
    ]
    if not broken and state is not None and not _all_finite(state.trainable):
        broken = [f"a trained weight is not finite after step {int(state.step)}, though its loss was"]
    losses.clear()
    if broken:
        latest = None if checkpointer is None else checkpointer.latest_step()
        kept = "no checkpoint was saved" if latest is None else f"the checkpoint of step {latest} is still good"
        raise NonFiniteError(
            f"{broken[0]}; {kept}. Lower the learning rate, warm up for longer, or clip the gradient norm"
        )


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying of the first, so that the step in progress is finished and saved.

    Several processes must agree on the step at which they stop; for them JAX's preemption notice does that.
    """
    received: list[int] = []
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = {number: signal.getsignal(number) or signal.SIG_DFL for number in (signal.SIGINT, signal.SIGTERM)}

    def remember(number: int, _: Any) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    for number in previous:
        signal.signal(number, remember)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _stop_signal(received: list[int], step: int) -> int | None:
    """The signal that asks to stop after this step, the same on every process, or None."""
    if jax.process_count() > 1:
        return int(signal.SIGTERM) if multihost_utils.reached_preemption_sync_point(step) else None
    return received[0] if received else None
