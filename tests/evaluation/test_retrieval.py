from __future__ import annotations

import numpy as np
import pytest

from vla_jax.errors import UserError
from vla_jax.evaluation import retrieval
from vla_jax.evaluation.statistics import wilson


def brute_force(similarity, k):
    hits = 0
    for query, row in enumerate(similarity):
        others = [score for candidate, score in enumerate(row) if candidate != query]
        hits += sum(score >= row[query] for score in others) < k
    return hits


@pytest.mark.parametrize("values", [1000, 4])
def test_recall_equals_counting_by_hand(values):
    """With four values most scores are tied."""
    similarity = np.random.default_rng(0).integers(0, values, (23, 23)) + 0.3 * values * np.eye(23)
    found = retrieval.recall(similarity, at=(1, 5, 10))
    for k in (1, 5, 10):
        assert found.image_to_text[k] == wilson(brute_force(similarity, k), 23)
        assert found.text_to_image[k] == wilson(brute_force(similarity.T, k), 23)


def test_directions_are_not_mixed_up():
    similarity = np.array([[2.0, 1.0, 1.0], [3.0, 4.0, 1.0], [0.0, 0.0, 0.5]])
    found = retrieval.recall(similarity, at=(1,))
    assert found.image_to_text[1].value == 1
    assert found.text_to_image[1].value == pytest.approx(1 / 3)


def test_a_constant_model_finds_nothing_before_every_candidate_counts():
    found = retrieval.recall(np.zeros((12, 12)), at=(1, 11, 12))
    assert [found.image_to_text[k].value for k in (1, 11, 12)] == [0, 0, 1]


def test_ranks_of_random_scores_are_uniform():
    ranks = retrieval.ranks(np.random.default_rng(0).random((4000, 8, 8)))
    assert ranks.shape == (4000, 8)
    np.testing.assert_allclose(np.bincount(ranks.ravel(), minlength=8) / ranks.size, 1 / 8, rtol=0, atol=0.01)


def test_seeds_are_averaged():
    perfect, useless = np.eye(10), np.zeros((10, 10))
    found = retrieval.recall(np.stack([perfect, useless]), at=(1,)).image_to_text[1]
    assert found.value == 0.5
    assert found.low < 0.5 < found.high


@pytest.mark.parametrize(
    ("similarity", "at", "message"),
    [
        (np.zeros((3, 4)), (1,), r"\[n, n\]"),
        (np.full((3, 3), np.nan), (1,), "9 similarities are NaN"),
        (np.eye(3), (5,), "between 1 and 3"),
        (np.eye(3), (0,), "between 1 and 3"),
    ],
)
def test_what_cannot_be_ranked_is_refused(similarity, at, message):
    with pytest.raises(UserError, match=message):
        retrieval.recall(similarity, at=at)
