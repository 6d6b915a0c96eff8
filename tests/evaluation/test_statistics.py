from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from vla_jax.errors import UserError
from vla_jax.evaluation import statistics


@pytest.mark.parametrize(("successes", "total"), [(0, 7), (1, 7), (7, 7), (32, 400), (123, 400), (399, 400)])
def test_wilson_is_scipys(successes, total):
    expected = stats.binomtest(successes, total).proportion_ci(0.95, method="wilson")
    found = statistics.wilson(successes, total)
    assert found.value == successes / total
    np.testing.assert_allclose([found.low, found.high], [expected.low, expected.high], rtol=0, atol=1e-12)


def test_wilson_of_winogrounds_group_score_is_five_points_wide():
    found = statistics.wilson(32, 400)
    assert (found.low, found.high) == (pytest.approx(0.0572, abs=1e-4), pytest.approx(0.1108, abs=1e-4))


@pytest.mark.parametrize(("successes", "total"), [(0, 0), (-1, 4), (5, 4)])
def test_wilson_refuses_impossible_counts(successes, total):
    with pytest.raises(UserError, match="successes"):
        statistics.wilson(successes, total)


def test_mean_interval_is_scipys():
    values = [0.61, 0.64, 0.60]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = statistics.mean_interval(values)
    np.testing.assert_allclose(
        [found.value, found.low, found.high], [np.mean(values), expected.low, expected.high], rtol=1e-12
    )


def test_mean_interval_needs_two_finite_seeds():
    with pytest.raises(UserError, match="two or more seeds"):
        statistics.mean_interval([0.5])
    with pytest.raises(UserError, match="finite"):
        statistics.mean_interval([0.5, float("nan")])


def test_accuracy_of_one_seed_is_wilson():
    correct = np.arange(50) < 31
    assert statistics.accuracy(correct) == statistics.accuracy(correct[None]) == statistics.wilson(31, 50)


def test_unanimous_seeds_keep_the_width_of_their_examples():
    assert statistics.accuracy(np.ones((3, 40), bool)) == statistics.wilson(40, 40)
    assert statistics.accuracy(np.zeros((3, 40), bool)) == statistics.wilson(0, 40)


def test_bootstrap_is_that_of_literally_drawn_seeds_and_examples():
    """Counting equal patterns must have the distribution of drawing positions one at a time."""
    generator = np.random.default_rng(5)
    correct = (generator.random((3, 60)) < generator.random(60)) & (generator.random((3, 60)) < 0.9)
    estimates = []
    for _ in range(20_000):
        examples = generator.integers(0, 60, 60)
        weights = np.bincount(generator.integers(0, 3, 3), minlength=3) / 3
        weights = 1 / 3 + np.sqrt(3 / 2) * (weights - 1 / 3)
        estimates.append(weights @ correct[:, examples].mean(1))
    found = statistics.accuracy(correct)
    assert found.value == pytest.approx(correct.mean())
    # Quantiles of 10,000 and 20,000 draws: their standard errors are below 0.0015.
    np.testing.assert_allclose([found.low, found.high], np.quantile(estimates, [0.025, 0.975]), rtol=0, atol=0.006)


def test_copies_of_examples_add_no_certainty_when_named_as_clusters():
    generator = np.random.default_rng(2)
    correct = generator.random((2, 80)) < 0.7
    single = statistics.accuracy(correct)
    copied = statistics.accuracy(np.repeat(correct, 5, axis=1), clusters=np.repeat(np.arange(80), 5))
    assert (copied.value, copied.low, copied.high) == pytest.approx((single.value, single.low, single.high))
    ignored = statistics.accuracy(np.repeat(correct, 5, axis=1))
    assert ignored.high - ignored.low < copied.high - copied.low


@pytest.mark.parametrize(("seed_spread", "least", "most"), [(0.0, 0.93, 1.0), (1.0, 0.76, 0.92)])
def test_coverage_is_as_documented(monkeypatch, seed_spread, least, most):
    monkeypatch.setattr(statistics, "RESAMPLES", 600)
    generator = np.random.default_rng(0)
    example_spread = 2.0 - 1.9 * seed_spread

    def outcomes(seeds, examples):
        logits = 0.8 + seed_spread * generator.normal(size=(seeds, 1))
        logits = logits + example_spread * generator.normal(size=(1, examples))
        return generator.random((seeds, examples)) < 1 / (1 + np.exp(-logits))

    truth = np.mean([outcomes(50, 50).mean() for _ in range(400)])
    trials = [statistics.accuracy(outcomes(3, 300), seed=trial) for trial in range(300)]
    assert least < np.mean([trial.low <= truth <= trial.high for trial in trials]) < most


def test_paired_difference_of_one_seed_is_mcnemars_exact_test():
    generator = np.random.default_rng(1)
    a, b = generator.random(200) < 0.7, generator.random(200) < 0.6
    found = statistics.paired_difference(a, b)
    wins, losses = int((a & ~b).sum()), int((~a & b).sum())
    assert (found.wins, found.losses) == (wins, losses)
    assert found.value == pytest.approx(a.mean() - b.mean())
    assert found.p_value == pytest.approx(stats.binomtest(wins, wins + losses, 0.5).pvalue, rel=1e-9)


def test_sign_flip_test_of_seeds_equals_all_flips_by_hand():
    generator = np.random.default_rng(3)
    a, b = generator.random((3, 10)) < 0.8, generator.random((3, 10)) < 0.4
    by_example = a.sum(0) - b.sum(0).astype(int)
    flipped = [abs(np.dot(signs, by_example)) for signs in itertools.product((-1, 1), repeat=10)]
    expected = np.mean(np.asarray(flipped) >= abs(by_example.sum()))
    assert 0 < expected < 1
    assert statistics.paired_difference(a, b).p_value == pytest.approx(expected, rel=1e-9)


def test_sign_flips_turn_whole_clusters():
    a, b = np.ones((1, 12), bool), np.zeros((1, 12), bool)
    assert statistics.paired_difference(a, b).p_value == pytest.approx(2 / 2**12)
    assert statistics.paired_difference(a, b, clusters=np.repeat(np.arange(3), 4)).p_value == pytest.approx(2 / 2**3)


def test_paired_interval_is_narrower_than_two_separate_ones_and_changes_sign():
    generator = np.random.default_rng(4)
    base = generator.random((3, 500)) < np.clip(generator.normal(0.6, 0.5, 500), 0, 1)
    better = base | (generator.random((3, 500)) < 0.1)
    found, back = statistics.paired_difference(better, base), statistics.paired_difference(base, better)
    assert 0 < found.low < found.value < found.high
    single = statistics.accuracy(base)
    assert found.high - found.low < single.high - single.low
    assert back.value == -found.value
    assert back.p_value == found.p_value
    assert (back.wins, back.losses) == (found.losses, found.wins)
    np.testing.assert_allclose([back.low, back.high], [-found.high, -found.low], rtol=0, atol=0.004)


def test_a_model_does_not_differ_from_itself():
    correct = np.random.default_rng(0).random((3, 50)) < 0.5
    found = statistics.paired_difference(correct, correct)
    assert (found.value, found.low, found.high, found.p_value) == (0, 0, 0, 1)


def test_same_seed_gives_the_same_interval():
    correct = np.random.default_rng(0).random((3, 200)) < 0.5
    assert statistics.accuracy(correct, seed=7) == statistics.accuracy(correct, seed=7)
    assert statistics.accuracy(correct, seed=7) != statistics.accuracy(correct, seed=8)


def test_memory_stays_bounded_where_patterns_are_many(monkeypatch):
    """Cut into chunks or not, the draws have one distribution."""
    correct = np.random.default_rng(0).random((6, 300)) < 0.5
    whole = statistics.accuracy(correct)
    monkeypatch.setattr(statistics, "_CHUNK", 1000)
    cut = statistics.accuracy(correct)
    np.testing.assert_allclose([cut.low, cut.high], [whole.low, whole.high], rtol=0, atol=0.004)


@pytest.mark.parametrize(
    ("correct", "message"),
    [
        (np.zeros((0,)), r"at least one"),
        (np.zeros((1, 2, 3)), r"\[seeds, examples\]"),
        (np.array([0.0, 0.5]), "right or wrong"),
        (np.array([0.0, np.nan]), "right or wrong"),
    ],
)
def test_outcomes_that_are_none_are_refused(correct, message):
    with pytest.raises(UserError, match=message):
        statistics.accuracy(correct)


def test_unequal_models_and_clusters_are_refused():
    with pytest.raises(UserError, match=r"\[2, 5\] and \[3, 5\]"):
        statistics.paired_difference(np.ones((2, 5)), np.ones((3, 5)))
    with pytest.raises(UserError, match="5 examples"):
        statistics.accuracy(np.array([0, 1, 0, 1, 1]), clusters=[1, 2])


def test_bootstrap_of_one_seed_is_scipys_percentile_bootstrap():
    correct = np.arange(400) < 123
    found = statistics.bootstrap_accuracy(correct)
    drawn = stats.bootstrap((correct,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(0))
    assert found.value == 123 / 400
    # Both are quantiles of 10,000 draws with a step of 1 / 400.
    expected = drawn.confidence_interval
    np.testing.assert_allclose([found.low, found.high], [expected.low, expected.high], rtol=0, atol=0.005)
    assert statistics.bootstrap_accuracy(np.zeros(30, bool)) == statistics.wilson(0, 30)
    seeds = np.random.default_rng(0).random((3, 50)) < 0.5
    assert statistics.bootstrap_accuracy(seeds) == statistics.accuracy(seeds)


def test_class_mean_counts_every_class_the_same_and_leaves_out_small_ones():
    classes = ["a"] * 30 + ["b"] * 10 + ["c"] * 3
    correct = np.concatenate([np.arange(30) < 15, np.arange(10) < 9, np.arange(3) < 0])
    assert statistics.class_mean(correct, classes).value == pytest.approx((0.5 + 0.9 + 0) / 3)
    found = statistics.class_mean(correct, classes, least=10)
    assert found.value == pytest.approx(0.7)
    # The mean of 15 of 30 and 9 of 10 has this variance; the binomials are close enough to normal.
    half = 1.96 * np.sqrt(0.25 / 30 + 0.09 / 10) / 2
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)


def test_class_mean_says_what_it_cannot_average():
    with pytest.raises(UserError, match="no class has 5 examples; the largest of 2 has 3"):
        statistics.class_mean(np.ones(5, bool), list("aaabb"), least=5)
    with pytest.raises(UserError, match="of one model"):
        statistics.class_mean(np.ones((2, 5), bool), list("aaabb"))
