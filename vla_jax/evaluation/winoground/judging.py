"""What is right in an example, how often, and whether two models differ in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vla_jax.errors import UserError
from vla_jax.evaluation import statistics
from vla_jax.evaluation.mcnemar import McNemar, mcnemar
from vla_jax.evaluation.statistics import Interval, PairedDifference

CHANCE = {"text": 1 / 4, "image": 1 / 4, "group": 1 / 6}


@dataclass(frozen=True)
class Outcomes:
    """What is right in each example; every array is bool [..., examples].

    Attributes:
        text: each picture strictly prefers its caption.
        image: each caption strictly prefers its picture.
        group: both.
        text_ties: not right, but right if ties counted as right.
        image_ties: likewise.
        group_ties: likewise.
    """

    text: np.ndarray
    image: np.ndarray
    group: np.ndarray
    text_ties: np.ndarray
    image_ties: np.ndarray
    group_ties: np.ndarray


@dataclass(frozen=True)
class Scores:
    """The three scores as fractions with their intervals, the share of ties apart, and the number of examples."""

    text: Interval
    image: Interval
    group: Interval
    text_ties: float
    image_ties: float
    group_ties: float
    examples: int


def outcomes(scores: np.ndarray) -> Outcomes:
    """Judges every example.

    Args:
        scores: float [..., examples, 2 captions, 2 images].

    Raises:
        UserError: another shape, or a score that is NaN.
    """
    scores = np.asarray(scores)
    if scores.ndim < 3 or scores.shape[-2:] != (2, 2) or scores.size == 0:
        raise UserError(f"scores are [examples, 2 captions, 2 images], given {scores.shape}")
    if np.isnan(scores).any():
        raise UserError(f"{int(np.isnan(scores).sum())} of {scores.size} scores are NaN; NaN cannot be compared")
    right0, right1 = scores[..., 0, 0], scores[..., 1, 1]
    caption0_image1, caption1_image0 = scores[..., 0, 1], scores[..., 1, 0]
    text = (right0 > caption1_image0) & (right1 > caption0_image1)
    image = (right0 > caption0_image1) & (right1 > caption1_image0)
    loose_text = (right0 >= caption1_image0) & (right1 >= caption0_image1)
    loose_image = (right0 >= caption0_image1) & (right1 >= caption1_image0)
    group = text & image
    return Outcomes(text, image, group, loose_text & ~text, loose_image & ~image, loose_text & loose_image & ~group)


def evaluate(scores: np.ndarray, interval: Callable[[np.ndarray], Interval] = statistics.accuracy) -> Scores:
    """Text, image and group score with 95 % intervals.

    Args:
        scores: float [examples, 2 captions, 2 images] or [seeds, examples, 2, 2].
        interval: of bool [..., examples]; :func:`vla_jax.evaluation.statistics.bootstrap_accuracy` is the other one.
    """
    judged = outcomes(scores)
    return Scores(
        text=interval(judged.text),
        image=interval(judged.image),
        group=interval(judged.group),
        text_ties=float(judged.text_ties.mean()),
        image_ties=float(judged.image_ties.mean()),
        group_ties=float(judged.group_ties.mean()),
        examples=judged.text.shape[-1],
    )


def evaluate_groups(
    scores: np.ndarray,
    groups: Mapping[str, np.ndarray],
    interval: Callable[[np.ndarray], Interval] = statistics.accuracy,
) -> dict[str, Scores]:
    """:func:`evaluate` on parts of the examples, such as :func:`groups_of_examples` or :func:`group_by`.

    Args:
        scores: as for :func:`evaluate`.
        groups: for each name the positions of its examples; groups may overlap.
        interval: as for :func:`evaluate`.
    """
    scores = np.asarray(scores)
    return {name: evaluate(scores[..., positions, :, :], interval) for name, positions in groups.items()}


def compare(scores_a: np.ndarray, scores_b: np.ndarray) -> dict[str, PairedDifference]:
    """Model a minus model b on the same examples, for text, image and group.

    Args:
        scores_a: float [examples, 2, 2] or [seeds, examples, 2, 2].
        scores_b: the same shape, the same examples in the same order.
    """
    a, b = outcomes(scores_a), outcomes(scores_b)
    return {name: statistics.paired_difference(getattr(a, name), getattr(b, name)) for name in CHANCE}


def compare_trained(scores_a: np.ndarray, scores_b: np.ndarray) -> dict[str, McNemar]:
    """McNemar's exact test between two trained models, for text, image and group.

    Args:
        scores_a: float [examples, 2 captions, 2 images].
        scores_b: the same shape, the same examples in the same order.
    """
    a, b = outcomes(scores_a), outcomes(scores_b)
    return {name: mcnemar(getattr(a, name), getattr(b, name)) for name in CHANCE}


def group_by(labels: Sequence[str]) -> dict[str, np.ndarray]:
    """Positions by label, labels in the order of their first appearance."""
    labels = [str(label) for label in labels]
    return {label: np.flatnonzero(np.asarray(labels) == label) for label in dict.fromkeys(labels)}
