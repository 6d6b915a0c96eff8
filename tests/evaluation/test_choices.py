from __future__ import annotations

import numpy as np
import pytest

from vla_jax.errors import UserError
from vla_jax.evaluation import choices, statistics


def test_right_is_strictly_above_all_others_and_ties_are_apart():
    scores = np.array([[3, 1, 2], [3, 3, 2], [1, 2, 3], [0, 0, 0], [2, 2, 3]])
    right, tied = choices.judge(scores, 0)
    assert right.tolist() == [True, False, False, False, False]
    assert tied.tolist() == [False, True, False, True, False]
    right, tied = choices.judge(scores, 2)
    assert right.tolist() == [False, False, True, False, True]
    assert tied.tolist() == [False, False, False, True, False]


def test_judging_equals_the_literal_rule():
    scores = np.random.default_rng(0).integers(0, 4, (2, 800, 5)).astype(float)
    right, tied = choices.judge(scores, 1)
    for seed in range(2):
        for example, row in enumerate(scores[seed].tolist()):
            others = row[:1] + row[2:]
            assert right[seed, example] == all(row[1] > other for other in others)
            assert tied[seed, example] == (row[1] == max(others))


def test_accuracy_draws_pictures_and_counts_ties():
    scores = np.array([[1.0, 0.0]] * 30 + [[0.0, 0.0]] * 10)
    found = choices.evaluate(scores, 0)
    assert (found.accuracy, found.ties, found.examples) == (statistics.wilson(30, 40), 0.25, 40)
    pictures = np.repeat(np.arange(10), 4)
    by_picture = choices.evaluate(scores, 0, pictures).accuracy
    assert by_picture.high - by_picture.low > found.accuracy.high - found.accuracy.low
    assert by_picture == statistics.accuracy(scores[:, 0] > 0, pictures)


def test_groups_are_judged_apart():
    scores = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    found = choices.evaluate_groups(scores, 0, {"first": np.array([0, 1]), "last": np.array([2])}, ["p", "q", "p"])
    assert [part.accuracy.value for part in found.values()] == [0.5, 1.0]


def test_models_are_compared_on_the_same_examples():
    a, b = np.array([[1.0, 0.0]] * 9 + [[0.0, 1.0]]), np.array([[0.0, 1.0]] * 10)
    found = choices.compare(a, b, 0)
    assert (found.value, found.wins, found.losses) == (pytest.approx(0.9), 9, 0)
    assert found.p_value == pytest.approx(2 / 2**9)


@pytest.mark.parametrize(
    ("scores", "right", "message"),
    [
        (np.zeros((3, 1)), 0, "two or more captions"),
        (np.zeros((3, 2)), 2, "the right one at 2"),
        (np.full((3, 2), np.nan), 0, "6 of 6 scores are NaN"),
    ],
)
def test_scores_that_cannot_be_judged_are_refused(scores, right, message):
    with pytest.raises(UserError, match=message):
        choices.judge(scores, right)
