"""Means over tasks against literal resampling, and against the statistics of a single task."""

from __future__ import annotations

import numpy as np
import pytest

from vla_jax.errors import UserError
from vla_jax.evaluation.statistics import bootstrap_accuracy, paired_difference
from vla_jax.evaluation.task_means import mean_accuracy, mean_difference

SIZES = (40, 120, 75)


def drawn(seeds: int, rate: float, seed: int) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.random((seeds, size)) < rate + 0.1 * task for task, size in enumerate(SIZES)]


def test_one_task_has_the_interval_of_its_accuracy_and_of_its_difference():
    (a, *_), (b, *_) = drawn(3, 0.6, 0), drawn(3, 0.5, 1)
    assert mean_accuracy([a]) == bootstrap_accuracy(a)
    expected = paired_difference(a, b)
    found = mean_difference([a], [b])
    assert (found.value, found.low, found.high) == (expected.value, expected.low, expected.high)


def test_every_task_counts_the_same_and_examples_are_drawn_within_it():
    correct, other = drawn(1, 0.4, 0), drawn(1, 0.6, 1)
    generator = np.random.default_rng(9)
    means, differences = [], []
    for _ in range(8_000):
        places = [generator.integers(0, size, size) for size in SIZES]
        a, b = ([task[0, own].mean() for task, own in zip(given, places, strict=True)] for given in (correct, other))
        means.append(np.mean(a))
        differences.append(np.mean(a) - np.mean(b))
    found, apart = mean_accuracy(correct), mean_difference(correct, other)
    assert found.value == pytest.approx(np.mean([task.mean() for task in correct]))
    assert apart.value == pytest.approx(found.value - mean_accuracy(other).value)
    for interval, literal in ((found, means), (apart, differences)):
        np.testing.assert_allclose(
            [interval.low, interval.high], np.quantile(literal, [0.025, 0.975]), rtol=0, atol=0.006
        )


def test_a_seed_that_is_bad_at_every_task_is_drawn_for_all_of_them():
    good, bad = np.ones((1, 200), bool), np.zeros((1, 200), bool)
    together = [np.concatenate([good, good, bad])] * 2
    apart = [np.concatenate([good, good, bad]), np.concatenate([bad, good, good])]
    wide, narrow = mean_accuracy(together), mean_accuracy(apart)
    assert wide.value == narrow.value == pytest.approx(2 / 3)
    assert wide.high - wide.low > 1.2 * (narrow.high - narrow.low)


def test_copies_named_as_clusters_add_no_certainty():
    correct = drawn(1, 0.5, 2)
    copied = [np.repeat(task, 4, axis=1) for task in correct]
    clusters = [np.repeat(np.arange(size), 4) for size in SIZES]
    single, known, ignored = mean_accuracy(correct), mean_accuracy(copied, clusters), mean_accuracy(copied)
    assert (known.low, known.high) == pytest.approx((single.low, single.high))
    assert ignored.high - ignored.low < 0.7 * (known.high - known.low)


def test_what_has_no_mean_is_refused():
    with pytest.raises(UserError, match="at least one task"):
        mean_accuracy([])
    with pytest.raises(UserError, match="given 1, 2 seeds"):
        mean_accuracy([np.ones((1, 4), bool), np.ones((2, 4), bool)])
    with pytest.raises(UserError, match=r"\[\[1, 4\]\] and \[\[1, 5\]\]"):
        mean_difference([np.ones(4, bool)], [np.ones(5, bool)])
