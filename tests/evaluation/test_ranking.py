"""The best candidates against a whole sort, the approximate index against the exact one, and the second stage."""

from __future__ import annotations

import builtins

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from vla_jax.errors import UserError
from vla_jax.evaluation.exact_ranks import Before
from vla_jax.evaluation.ranking import approximate_top, exact_top, rerank
from vla_jax.evaluation.retrieval import judge


def drawn(count, seed):
    return np.random.default_rng(seed).standard_normal((count, 12)).astype(np.float32)


@pytest.mark.parametrize("k", [1, 4, 50])
def test_the_best_are_those_of_a_whole_sort(k):
    queries, candidates = drawn(23, 0), drawn(50, 1)
    places, scores = exact_top(queries, candidates, k, block=(5, 7))
    expected = np.argsort(-(queries.astype(np.float64) @ candidates.T), axis=1)[:, :k]
    np.testing.assert_array_equal(places, expected)
    np.testing.assert_allclose(scores, np.take_along_axis(queries @ candidates.T, expected, axis=1), rtol=1e-4)


@pytest.mark.parametrize("index", ["Flat", "HNSW16", "IVF4,Flat"])
def test_an_approximate_index_finds_most_of_the_best(index):
    pytest.importorskip("faiss")
    queries, candidates = drawn(40, 0), drawn(300, 1)
    places, scores = approximate_top(queries, candidates, 10, index=index)
    expected, exact = exact_top(queries, candidates, 10)
    shared = np.mean([len(set(a) & set(b)) for a, b in zip(places.tolist(), expected.tolist(), strict=True)])
    assert shared == 10 if index == "Flat" else shared > 3
    found = places >= 0
    products = np.einsum("qw,qkw->qk", queries, candidates[places])
    np.testing.assert_allclose(scores[found], products[found], rtol=1e-4, atol=1e-5)
    assert np.isneginf(scores[~found]).all()
    if index == "Flat":
        np.testing.assert_allclose(scores, exact, rtol=1e-4)


def test_an_unknown_index_is_refused():
    pytest.importorskip("faiss")
    with pytest.raises(UserError, match="cannot make the index 'nonsense'"):
        approximate_top(drawn(3, 0), drawn(20, 1), 2, index="nonsense")


def test_without_faiss_the_message_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def missing(name, *rest):
        if name == "faiss":
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match="pip install faiss-cpu"):
        approximate_top(drawn(3, 0), drawn(20, 1), 2)


def test_a_perfect_second_stage_puts_the_right_one_first_where_it_is_among_the_best():
    queries, candidates = drawn(30, 0), drawn(60, 1)
    truth = np.random.default_rng(2).integers(0, 60, 30)
    scores = queries @ candidates.T
    before = (scores >= scores[np.arange(30), truth][:, None]).sum(1) - 1
    top, _ = exact_top(queries, candidates, 8)
    after = rerank(before, top, top == truth[:, None], lambda q, c: (truth[q] == c).astype(float))
    np.testing.assert_array_equal(after, np.where(before < 8, 0, before))
    assert (before < 8).any()
    assert (before >= 8).any()


def test_the_first_stages_own_scores_change_nothing():
    queries, candidates = drawn(30, 0), drawn(60, 1)
    truth = np.random.default_rng(2).integers(0, 60, 30)
    scores = queries @ candidates.T
    before = (scores >= scores[np.arange(30), truth][:, None]).sum(1) - 1
    top, _ = exact_top(queries, candidates, 20)
    np.testing.assert_array_equal(rerank(before, top, top == truth[:, None], lambda q, c: scores[q, c]), before)


def test_ties_stand_before_the_right_one_and_other_right_ones_do_not_count():
    top = np.array([[4, 2, 7, 1], [3, 5, -1, -1]])
    right = np.array([[False, True, True, False], [False, True, False, False]])
    asked = []

    def score(queries, candidates):
        asked.extend(zip(queries.tolist(), candidates.tolist(), strict=True))
        return np.array([{4: 1.0, 2: 1.0, 7: 0.5, 1: 2.0, 3: 0.0, 5: 3.0}[c] for c in candidates.tolist()])

    np.testing.assert_array_equal(rerank(np.array([1, 1]), top, right, score), [2, 0])
    assert (1, -1) not in asked


def test_several_right_candidates_are_followed_each_and_give_mean_average_precision():
    generator = np.random.default_rng(3)
    owner = generator.permutation(np.repeat(np.arange(12), 3))  # which query each of 36 candidates belongs to
    first, second = generator.standard_normal((2, 12, 36))
    at_first = counted(first, owner)
    top = np.argsort(-first, axis=1)[:, :10]
    right = owner[top] == np.arange(12)[:, None]
    found = rerank(at_first, top, right, lambda q, c: second[q, c])
    # The whole order afterwards: the best of the first stage by the second, then the others as they were.
    order = np.full((12, 36), -np.inf)
    np.put_along_axis(order, top, 1000 + np.take_along_axis(second, top, axis=1), axis=1)
    order = np.where(np.isneginf(order), first, order)
    np.testing.assert_array_equal(found, counted(order, owner))
    np.testing.assert_array_equal(rerank(at_first[:, 0], top, right, lambda q, c: second[q, c]), found[:, 0])
    assert (right.sum(1) > 1).any()
    assert not right.any(1).all()

    of_texts = np.array([0] * 36)
    judged = judge(Before(found, of_texts), owner, at=(1,)).image_to_text
    expected = [average_precision_score(owner == query, order[query]) for query in range(12)]
    assert judged.mean_average_precision == pytest.approx(np.mean(expected))


def counted(scores, owner):
    """Wrong candidates before each right one, the best first."""
    rows = [[(scores[q][owner != q] >= s).sum() for s in -np.sort(-scores[q][owner == q])] for q in range(len(scores))]
    return np.array(rows)


def test_queries_without_a_right_one_among_the_best_are_not_scored():
    def never(queries, candidates):
        assert len(queries) == len(candidates) == 0
        return np.zeros(0)

    found = rerank(np.array([9]), np.array([[1, 2]]), np.array([[False, False]]), never)
    np.testing.assert_array_equal(found, [9])


def test_mistakes_are_named():
    with pytest.raises(UserError, match="k must lie between 1 and 5"):
        exact_top(drawn(3, 0), drawn(5, 1), 6)
    with pytest.raises(UserError, match="query 0 has 2 right candidates among its best and 1 in all"):
        rerank(np.array([[0, -1]]), np.array([[1, 2]]), np.array([[True, True]]), None)
    with pytest.raises(UserError, match="width 12 and candidates of 4"):
        exact_top(drawn(3, 0), np.ones((5, 4)), 2)
    with pytest.raises(UserError, match="none of them NaN"):
        rerank(np.array([0]), np.array([[1, 2]]), np.array([[True, False]]), lambda q, c: np.full(2, np.nan))
    with pytest.raises(UserError, match="re-ranking needs"):
        rerank(np.array([0, 1]), np.array([[1, 2]]), np.array([[True, False]]), None)
