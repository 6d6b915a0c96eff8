"""Classifiers made of features, without training: of the classes' names, or of a few examples a class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vla_jax.errors import UserError
from vla_jax.tasks.classification import class_texts

Encode = Callable[[Sequence[Any]], np.ndarray]


def class_features(encode: Encode, classes: Sequence[str], templates: Sequence[str]) -> np.ndarray:
    """One text feature a class: the mean of its templates' normalised features, normalised again.

    Args:
        encode: texts to features ``[texts, width]`` of any length, such as those of
            :func:`vla_jax.evaluation.scene_zero_shot.clip_encoders`.
        classes: names, in the order of labels.
        templates: sentences with ``{}`` where the name stands; several make an ensemble (Radford et al. 2021, section
            3.1.4).

    Returns:
        float ``[classes, width]``, of length one.

    Raises:
        UserError: for two classes of one name, no template, or one without a place for the name.
    """
    features = unit("the class names", encode(class_texts(classes, templates)))
    return unit("the classes", features.reshape(len(classes), len(templates), -1).mean(1))


def cosines(features: np.ndarray, of_classes: np.ndarray) -> np.ndarray:
    """What each picture scores for each class, ``[pictures, classes]``.

    Args:
        features: ``[pictures, width]``, of any length.
        of_classes: ``[classes, width]``: :func:`class_features`, or the prototypes of
            :func:`vla_jax.tasks.classification.prototypes`.
    """
    return unit("the pictures", features) @ unit("the classes", of_classes).T


def unit(what: str, features: np.ndarray) -> np.ndarray:
    """Features of length one.

    Raises:
        UserError: for a feature that is zero or not finite.
    """
    features = np.asarray(features)
    length = np.linalg.norm(features, axis=-1, keepdims=True)
    if not (np.isfinite(length) & (length > 0)).all():
        bad = np.argwhere(~(np.isfinite(length) & (length > 0)))[0, :-1].tolist()
        raise UserError(f"a feature of {what} is zero or not finite, at {bad}; it has no direction")
    return features / length
