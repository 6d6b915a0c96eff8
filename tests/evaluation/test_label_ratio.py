"""Labels needed for an accuracy: by hand, by NumPy's interpolation, and the interval by all draws of seeds."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from vla_jax.errors import UserError
from vla_jax.evaluation.label_ratio import label_ratio, labels_needed

LABELS = (1, 4, 16, 64, 256)


@pytest.mark.parametrize(
    ("accuracy", "expected"),
    [
        (0.6, 16),  # a point itself
        (0.5, 8),  # half of the way, the geometric mean
        (0.25, math.sqrt(2)),
        (0.2, 1),
        (0.1, 1),  # below the first point: not fewer than were tried
        (0.9, 256),
        (0.91, math.inf),
    ],
)
def test_labels_by_hand(accuracy, expected):
    assert labels_needed(LABELS, [0.2, 0.4, 0.6, 0.8, 0.9], accuracy) == pytest.approx(expected)


def test_a_curve_that_falls_again_is_read_where_it_first_comes_up():
    assert labels_needed(LABELS, [0.2, 0.6, 0.3, 0.5, 0.9], 0.5) == pytest.approx(4**0.75)


def test_many_curves_at_once_are_numpys_interpolation():
    generator = np.random.default_rng(0)
    curves = np.sort(generator.random((30, 5)), axis=1)
    targets = curves[:, 0] + generator.random(30) * (curves[:, -1] - curves[:, 0])
    found = labels_needed(LABELS, curves, targets)
    for curve, target, labels in zip(curves, targets, found, strict=True):
        assert np.log(labels) == pytest.approx(np.interp(target, curve, np.log(LABELS)))


def test_the_ratio_of_a_method_with_itself_is_one():
    curves = np.sort(np.random.default_rng(1).random((5, 5)), axis=1)
    found = label_ratio(LABELS, curves, curves)
    assert (found.ratio, found.low, found.high, found.labels, found.reached) == (1, 1, 1, 256, 1)
    assert not found.at_least


def test_the_interval_is_that_of_all_draws_of_seeds():
    generator = np.random.default_rng(2)
    spread = 0.03 * generator.standard_normal((3, 5))
    method = np.array([0.3, 0.5, 0.7, 0.8, 0.85]) + spread
    full = np.array([0.2, 0.3, 0.4, 0.6, 0.78]) - spread[::-1]
    found = label_ratio(LABELS, method, full)
    ratios = []
    for seeds in itertools.product(range(3), repeat=3):  # all equally likely
        curve, target = method[list(seeds)].mean(0), full[list(seeds), -1].mean()
        ratios.append(256 / np.exp(np.interp(target, curve, np.log(LABELS))))
    ratios = np.sort(ratios)
    # One draw in 27 is 3.7 %: the lowest and the highest ratio are the interval's ends.
    assert (found.low, found.high) == (pytest.approx(ratios[0]), pytest.approx(ratios[-1]))
    mean = np.exp(np.interp(full[:, -1].mean(), method.mean(0), np.log(LABELS)))
    assert (found.labels, found.ratio) == (pytest.approx(mean), pytest.approx(256 / mean))
    assert found.accuracy == pytest.approx(full[:, -1].mean())
    # Other points of the reference ask for less.
    earlier = label_ratio(LABELS, method, full, at=3)
    assert (earlier.reference_labels, earlier.accuracy) == (64, pytest.approx(full[:, 3].mean()))
    assert earlier.labels < found.labels


def test_what_is_not_reached_has_no_number_of_labels_and_the_interval_says_so():
    method = np.tile([0.2, 0.4, 0.6, 0.7, 0.8], (4, 1))
    never = label_ratio(LABELS, method, method + 0.1)
    assert (never.labels, never.ratio, never.low, never.high, never.reached) == (math.inf, 0, 0, 0, 0)
    # Reached on the mean, but not whenever the seed that is best does not come.
    method[0, -1] = 1.3
    sometimes = label_ratio(LABELS, method, np.tile([0.2, 0.4, 0.6, 0.7, 0.9], (4, 1)))
    assert (sometimes.low, sometimes.labels) == (0, pytest.approx(256 ** (3 / 4) * 256 ** (1 / 4 * 0.2 / 0.225)))
    assert sometimes.reached == pytest.approx(1 - 0.75**4, abs=0.02)  # it is enough that it comes once: 0.8 + 0.125


def test_the_fewest_labels_may_be_more_than_enough():
    method = np.tile([0.9, 0.9, 0.9, 0.9, 0.9], (2, 1))
    found = label_ratio(LABELS, method, method - 0.2)
    assert (found.at_least, found.labels, found.ratio) == (True, 1, 256)


@pytest.mark.parametrize(
    ("labels", "method", "message"),
    [
        ((4, 1), np.zeros((2, 2)), "positive and rise"),
        ((0, 1), np.zeros((2, 2)), "positive and rise"),
        ((1, 4, 16), np.zeros((2, 2)), "one accuracy for each of 3"),
        ((1, 4), np.zeros((3, 2)), "of the same seeds"),
    ],
)
def test_what_does_not_fit_is_refused(labels, method, message):
    with pytest.raises(UserError, match=message):
        label_ratio(labels, method, np.zeros((2, 2)))
