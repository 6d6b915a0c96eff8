"""Retrieval between n pictures and their n captions: recall at k, in both directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vla_jax.errors import UserError
from vla_jax.evaluation import statistics
from vla_jax.evaluation.statistics import Interval


@dataclass(frozen=True)
class Recall:
    """Recall at each k, as fractions of the queries, by direction.

    Attributes:
        image_to_text: the picture is the query, captions are ranked.
        text_to_image: the caption is the query, pictures are ranked.
    """

    image_to_text: dict[int, Interval]
    text_to_image: dict[int, Interval]


def ranks(similarity: np.ndarray) -> np.ndarray:
    """How many candidates stand before the right one, for each query.

    A candidate of equal score stands before the right one: a model that gives everything one score finds nothing.

    Args:
        similarity: float [..., queries, candidates], square; the right candidate of query i is candidate i.

    Returns:
        int64 [..., queries], 0 where the right candidate is strictly the first.

    Raises:
        UserError: the last two axes are not square, or a similarity is NaN.
    """
    similarity = np.asarray(similarity)
    if similarity.ndim < 2 or similarity.shape[-1] != similarity.shape[-2] or similarity.size == 0:
        raise UserError(f"similarities are [n, n], query i matching candidate i; given {similarity.shape}")
    if np.isnan(similarity).any():
        raise UserError(f"{int(np.isnan(similarity).sum())} similarities are NaN; NaN cannot be ranked")
    right = np.diagonal(similarity, axis1=-2, axis2=-1)[..., None]  # [..., queries, 1]
    return (similarity >= right).sum(-1) - 1  # the right one equals itself


def recall(similarity: np.ndarray, at: Sequence[int] = (1, 5, 10)) -> Recall:
    """Recall at k of n x n similarities in both directions, ties counting against the model.

    The interval speaks of other queries against the same n candidates; recall falls with n, so give n with it.

    Args:
        similarity: float [images, texts] or [seeds, images, texts], square; picture i belongs to caption i.
        at: the k, each from 1 to n.

    Returns:
        Each recall with its interval (:func:`vla_jax.evaluation.statistics.accuracy`).

    Raises:
        UserError: a k outside 1 to n, or as :func:`ranks`.
    """
    similarity = np.asarray(similarity)
    by_image, by_text = ranks(similarity), ranks(np.swapaxes(similarity, -1, -2))
    count = by_image.shape[-1]
    for k in at:
        if not 1 <= k <= count:
            raise UserError(f"recall at {k} of {count} candidates; k must lie between 1 and {count}")
    return Recall(
        image_to_text={k: statistics.accuracy(by_image < k) for k in at},
        text_to_image={k: statistics.accuracy(by_text < k) for k in at},
    )
