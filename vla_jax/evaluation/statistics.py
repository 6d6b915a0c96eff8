"""Accuracy with its uncertainty, and the difference between two models on the same examples.

Which question each function answers:

==========================  ========================  ===========================================================
function                    drawn anew                the claim that it supports
==========================  ========================  ===========================================================
``wilson``                  examples                  how good is *this trained model* on such examples?
``mean_interval``           seeds                     how good is *the method*, trained again, on this test set?
``accuracy``                examples, and seeds       how good is *the method*, trained again, on new examples?
``bootstrap_accuracy``      examples, and seeds       the same; also for one seed, as published tables have it
``class_mean``              examples of each class    how good is *this trained model*, every class counting the same?
``paired_difference``       examples, and seeds       by how much does method a beat method b? (interval)
its ``p_value``             the two models' names     do *these trained models* differ at all on such examples?
==========================  ========================  ===========================================================

:mod:`vla_jax.evaluation.task_means` has the interval and the paired difference of a mean over several tasks.

With three seeds, as usual, the spread between seeds rests on two degrees of freedom. In simulation (300 examples) the
bootstrap over seeds and examples covers 95 to 99 % where examples make most of the noise, and 84 % where seeds make all
of it; Student's t over seeds covers 95 % there, and 88 % where examples do. All intervals are two-sided at 95 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from vla_jax.errors import UserError

CONFIDENCE = 0.95
RESAMPLES = 10_000
_CHUNK = 2**22  # numbers drawn at a time, which bounds memory at some tens of MB


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval; for accuracies a fraction of one.

    Attributes:
        value: the estimate.
        low: lower end of the interval.
        high: upper end of the interval.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedDifference(Interval):
    """Accuracy of a minus accuracy of b on the same examples, with its 95 % interval.

    Attributes:
        p_value: exact two-sided sign-flip test over examples; with one seed it is McNemar's exact test.
        wins: (seed, example) pairs that a alone has right.
        losses: (seed, example) pairs that b alone has right.
    """

    p_value: float
    wins: int
    losses: int


def wilson(successes: int, total: int) -> Interval:
    """Share of successes with its Wilson score interval (Wilson 1927), for one trained model.

    Args:
        successes: how many of ``total`` are right.
        total: number of independent examples.

    Raises:
        UserError: there are no examples, or more successes than examples.
    """
    if not 0 <= successes <= total or total == 0:
        raise UserError(f"{successes} successes of {total} examples; 0 <= successes <= total and total >= 1 are needed")
    z = stats.norm.ppf(0.5 + CONFIDENCE / 2)
    share = successes / total
    center = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * np.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    # Where the interval touches 0 or 1 it does so exactly; rounding must not put the value outside.
    low = 0.0 if successes == 0 else float(center - half)
    high = 1.0 if successes == total else float(center + half)
    return Interval(share, low, high)


def mean_interval(values_by_seed: Sequence[float]) -> Interval:
    """Mean over seeds with Student's t interval: the method's mean on this very test set.

    Args:
        values_by_seed: one number a seed, such as its test accuracy; two or more.

    Raises:
        UserError: fewer than two seeds, or a number that is not finite.
    """
    values = np.asarray(values_by_seed, np.float64)
    if values.ndim != 1 or values.size < 2:
        raise UserError(
            f"an interval over seeds needs one number each of two or more seeds, given shape {values.shape}; "
            "run more seeds, or use accuracy(), which also takes a single one"
        )
    if not np.isfinite(values).all():
        raise UserError(f"values by seed must be finite, given {values.tolist()}")
    mean = float(values.mean())
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, values.size - 1) * values.std(ddof=1) / np.sqrt(values.size))
    return Interval(mean, mean - half, mean + half)


def accuracy(correct: np.ndarray, clusters: Sequence | np.ndarray | None = None, seed: int = 0) -> Interval:
    """Accuracy with its interval: Wilson for one seed, else a bootstrap over seeds and examples.

    Seeds answer the same examples, so both are drawn with replacement, independently of each other (the pigeonhole
    bootstrap, Owen 2007). Outcomes that are all alike have no spread to draw from; they get Wilson's interval.

    Args:
        correct: bool [examples] or [seeds, examples].
        clusters: [examples], which examples belong together, such as statements about one picture; drawn as one.
        seed: of the bootstrap's random numbers.

    Raises:
        UserError: wrong shape, no examples, or values other than 0 and 1.
    """
    correct = outcomes_of(correct)  # [seeds, examples]
    tally = tally_of(correct, clusters)
    value = float(correct.mean())
    if value in (0.0, 1.0) or (len(correct) == 1 and tally.independent):
        # Seeds that agree on every example are no further evidence: the examples of one seed count.
        units = int(tally.counts.sum())
        return wilson(round(value * units), units)
    low, high = np.clip(_bootstrap(tally, seed), 0, 1)
    return Interval(value, float(low), float(high))


def paired_difference(
    correct_a: np.ndarray, correct_b: np.ndarray, clusters: Sequence | np.ndarray | None = None, seed: int = 0
) -> PairedDifference:
    """Accuracy of model a minus that of model b on the same examples.

    The interval is a bootstrap over seeds and examples as in :func:`accuracy`, so it speaks of the methods. The p value
    keeps the trained models fixed: if the two were interchangeable on every example, how often would chance alone give
    a difference as large as this? It is computed exactly, over all sign flips of the examples' differences.

    Args:
        correct_a: bool [examples] or [seeds, examples].
        correct_b: the same shape, the same examples in the same order; seeds are paired by position.
        clusters: [examples], as for :func:`accuracy`.
        seed: of the bootstrap's random numbers.

    Raises:
        UserError: shapes that differ, no examples, or values other than 0 and 1.
    """
    correct_a, correct_b = outcomes_of(correct_a), outcomes_of(correct_b)
    if correct_a.shape != correct_b.shape:
        raise UserError(
            f"models are compared on the same seeds and examples, given [seeds, examples] {list(correct_a.shape)} and "
            f"{list(correct_b.shape)}; leave out what only one of them has"
        )
    difference = correct_a - correct_b  # [seeds, examples], each -1, 0 or 1
    tally = tally_of(difference, clusters)
    low, high = np.clip(_bootstrap(tally, seed), -1, 1)
    return PairedDifference(
        value=float(difference.mean()),
        low=float(low),
        high=float(high),
        p_value=_sign_flip_test(tally.sums.sum(0), tally.counts),
        wins=int((difference > 0).sum()),
        losses=int((difference < 0).sum()),
    )


def bootstrap_accuracy(correct: np.ndarray, clusters: Sequence | np.ndarray | None = None, seed: int = 0) -> Interval:
    """Accuracy with a percentile bootstrap over examples (and seeds), also for one seed of independent examples.

    For reports beside published bootstrap intervals; :func:`accuracy` has Wilson's interval there, which covers better
    near 0 and 1. Outcomes that are all alike leave nothing to draw from and get Wilson's interval here too.

    Args:
        correct: bool [examples] or [seeds, examples].
        clusters: [examples], as for :func:`accuracy`.
        seed: of the bootstrap's random numbers.

    Raises:
        UserError: as :func:`accuracy`.
    """
    correct = outcomes_of(correct)
    value = float(correct.mean())
    if value in (0.0, 1.0):
        return accuracy(correct, clusters, seed)
    low, high = np.clip(_bootstrap(tally_of(correct, clusters), seed), 0, 1)
    return Interval(value, float(low), float(high))


def class_mean(correct: np.ndarray, classes: Sequence | np.ndarray, least: int = 1, seed: int = 0) -> Interval:
    """Mean over classes of the accuracy within each, of one trained model, whatever the classes' sizes.

    The interval is a percentile bootstrap that draws within each class as many examples as it has. A class that is all
    right or all wrong adds no spread, so with many small classes the interval is too narrow.

    Args:
        correct: bool [examples].
        classes: [examples], the class of each.
        least: classes with fewer examples are left out.
        seed: of the bootstrap's random numbers.

    Raises:
        UserError: wrong shapes, values other than 0 and 1, or no class with enough examples.
    """
    right = outcomes_of(correct)
    classes = np.asarray(classes)
    if len(right) != 1 or classes.shape != right.shape[1:]:
        raise UserError(
            f"a mean over classes takes outcomes [examples] of one model and as many classes, given "
            f"{list(np.shape(correct))} and {list(classes.shape)}"
        )
    _, member, sizes = np.unique(classes, return_inverse=True, return_counts=True)
    kept = sizes >= least
    if not kept.any():
        raise UserError(f"no class has {least} examples; the largest of {len(sizes)} has {sizes.max()}")
    shares = (np.bincount(member, right[0]) / sizes)[kept]
    drawn = np.random.default_rng(seed).binomial(sizes[kept], shares, (RESAMPLES, kept.sum())) / sizes[kept]
    low, high = percentiles(drawn.mean(1))
    return Interval(float(shares.mean()), float(low), float(high))


@dataclass(frozen=True)
class Tally:
    """Units of resampling (examples, or clusters of them), equal ones counted rather than repeated.

    Which of several equal units is drawn makes no difference, so drawing units is drawing how often each distinct
    pattern occurs. Three seeds make at most eight patterns of right and wrong, however many examples there are.
    """

    sums: np.ndarray  # [seeds, patterns] sum of the unit's values
    sizes: np.ndarray  # [patterns] examples in the unit
    counts: np.ndarray  # [patterns] units with this pattern

    @property
    def independent(self) -> bool:
        """Whether every unit is a single example."""
        return bool((self.sizes == 1).all())


def tally_of(values: np.ndarray, clusters: Sequence | np.ndarray | None) -> Tally:
    """Values of examples counted by pattern.

    Args:
        values: int64 [seeds, examples].
        clusters: [examples], which examples are drawn as one; None for each by itself.

    Raises:
        UserError: if there is not one cluster an example.
    """
    sizes = np.ones(values.shape[1], values.dtype)
    if clusters is not None:
        clusters = np.asarray(clusters)
        if clusters.shape != sizes.shape:
            raise UserError(f"clusters name one cluster for each of {sizes.size} examples, given {clusters.shape}")
        _, member = np.unique(clusters, return_inverse=True)
        sizes = np.bincount(member)
        values = np.stack([np.bincount(member, row).round().astype(np.int64) for row in values])
    patterns, counts = np.unique(np.vstack([values, sizes]), axis=1, return_counts=True)
    return Tally(sums=patterns[:-1], sizes=patterns[-1], counts=counts)


def _bootstrap(tally: Tally, seed: int) -> np.ndarray:
    """Percentile interval [2] of the mean over seeds and examples, both drawn with replacement."""
    return percentiles(resampled([tally], seed))


def percentiles(estimates: np.ndarray) -> np.ndarray:
    """The interval [2] that holds the middle 95 % of resampled estimates."""
    return np.quantile(estimates, [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2])


def resampled(tallies: Sequence[Tally], seed: int) -> np.ndarray:
    """Means over seeds and examples, both drawn with replacement; of several sets of examples the mean of their means.

    Each set's examples are drawn from it alone, the seeds once for all of them.

    Args:
        tallies: one for each set, of the same seeds.
        seed: of the random numbers.

    Returns:
        float64 ``[RESAMPLES]``.
    """
    generator = np.random.default_rng(seed)
    seeds = len(tallies[0].sums)
    rows = max(1, _CHUNK // max(tally.sizes.size for tally in tallies))
    # Drawing from n values gives (n - 1) / n of the variance, which matters for three seeds (Hesterberg 2015).
    widen = np.sqrt(seeds / (seeds - 1)) if seeds > 1 else 1.0
    estimates = []
    for start in range(0, RESAMPLES, rows):
        size = min(rows, RESAMPLES - start)
        means = np.zeros((size, seeds))
        for tally in tallies:
            units = int(tally.counts.sum())
            drawn = generator.multinomial(units, tally.counts / units, size)  # [size, patterns]
            means += (drawn @ tally.sums.T) / (drawn @ tally.sizes)[:, None] / len(tallies)
        weights = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size) / seeds  # [size, seeds]
        estimates.append((means * (1 / seeds + widen * (weights - 1 / seeds))).sum(1))
    return np.concatenate(estimates)


def _sign_flip_test(differences: np.ndarray, counts: np.ndarray) -> float:
    """Exact two-sided p value of ``sum(counts * differences)`` when every unit's sign is a fair coin.

    The differences are small integers, so the whole distribution is a product of a few stretched binomials.
    """
    observed = abs(int((differences * counts).sum()))
    distribution = np.ones(1)  # over the sums -reach, ..., reach
    for step in np.unique(np.abs(differences[differences != 0])):
        tosses = int(counts[np.abs(differences) == step].sum())
        stretched = np.zeros(2 * step * tosses + 1)
        stretched[:: 2 * step] = stats.binom.pmf(np.arange(tosses + 1), tosses, 0.5)
        distribution = np.convolve(distribution, stretched)
    reach = distribution.size // 2
    return float(min(1.0, distribution[np.abs(np.arange(-reach, reach + 1)) >= observed].sum()))


def outcomes_of(correct: np.ndarray) -> np.ndarray:
    """Right and wrong as int64 [seeds, examples], or the error that says what is the matter with them."""
    correct = np.asarray(correct)
    if correct.ndim not in (1, 2) or correct.size == 0:
        raise UserError(f"outcomes are [examples] or [seeds, examples] with at least one each, given {correct.shape}")
    if not np.isin(correct, (0, 1)).all():
        raise UserError("outcomes are right or wrong, True or False; other values were given")
    return np.atleast_2d(correct).astype(np.int64)
