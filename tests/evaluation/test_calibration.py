"""Accuracies against scikit-learn, and the calibration error against a loop over bins."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics

from vla_jax.errors import UserError
from vla_jax.evaluation import calibration
from vla_jax.evaluation.statistics import wilson


def drawn(examples=400, classes=7, seed=0):
    generator = np.random.default_rng(seed)
    labels = generator.choice(classes - 1, examples, p=np.arange(1, classes) / np.arange(1, classes).sum())
    logits = generator.normal(0, 2, (examples, classes))
    logits[np.arange(examples), labels] += 1.5
    return logits, labels


def softmax(logits):
    powers = np.exp(logits)
    return powers / powers.sum(1, keepdims=True)


def test_accuracies_are_those_of_scikit_learn():
    logits, labels = drawn()
    found = calibration.evaluate(logits, labels)
    assert found.top_1 == wilson(int((logits.argmax(1) == labels).sum()), len(labels))
    top_5 = metrics.top_k_accuracy_score(labels, logits, k=5, labels=np.arange(7))
    assert found.top_5.value == pytest.approx(top_5)
    recalls = metrics.recall_score(labels, logits.argmax(1), labels=np.arange(6), average=None)
    assert found.class_mean == pytest.approx(recalls.mean())
    np.testing.assert_allclose(found.by_class[:6], recalls)
    assert np.isnan(found.by_class[6])  # the last class has no example


def by_hand(confidence, right, bins=15):
    total = 0.0
    for place in range(bins):
        low, high = place / bins, (place + 1) / bins
        inside = [i for i, c in enumerate(confidence) if (low < c <= high) or (place == 0 and c == 0)]
        if inside:
            gap = abs(np.mean([confidence[i] for i in inside]) - np.mean([right[i] for i in inside]))
            total += len(inside) / len(confidence) * gap
    return total


def test_the_calibration_error_is_that_of_a_loop_over_bins():
    logits, labels = drawn()
    found = calibration.evaluate(logits, labels).calibration
    probabilities = softmax(logits)
    assert found.error == pytest.approx(by_hand(probabilities.max(1), probabilities.argmax(1) == labels))
    given = calibration.evaluate(probabilities, labels, probabilities=True).calibration
    assert given.error == pytest.approx(found.error)
    assert found.count.sum() == len(labels)


def test_a_confidence_on_an_edge_belongs_to_the_bin_below():
    found = calibration.calibration(np.array([0.0, 0.5, 0.51, 1.0]), np.array([0, 1, 1, 1], bool), bins=2)
    np.testing.assert_array_equal(found.count, [2, 2])
    assert found.error == pytest.approx((2 * abs(0.25 - 0.5) + 2 * abs(0.755 - 1)) / 4)


def test_certainty_that_is_always_wrong_is_the_worst():
    assert calibration.calibration(np.ones(9), np.zeros(9, bool)).error == 1
    found = calibration.calibration(np.ones(9), np.ones(9, bool))
    assert found.error == 0
    assert np.isnan(found.accuracy[:14]).all()


def test_equal_scores_count_against_the_model():
    found = calibration.evaluate(np.zeros((4, 6)), np.array([0, 1, 2, 3]))
    assert (found.top_1.value, found.top_5.value) == (0, 0)


@pytest.mark.parametrize(
    ("scores", "labels", "settings", "message"),
    [
        (np.zeros((3, 4)), [0, 1], {}, r"labels \[examples\]"),
        (np.zeros((3, 4)), [0, 1, 4], {}, "label 4 in row 2 names no class"),
        (np.full((3, 4), np.nan), [0, 1, 2], {}, "3 of 3 rows of scores hold NaN"),
        (np.ones((3, 4)), [0, 1, 2], {"probabilities": True}, "add up to one"),
    ],
)
def test_scores_that_cannot_be_judged_are_refused(scores, labels, settings, message):
    with pytest.raises(UserError, match=message):
        calibration.evaluate(scores, np.array(labels), **settings)


def test_confidences_that_are_no_probabilities_are_refused():
    with pytest.raises(UserError, match="from 0 to 1"):
        calibration.calibration(np.array([1.2]), np.array([True]))
