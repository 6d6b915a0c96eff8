"""Classifiers of names and of a few examples, against their definitions written as loops."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from vla_jax.errors import UserError
from vla_jax.evaluation import zero_shot
from vla_jax.tasks.classification import prototypes

CLASSES = ("cat", "dog", "bird")
TEMPLATES = ("a photo of a {}.", "a {} in the wild", "{}")


def encode(texts):
    """Features that depend on the text alone, of any length."""
    return np.stack([np.random.default_rng(zlib.crc32(text.encode())).normal(0, 3, 8) for text in texts])


def test_an_ensemble_is_the_mean_of_normalised_features_normalised_again():
    found = zero_shot.class_features(encode, CLASSES, TEMPLATES)
    for name, feature in zip(CLASSES, found, strict=True):
        rows = [encode([template.replace("{}", name)])[0] for template in TEMPLATES]
        mean = sum(row / np.sqrt((row**2).sum()) for row in rows) / len(rows)
        np.testing.assert_allclose(feature, mean / np.sqrt((mean**2).sum()))


def test_cosines_do_not_depend_on_lengths():
    pictures = np.random.default_rng(0).normal(size=(5, 8))
    of_classes = zero_shot.class_features(encode, CLASSES, TEMPLATES)
    found = zero_shot.cosines(pictures, 7 * of_classes)
    assert found.shape == (5, 3)
    np.testing.assert_allclose(found, zero_shot.cosines(0.1 * pictures, of_classes))
    cosine = pictures[2] @ of_classes[1] / np.linalg.norm(pictures[2])
    assert found[2, 1] == pytest.approx(cosine)


def test_a_prototype_is_the_mean_direction_of_its_class():
    generator = np.random.default_rng(1)
    features, labels = generator.normal(size=(12, 4)), generator.permutation(np.repeat([0, 1, 2], 4))
    found = prototypes(features, labels, 3)
    for label in range(3):
        rows = [row / np.linalg.norm(row) for row, own in zip(features, labels, strict=True) if own == label]
        np.testing.assert_allclose(found[label], sum(rows) / np.linalg.norm(sum(rows)))


def test_mistakes_are_named():
    with pytest.raises(UserError, match="given twice: 'cat'"):
        zero_shot.class_features(encode, ("cat", "dog", "cat"), TEMPLATES)
    with pytest.raises(UserError, match=r"no \{\} for the class's name"):
        zero_shot.class_features(encode, CLASSES, ("a photo",))
    with pytest.raises(UserError, match="at least one template"):
        zero_shot.class_features(encode, CLASSES, ())
    with pytest.raises(UserError, match=r"feature of the pictures is zero or not finite, at \[1\]"):
        zero_shot.cosines(np.array([[1.0, 0], [0, 0]]), np.eye(2))
    with pytest.raises(UserError, match="class 1 has no example"):
        prototypes(np.eye(2), np.array([0, 0]), 2)
    with pytest.raises(UserError, match="label 2 names no class"):
        prototypes(np.eye(3), np.array([0, 1, 2]), 2)
