"""The mean of several tasks' accuracies with its uncertainty, and the difference of two such means.

Every task counts the same, however many examples it has. Examples are drawn anew within each task; seeds are drawn once
for all tasks, since one trained model, or one set of models of one seed, answered all of them. A task that is all right
or all wrong adds no spread.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vla_jax.errors import UserError
from vla_jax.evaluation.statistics import Interval, outcomes_of, percentiles, resampled, tally_of

Clusters = Sequence[Sequence | np.ndarray | None]
"""For each task, which of its examples are drawn as one, as for :func:`vla_jax.evaluation.statistics.accuracy`."""


def mean_accuracy(correct: Sequence[np.ndarray], clusters: Clusters | None = None, seed: int = 0) -> Interval:
    """The mean of tasks' accuracies with its 95 % interval.

    Args:
        correct: for each task, bool [examples] or [seeds, examples]; all of the same seeds.
        clusters: for each task, what belongs together; None where every example stands for itself.
        seed: of the bootstrap's random numbers.

    Raises:
        UserError: without a task, for tasks of different seeds, or as :func:`vla_jax.evaluation.statistics.accuracy`.
    """
    return _interval([outcomes_of(task) for task in correct], clusters, seed)


def mean_difference(
    correct_a: Sequence[np.ndarray], correct_b: Sequence[np.ndarray], clusters: Clusters | None = None, seed: int = 0
) -> Interval:
    """Mean accuracy of a minus that of b over the same tasks and examples, with its 95 % interval.

    Args:
        correct_a: as for :func:`mean_accuracy`.
        correct_b: the same tasks, seeds and examples in the same order.
        clusters: as for :func:`mean_accuracy`.
        seed: of the bootstrap's random numbers.

    Raises:
        UserError: for shapes that differ, or as :func:`mean_accuracy`.
    """
    first, second = ([outcomes_of(task) for task in given] for given in (correct_a, correct_b))
    shapes = [[list(task.shape) for task in given] for given in (first, second)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"means are compared on the same tasks, seeds and examples; given [seeds, examples] {shapes[0]} and "
            f"{shapes[1]}"
        )
    return _interval([a - b for a, b in zip(first, second, strict=True)], clusters, seed)


def _interval(values: Sequence[np.ndarray], clusters: Clusters | None, seed: int) -> Interval:
    """The mean of the tasks' means, of int64 [seeds, examples] each."""
    if not values:
        raise UserError("a mean over tasks needs at least one task")
    if len({len(task) for task in values}) > 1:
        raise UserError(
            f"tasks of one mean have the same seeds; given {', '.join(str(len(task)) for task in values)} seeds"
        )
    clusters = [None] * len(values) if clusters is None else clusters
    tallies = [tally_of(task, own) for task, own in zip(values, clusters, strict=True)]
    low, high = percentiles(resampled(tallies, seed))
    return Interval(float(np.mean([task.mean() for task in values])), float(low), float(high))
