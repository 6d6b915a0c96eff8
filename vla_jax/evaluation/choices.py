"""One picture and several captions of which one is right: how often it scores strictly above all others.

A tie fails and is counted apart: a metric by which the first of equal scores wins gives a constant scorer 100 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vla_jax.errors import UserError
from vla_jax.evaluation import statistics
from vla_jax.evaluation.statistics import Interval, PairedDifference


@dataclass(frozen=True)
class Accuracy:
    """How often the right caption is chosen.

    Attributes:
        accuracy: share of examples whose right caption scores strictly highest, with its interval.
        ties: share of examples that are not right, but would be if ties counted as right.
        examples: how many there are.
    """

    accuracy: Interval
    ties: float
    examples: int


def judge(scores: np.ndarray, right: int) -> tuple[np.ndarray, np.ndarray]:
    """Which examples are right, and which are lost by a tie.

    Args:
        scores: float [..., examples, captions]; scorers' [..., examples, captions, 1 image] without the last axis.
        right: the place of the right caption.

    Returns:
        ``right`` and ``tied``, bool [..., examples].

    Raises:
        UserError: another shape, fewer than two captions, or a score that is NaN.
    """
    scores = np.asarray(scores)
    if scores.ndim < 2 or scores.shape[-1] < 2 or scores.size == 0 or not 0 <= right < scores.shape[-1]:
        raise UserError(
            f"scores are [examples, captions] of two or more captions with the right one at {right}, given "
            f"{scores.shape}"
        )
    if np.isnan(scores).any():
        raise UserError(f"{int(np.isnan(scores).sum())} of {scores.size} scores are NaN; NaN cannot be compared")
    chosen = scores[..., right]
    best_other = np.delete(scores, right, axis=-1).max(-1)
    return chosen > best_other, chosen == best_other


def evaluate(scores: np.ndarray, right: int, clusters: Sequence | np.ndarray | None = None) -> Accuracy:
    """The accuracy with its interval, and the ties.

    Args:
        scores: float [examples, captions] or [seeds, examples, captions].
        right: the place of the right caption.
        clusters: [examples], the picture of each, where one picture has several examples.
    """
    correct, tied = judge(scores, right)
    return Accuracy(statistics.accuracy(correct, clusters), float(tied.mean()), correct.shape[-1])


def evaluate_groups(
    scores: np.ndarray,
    right: int,
    groups: Mapping[str, np.ndarray],
    clusters: Sequence | np.ndarray | None = None,
) -> dict[str, Accuracy]:
    """:func:`evaluate` on parts of the examples.

    Args:
        scores: as for :func:`evaluate`.
        right: likewise.
        groups: for each name the positions of its examples; groups may overlap.
        clusters: as for :func:`evaluate`.
    """
    scores = np.asarray(scores)
    pictures = None if clusters is None else np.asarray(clusters)
    return {
        name: evaluate(scores[..., at, :], right, None if pictures is None else pictures[at])
        for name, at in groups.items()
    }


def compare(
    scores_a: np.ndarray, scores_b: np.ndarray, right: int, clusters: Sequence | np.ndarray | None = None
) -> PairedDifference:
    """Accuracy of model a minus that of model b on the same examples.

    Args:
        scores_a: float [examples, captions] or [seeds, examples, captions].
        scores_b: the same shape, the same examples in the same order.
        right: the place of the right caption.
        clusters: [examples], as for :func:`evaluate`.
    """
    return statistics.paired_difference(judge(scores_a, right)[0], judge(scores_b, right)[0], clusters)
