"""Retrieval between pictures and their captions: recall at k, median rank and mean average precision, both ways.

:func:`evaluate` takes features, any number of them, and several captions a picture as in COCO and Flickr30k (Karpathy
and Fei-Fei 2015): a picture has found its captions at rank r where the best of them stands there. :func:`recall` takes
a square of similarities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vla_jax.errors import UserError
from vla_jax.evaluation import statistics
from vla_jax.evaluation.exact_ranks import Before, check_owner, count_before
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


@dataclass(frozen=True)
class Direction:
    """How well one side's queries find what belongs to them on the other side.

    Attributes:
        recall: at each k, the share of queries with a right candidate among the first k.
        median_rank: of the best right candidate, 1 for the first place.
        mean_average_precision: over queries, the mean over their right candidates of the share of right ones among the
            candidates down to that one; with one right candidate the mean reciprocal rank. A fraction of one.
        queries: how many there are.
        candidates: how many they choose from; recall falls with them.
    """

    recall: dict[int, Interval]
    median_rank: float
    mean_average_precision: float
    queries: int
    candidates: int


@dataclass(frozen=True)
class Retrieved:
    """Both directions.

    Attributes:
        image_to_text: the picture is the query, captions are ranked.
        text_to_image: the caption is the query, pictures are ranked.
    """

    image_to_text: Direction
    text_to_image: Direction


def evaluate(
    images: np.ndarray, texts: np.ndarray, owner: np.ndarray | None = None, *, at: Sequence[int] = (1, 5, 10)
) -> Retrieved:
    """Ranks features against each other by their products, exactly, ties counting against the model.

    Args:
        images: float ``[images, width]``; normalise them for cosines.
        texts: float ``[texts, width]``.
        owner: int ``[texts]``, which image each text belongs to; text i belongs to image i if left out.
        at: the k.

    Raises:
        UserError: a k outside 1 to the number of candidates, or as
            :func:`vla_jax.evaluation.exact_ranks.count_before`.
    """
    return judge(count_before(images, texts, owner), check_owner(owner, len(images), len(texts)), at=at)


def judge(before: Before, owner: np.ndarray, *, at: Sequence[int] = (1, 5, 10)) -> Retrieved:
    """Recall, median rank and mean average precision of ranks.

    Captions of one picture stand or fall together, so that intervals of the recall of pictures draw pictures.

    Args:
        before: what stands before the right ones.
        owner: int ``[texts]``, which image each text belongs to.
        at: the k.

    Raises:
        UserError: a k outside 1 to the number of candidates.
    """
    images, texts = len(before.image_to_text), len(owner)
    return Retrieved(
        image_to_text=_direction(before.image_to_text, texts, at, None),
        text_to_image=_direction(before.text_to_image[:, None], images, at, owner),
    )


def _direction(before: np.ndarray, candidates: int, at: Sequence[int], clusters: np.ndarray | None) -> Direction:
    """One direction, of [queries, right candidates] wrong ones before each, -1 on unused places."""
    for k in at:
        _check_k(k, candidates)
    known = before >= 0
    place = np.arange(1, before.shape[1] + 1)  # of right candidates among themselves
    precision = np.where(known, place / (place + before), 0).sum(1) / known.sum(1)
    best = before[:, 0]
    return Direction(
        recall={k: statistics.accuracy(best < k, clusters) for k in at},
        median_rank=float(np.median(best + 1)),
        mean_average_precision=float(precision.mean()),
        queries=len(before),
        candidates=candidates,
    )


def _check_k(k: int, candidates: int) -> None:
    if not 1 <= k <= candidates:
        raise UserError(f"recall at {k} of {candidates} candidates; k must lie between 1 and {candidates}")


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
        _check_k(k, count)
    return Recall(
        image_to_text={k: statistics.accuracy(by_image < k) for k in at},
        text_to_image={k: statistics.accuracy(by_text < k) for k in at},
    )
