"""How well regions were found: accuracy by intersection over union, pointing, and heat maps to look at.

Boxes are x0, y0, x1, y1, all in pixels of the stored picture or all in shares of one square: the results are the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vla_jax.data.boxes import View
from vla_jax.errors import UserError
from vla_jax.evaluation import statistics
from vla_jax.evaluation.statistics import Interval

AT = (0.5, 0.75)


@dataclass(frozen=True)
class Grounded:
    """Fractions of one.

    Attributes:
        accuracy: by threshold, how often the intersection over union is at least that.
        mean_iou: the mean intersection over union.
        pointing: how often the box's middle, or the point that was given, lies in the annotated box.
    """

    accuracy: dict[float, Interval]
    mean_iou: float
    pointing: Interval


def iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes, float64 ``[...]``; both are ``[..., 4]``.

    Raises:
        UserError: for a box without an area, or a number that is not finite.
    """
    first, second = (_checked(name, boxes) for name, boxes in (("predicted", first), ("annotated", second)))
    inner = np.minimum(first[..., 2:], second[..., 2:]) - np.maximum(first[..., :2], second[..., :2])
    inner = np.prod(np.maximum(inner, 0), axis=-1)
    area = [np.prod(boxes[..., 2:] - boxes[..., :2], axis=-1) for boxes in (first, second)]
    return inner / (area[0] + area[1] - inner)


def evaluate(
    predicted: np.ndarray,
    annotated: np.ndarray,
    points: np.ndarray | None = None,
    *,
    at: Sequence[float] = AT,
    clusters: Sequence | np.ndarray | None = None,
) -> Grounded:
    """Judges predicted boxes.

    Args:
        predicted: ``[phrases, 4]``.
        annotated: ``[phrases, 4]``, one box a phrase.
        points: ``[phrases, 2]``, x and y of where the model points; the middles of its boxes if left out.
        at: thresholds.
        clusters: ``[phrases]``, which belong together, such as phrases on one picture.

    Raises:
        UserError: for shapes that differ, or a box without an area.
    """
    overlap = iou(predicted, annotated)
    if overlap.ndim != 1 or np.shape(predicted) != np.shape(annotated):
        raise UserError(f"one box a phrase is judged; given {np.shape(predicted)} and {np.shape(annotated)}")
    boxes = np.asarray(predicted, np.float64)
    points = (boxes[:, :2] + boxes[:, 2:]) / 2 if points is None else np.asarray(points, np.float64)
    if points.shape != (len(boxes), 2):
        raise UserError(f"points are x and y, one a phrase; given {points.shape} for {len(boxes)} phrases")
    return Grounded(
        accuracy={value: statistics.accuracy(overlap >= value, clusters) for value in at},
        mean_iou=float(overlap.mean()),
        pointing=statistics.accuracy(_inside(points, np.asarray(annotated, np.float64)), clusters),
    )


def peaks(heat: np.ndarray) -> np.ndarray:
    """Where heat maps point: the middle of the hottest patch, in shares of the square, float64 ``[maps, 2]``, x and y.

    Args:
        heat: ``[maps, patches]`` or ``[maps, grid, grid]``; of equally hot patches the first is taken.

    Raises:
        UserError: if the patches do not make a square.
    """
    heat = as_grid(heat)
    grid = heat.shape[-1]
    row, column = np.divmod(heat.reshape(len(heat), -1).argmax(1), grid)
    return np.stack([column + 0.5, row + 0.5], axis=-1) / grid


def as_grid(heat: np.ndarray) -> np.ndarray:
    """Heat maps as ``[..., grid, grid]``, row by row."""
    heat = np.asarray(heat)
    if heat.ndim > 2 and heat.shape[-1] == heat.shape[-2]:
        return heat
    grid = math.isqrt(heat.shape[-1])
    if grid * grid != heat.shape[-1]:
        raise UserError(f"heat maps are [maps, patches] of a square grid; given {heat.shape}")
    return heat.reshape(*heat.shape[:-1], grid, grid)


def over_picture(heat: np.ndarray, view: View) -> np.ndarray:
    """One heat map as large as the stored picture, each pixel with the value of its patch.

    Args:
        heat: ``[patches]`` or ``[grid, grid]``.
        view: what the model was shown of the picture.

    Returns:
        float64 ``[height, width]``; NaN where the model saw nothing.
    """
    heat = as_grid(np.asarray(heat, np.float64)[None])[0]
    grid = len(heat)
    places = []
    for axis, length in ((0, view.width), (1, view.height)):
        share = (np.arange(length) + 0.5) * view.scale[axis] + view.shift[axis]
        places.append(np.where((share >= 0) & (share < 1), np.floor(share * grid), -1).astype(int))
    across, down = places
    shown = heat[np.ix_(down, across)]
    return np.where((down[:, None] < 0) | (across[None, :] < 0), np.nan, shown)


def _inside(points: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    return ((points >= boxes[:, :2]) & (points <= boxes[:, 2:])).all(1)


def _checked(name: str, boxes: np.ndarray) -> np.ndarray:
    boxes = np.asarray(boxes, np.float64)
    if boxes.ndim == 0 or boxes.shape[-1] != 4:
        raise UserError(f"{name} boxes are [..., 4]: x0, y0, x1, y1; given {boxes.shape}")
    bad = ~(np.isfinite(boxes).all(-1) & (boxes[..., 2:] > boxes[..., :2]).all(-1))
    if bad.any():
        place = tuple(np.argwhere(bad)[0].tolist())
        raise UserError(f"the {name} box at {list(place)} is {boxes[place].tolist()}; it has no area or is not finite")
    return boxes
