"""Geometry of boxes in shares of a square's side: overlap, and which patches of a grid a box covers.

Boxes are x0, y0, x1, y1 with the origin in the upper left corner.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def areas(boxes: Float[Array, "*boxes 4"]) -> Float[Array, "*boxes"]:
    """The areas of boxes."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def overlaps(
    first: Float[Array, "*boxes 4"], second: Float[Array, "*others 4"]
) -> tuple[Float[Array, "*together"], Float[Array, "*together"]]:
    """Intersection over union, and the same less the share of the enclosing box that neither covers.

    Args:
        first: boxes with an area.
        second: boxes with an area; both shapes are broadcast against each other.

    Returns:
        IoU in [0, 1] and generalised IoU in (-1, 1] (Rezatofighi et al. 2019, algorithm 1).
    """
    inner = jnp.minimum(first[..., 2:], second[..., 2:]) - jnp.maximum(first[..., :2], second[..., :2])
    inner = jnp.prod(jnp.maximum(inner, 0), axis=-1)
    union = areas(first) + areas(second) - inner
    outer = jnp.maximum(first[..., 2:], second[..., 2:]) - jnp.minimum(first[..., :2], second[..., :2])
    outer = jnp.prod(outer, axis=-1)
    iou = inner / union
    return iou, iou - (outer - union) / outer


def centres(grid: int) -> Float[Array, "patches 2"]:
    """The middle of each patch of a ``grid`` x ``grid`` square, row by row: x, y."""
    line = (jnp.arange(grid) + 0.5) / grid
    return jnp.stack([jnp.tile(line, grid), jnp.repeat(line, grid)], axis=-1)


def coverage(boxes: Float[Array, "*boxes 4"], grid: int) -> Float[Array, "*boxes patches"]:
    """Which share of each patch of a ``grid`` x ``grid`` square a box covers, row by row."""
    edges = jnp.arange(grid + 1) / grid

    def line(low: Array, high: Array) -> Array:
        """The covered share of each of the line's intervals, [*boxes, grid]."""
        inner = jnp.minimum(high[..., None], edges[1:]) - jnp.maximum(low[..., None], edges[:-1])
        return jnp.maximum(inner, 0) * grid

    across, down = line(boxes[..., 0], boxes[..., 2]), line(boxes[..., 1], boxes[..., 3])
    return (down[..., :, None] * across[..., None, :]).reshape(*boxes.shape[:-1], grid * grid)


def contains(boxes: Float[Array, "*#boxes 4"], points: Float[Array, "*#boxes 2"]) -> Bool[Array, "*boxes"]:
    """Whether each point lies in its box, on its edges included."""
    return ((points >= boxes[..., :2]) & (points <= boxes[..., 2:])).all(-1)
