"""How many labels one method needs for what another reaches with more of them.

Accuracy is taken to change along a straight line in the logarithm of the labels between the numbers that were tried.
A method needs as many labels as stand where its curve, the mean over seeds, first comes up to the accuracy asked for.
Beyond the numbers tried nothing is guessed: an accuracy below the first point is reached with the fewest labels *at
most*, and one that the curve never comes up to is not reached.

Seeds draw the examples, and each method has the same ones with the same seed. The interval draws seeds anew, for both
methods together, and with them the accuracy that is to be reached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vla_jax.errors import UserError
from vla_jax.evaluation.statistics import CONFIDENCE, RESAMPLES


@dataclass(frozen=True)
class LabelRatio:
    """Labels of a reference over labels of a method at the reference's accuracy.

    Attributes:
        reference_labels: of the reference.
        accuracy: of the reference with them, the mean over seeds; what is to be reached.
        labels: of the method; infinite where it does not reach the accuracy.
        ratio: how many times fewer they are; 0 where the accuracy is not reached, below 1 where they are more.
        low: lower end of the 95 % interval; 0 where the accuracy may well not be reached.
        high: upper end of the interval.
        reached: share of the draws of seeds in which the accuracy is reached.
        at_least: whether the fewest labels tried are enough, so that fewer may be and the ratio may be larger.
    """

    reference_labels: float
    accuracy: float
    labels: float
    ratio: float
    low: float
    high: float
    reached: float
    at_least: bool


def labels_needed(labels: Sequence[float] | np.ndarray, curves: np.ndarray, targets: np.ndarray | float) -> np.ndarray:
    """With how many labels curves first come up to an accuracy.

    Args:
        labels: those tried, ``[numbers]``, rising.
        curves: accuracies, ``[..., numbers]``.
        targets: what is to be reached, ``[...]``.

    Returns:
        float ``[...]``: the first of ``labels`` where it is enough, infinity where none is.

    Raises:
        UserError: labels that do not rise or are not positive, or curves with another number of points.
    """
    labels, curves = np.asarray(labels, np.float64), np.asarray(curves, np.float64)
    if labels.ndim != 1 or not labels.size or labels[0] <= 0 or (np.diff(labels) <= 0).any():
        raise UserError(f"numbers of labels are positive and rise; given {labels.tolist()}")
    if curves.shape[-1:] != labels.shape:
        raise UserError(f"a curve has one accuracy for each of {len(labels)} numbers of labels; given {curves.shape}")
    targets = np.broadcast_to(np.asarray(targets, np.float64), curves.shape[:-1])
    enough = curves >= targets[..., None]
    first = enough.argmax(-1)  # 0 also where none is
    before = np.maximum(first - 1, 0)
    here, there = (np.take_along_axis(curves, place[..., None], -1)[..., 0] for place in (before, first))
    rise = np.where(there > here, there - here, 1.0)
    share = np.where(first > 0, (targets - here) / rise, 0.0)
    found = np.exp(np.log(labels[before]) + share * (np.log(labels[first]) - np.log(labels[before])))
    # On a point itself its number of labels is exact, as rounding of the logarithm is not.
    found = np.where(there == targets, labels[first], found)
    return np.where(enough.any(-1), np.where(first == 0, labels[0], found), np.inf)


def label_ratio(
    labels: Sequence[float] | np.ndarray, method: np.ndarray, reference: np.ndarray, at: int = -1, seed: int = 0
) -> LabelRatio:
    """How many times fewer labels a method needs than a reference for the same accuracy.

    Args:
        labels: those tried, ``[numbers]``, rising, the same for both.
        method: accuracies ``[seeds, numbers]``.
        reference: accuracies of the reference, the same shape with the same seeds.
        at: which of the reference's points is to be matched; the last one if not said.
        seed: of the bootstrap's random numbers.

    Raises:
        UserError: shapes that differ, or as :func:`labels_needed`.
    """
    labels, method, reference = (np.asarray(given, np.float64) for given in (labels, method, reference))
    if method.ndim != 2 or method.shape != reference.shape:
        raise UserError(
            f"both methods have accuracies [seeds, numbers of labels] of the same seeds; given {method.shape} and "
            f"{reference.shape}"
        )
    seeds, spent = len(method), float(labels[at])
    weights = np.random.default_rng(seed).multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds
    needed = labels_needed(labels, weights @ method, (weights @ reference)[:, at])  # [resamples]
    # Not between draws: halfway from reached to not reached there is nothing.
    low, high = np.quantile(spent / needed, [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2], method="inverted_cdf")
    accuracy = float(reference.mean(0)[at])
    needs = float(labels_needed(labels, method.mean(0), accuracy))
    return LabelRatio(
        reference_labels=spent,
        accuracy=accuracy,
        labels=needs,
        ratio=spent / needs,
        low=float(low),
        high=float(high),
        reached=float(np.isfinite(needed).mean()),
        at_least=bool(needs == labels[0]),
    )
