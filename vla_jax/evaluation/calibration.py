"""How good a classifier is, class by class, and whether its confidence is its accuracy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vla_jax.errors import UserError
from vla_jax.evaluation import statistics
from vla_jax.evaluation.statistics import Interval

BINS = 15
"""Bins of the calibration error, as in Guo et al. 2017."""


@dataclass(frozen=True)
class Bins:
    """Predictions by their confidence, in bins of equal width; the n-th is (n / bins, (n + 1) / bins].

    Attributes:
        count: int64 ``[bins]``, predictions in each.
        confidence: float64 ``[bins]``, their mean; NaN in an empty bin.
        accuracy: float64 ``[bins]``, the share of them that is right; NaN in an empty bin.
        error: the mean difference of confidence and accuracy, weighted by count.
    """

    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    error: float


@dataclass(frozen=True)
class Classified:
    """Fractions of one.

    Attributes:
        top_1: how often the likeliest class is right, with its interval.
        top_5: how often the right class is among the five likeliest, with its interval.
        by_class: float64 ``[classes]``, how often the likeliest class is right for examples of each; NaN where there
            are none.
        class_mean: the mean of these over classes with examples: what sets of unequal classes are judged by.
        calibration: by confidence.
    """

    top_1: Interval
    top_5: Interval
    by_class: np.ndarray
    class_mean: float
    calibration: Bins


def evaluate(scores: np.ndarray, labels: np.ndarray, *, probabilities: bool = False) -> Classified:
    """Judges a classifier's scores; equal scores count against it.

    Args:
        scores: float ``[examples, classes]``: logits, or probabilities. Cosines must be multiplied with the model's
            scale first, or their confidence means nothing.
        labels: int ``[examples]``, from 0.
        probabilities: whether the scores are probabilities already.

    Raises:
        UserError: for shapes that do not fit, no example, a label that names no class, scores that are NaN, or
            probabilities that do not add up to one.
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or not len(labels) or scores.shape[1] < 2:
        raise UserError(
            f"scores are [examples, classes] and labels [examples]; given {scores.shape} and {labels.shape}"
        )
    if (labels < 0).any() or (labels >= scores.shape[1]).any():
        row = int(np.argmax((labels < 0) | (labels >= scores.shape[1])))
        raise UserError(f"label {labels[row]} in row {row} names no class; there are labels 0 to {scores.shape[1] - 1}")
    if np.isnan(scores).any():
        raise UserError(f"{int(np.isnan(scores).any(1).sum())} of {len(scores)} rows of scores hold NaN")
    if probabilities and not np.allclose(scores.sum(1), 1, rtol=0, atol=1e-3):
        raise UserError("probabilities of an example must add up to one; leave out probabilities=True for logits")
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    before = (scores >= own).sum(1) - 1  # [examples]
    right = before == 0
    by_class = _mean_by(labels, right, scores.shape[1])
    if not probabilities:
        scores = np.exp(scores - scores.max(1, keepdims=True))
        scores /= scores.sum(1, keepdims=True)
    return Classified(
        top_1=statistics.accuracy(right),
        top_5=statistics.accuracy(before < 5),
        by_class=by_class,
        class_mean=float(np.nanmean(by_class)),
        calibration=calibration(scores.max(1), right),
    )


def calibration(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> Bins:
    """The expected calibration error (Naeini et al. 2015; Guo et al. 2017, equation 3).

    Args:
        confidence: float ``[examples]``, the probability of the predicted class.
        correct: bool ``[examples]``, whether it is right.
        bins: number of bins.

    Raises:
        UserError: for shapes that differ, no example, no bin, or a confidence outside 0 to 1.
    """
    confidence, correct = np.asarray(confidence, np.float64), np.asarray(correct, bool)
    if confidence.shape != correct.shape or confidence.ndim != 1 or not confidence.size or bins < 1:
        raise UserError(
            f"calibration needs one confidence and one outcome an example, and a bin; given {confidence.shape}, "
            f"{correct.shape} and {bins} bins"
        )
    # A softmax in float32 may leave 1 by a rounding.
    if not ((confidence >= 0) & (confidence <= 1 + 1e-5)).all():
        raise UserError("confidences are probabilities, from 0 to 1")
    edges = np.arange(1, bins) / bins
    member = np.searchsorted(edges, confidence, side="left")  # a confidence on an edge belongs below it
    count = np.bincount(member, minlength=bins)
    means, accuracies = _mean_by(member, confidence, bins), _mean_by(member, correct, bins)
    error = float(np.nansum(count * np.abs(means - accuracies)) / len(confidence))
    return Bins(count, means, accuracies, error)


def _mean_by(member: np.ndarray, values: np.ndarray, groups: int) -> np.ndarray:
    """The mean of each group's values, float64 [groups]; NaN for a group without any."""
    count = np.bincount(member, minlength=groups)
    sums = np.bincount(member, np.asarray(values, np.float64), minlength=groups)
    return np.divide(sums, count, out=np.full(groups, np.nan), where=count > 0)
