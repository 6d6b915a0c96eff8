"""The few-shot protocol of CLIP's adapters: 1, 2, 4, 8 and 16 examples a class, several seeds, mean and spread.

The published numbers cannot be compared where methods chose their settings on the test split, as some did. Here a
method gets training and validation examples and hands back a finished classifier; only then is test data looked at,
once.

Base to novel (Zhou et al. 2022, CoCoOp): trained on the first half of the classes, tested on either half by itself, and
both accuracies joined by their harmonic mean.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vla_jax.errors import UserError
from vla_jax.evaluation.statistics import Interval, mean_interval

SHOTS = (1, 2, 4, 8, 16)
SEEDS = (1, 2, 3)
MOST_VALIDATION = 4
"""Validation examples a class at most, so that few-shot stays few-shot (Zhou et al. 2022, CoOp)."""

Classifier = Callable[[np.ndarray], np.ndarray]
"""From places in the test split, int ``[examples]``, to predicted labels, int ``[examples]``."""

Learner = Callable[[np.ndarray, np.ndarray, int], Classifier]
"""From places in the training and in the validation split, and a seed, to a classifier with all choices made."""


@dataclass(frozen=True)
class Spread:
    """An accuracy over seeds.

    Attributes:
        values: by seed, as fractions of one.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return float(np.mean(self.values))

    @property
    def deviation(self) -> float:
        """The standard deviation between seeds, with n - 1 in the denominator; NaN of a single seed."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else float("nan")

    @property
    def interval(self) -> Interval:
        """The mean with Student's t interval; needs two seeds."""
        return mean_interval(self.values)


@dataclass(frozen=True)
class BaseToNovel:
    """Accuracies of a method trained on the base classes, over seeds.

    Attributes:
        base: on base classes, chosen from base classes.
        novel: on novel classes, chosen from novel classes.
        harmonic: the harmonic mean of both, seed by seed.
    """

    base: Spread
    novel: Spread
    harmonic: Spread


def draw_shots(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Places of some examples of each class; those of fewer shots are among those of more.

    A class's draw depends on the seed and its label alone. A class with fewer examples gives all of them.

    Args:
        labels: int ``[examples]``.
        shots: examples a class.
        seed: of the draw.

    Returns:
        int64 ``[chosen]``, in rising order.

    Raises:
        UserError: for no label, a negative one, or fewer than one shot.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not labels.size or (labels < 0).any():
        raise UserError(f"shots are drawn from one label of 0 or more an example; given {labels.shape}")
    if shots < 1:
        raise UserError(f"shots must be at least 1, got {shots}")
    drawn = []
    for label in np.unique(labels):
        order = np.random.default_rng([seed, int(label)]).permutation(np.flatnonzero(labels == label))
        drawn.append(order[:shots])
    return np.sort(np.concatenate(drawn))


def few_shot(
    learn: Learner,
    train: np.ndarray,
    validation: np.ndarray,
    test: np.ndarray,
    *,
    shots: Sequence[int] = SHOTS,
    seeds: Sequence[int] = SEEDS,
) -> dict[int, Spread]:
    """Runs the protocol.

    Args:
        learn: trains and chooses; sees no test data.
        train: labels of the training split, from which shots are drawn.
        validation: labels of the validation split, of which as many a class are drawn, and :data:`MOST_VALIDATION` at
            most.
        test: labels of the test split.
        shots: numbers of training examples a class.
        seeds: of the draws and of training.

    Returns:
        By number of shots, the test accuracy over seeds.

    Raises:
        UserError: for no shots or seeds, or classes of the test split that training or validation lacks.
    """
    if not shots or not seeds:
        raise UserError("the few-shot protocol needs at least one number of shots and one seed")
    train, validation, test = (np.asarray(labels) for labels in (train, validation, test))
    for name, labels in (("training", train), ("validation", validation)):
        if missing := sorted(set(test.tolist()) - set(labels.tolist())):
            raise UserError(f"the {name} split has no example of {len(missing)} tested classes, such as {missing[0]}")
    found: dict[int, Spread] = {}
    for count in shots:
        values = []
        for seed in seeds:
            chosen = draw_shots(train, count, seed), draw_shots(validation, min(count, MOST_VALIDATION), seed)
            values.append(_accuracy(learn(*chosen, seed), test, np.arange(len(test))))
        found[count] = Spread(tuple(values))
    return found


def split_classes(classes: int) -> tuple[np.ndarray, np.ndarray]:
    """The base and the novel classes: the first half, the larger one where they are odd, and the rest.

    Raises:
        UserError: for fewer than four classes, of which a half would leave nothing to choose from.
    """
    if classes < 4:
        raise UserError(f"base to novel needs at least 4 classes, two in each half; got {classes}")
    base = -(-classes // 2)
    return np.arange(base), np.arange(base, classes)


def harmonic_mean(base: float, novel: float) -> float:
    """2 b n / (b + n); zero where either is."""
    return 2 * base * novel / (base + novel) if base and novel else 0.0


def base_to_novel(
    learn: Callable[[np.ndarray, np.ndarray, int], Callable[..., np.ndarray]],
    train: np.ndarray,
    validation: np.ndarray,
    test: np.ndarray,
    classes: int,
    *,
    shots: int = 16,
    seeds: Sequence[int] = SEEDS,
) -> BaseToNovel:
    """Runs the base-to-novel protocol.

    Args:
        learn: as for :func:`few_shot`, on examples of base classes alone. The classifier is called with places in the
            test split and ``candidates=``, the classes to choose from, int ``[candidates]``, and gives labels.
        train: labels of the training split.
        validation: labels of the validation split.
        test: labels of the test split.
        classes: how many there are.
        shots: training examples a class.
        seeds: of the draws and of training.

    Raises:
        UserError: for too few classes, or a half without test examples.
    """
    train, validation, test = (np.asarray(labels) for labels in (train, validation, test))
    halves = split_classes(classes)
    places = [np.flatnonzero(np.isin(test, half)) for half in halves]
    for name, own in zip(("base", "novel"), places, strict=True):
        if not own.size:
            raise UserError(f"the test split has no example of a {name} class")

    def of_base(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
        base = np.flatnonzero(np.isin(labels, halves[0]))
        return base[draw_shots(labels[base], count, seed)]

    scores = []
    for seed in seeds:
        chosen = of_base(train, shots, seed), of_base(validation, min(shots, MOST_VALIDATION), seed)
        classify = learn(*chosen, seed)
        both = zip(places, halves, strict=True)
        scores.append([_accuracy(functools.partial(classify, candidates=half), test, own) for own, half in both])
    base, novel = (Spread(tuple(values)) for values in zip(*scores, strict=True))
    return BaseToNovel(base, novel, Spread(tuple(harmonic_mean(*pair) for pair in scores)))


def _accuracy(classify: Classifier, labels: np.ndarray, places: np.ndarray) -> float:
    predicted = np.asarray(classify(places))
    if predicted.shape != places.shape:
        raise UserError(f"a classifier gave {predicted.shape} labels for {len(places)} test examples")
    return float((predicted == labels[places]).mean())
