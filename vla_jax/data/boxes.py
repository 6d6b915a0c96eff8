"""Boxes: where they lie in the square that a backbone is shown, after any resize, crop and flip of the picture.

A model speaks of boxes in shares of its square's side: (0, 0) is the upper left corner, (1, 1) the lower right one.
What the centre crop cuts off lies outside of that. Resizing, cropping and mirroring map axis-parallel boxes to
axis-parallel boxes and multiply all areas by one number, so that the intersection over union of two boxes is the same
in shares of the square as in pixels of the stored picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_jax.errors import UserError, unknown

# By how many pixels a box may stick out of its picture: annotators' tools round edges up.
_TOLERANCE = 1.0


@dataclass(frozen=True)
class View:
    """Which part of a stored picture a model is shown: ``x' = scale x + shift``, for each axis.

    Attributes:
        width: of the stored picture, in pixels.
        height: of the stored picture, in pixels.
        scale: shares of the square's side a pixel, across and down; negative where the picture is mirrored.
        shift: where the stored picture's upper left corner lies, in shares of the side.
    """

    width: int
    height: int
    scale: tuple[float, float]
    shift: tuple[float, float]

    @classmethod
    def of_crop(cls, size: tuple[int, int], crop: tuple[float, float, float, float], *, mirrored: bool = False) -> View:
        """The view of a crop that fills the square.

        Args:
            size: the stored picture's width and height.
            crop: x0, y0, x1, y1 in its pixels; may reach beyond it where the processor pads.
            mirrored: whether left and right are exchanged after the crop.
        """
        x0, y0, x1, y1 = crop
        across, down = 1 / (x1 - x0), 1 / (y1 - y0)
        if mirrored:
            return cls(*size, (-across, down), (x1 * across, -y0 * down))
        return cls(*size, (across, down), (-x0 * across, -y0 * down))

    def to_square(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes of the stored picture in shares of the square's side.

        Args:
            boxes: ``[..., 4]``, x0, y0, x1, y1 in pixels of the stored picture.

        Returns:
            float32 ``[..., 4]``, x0 < x1 and y0 < y1 again; not cut at the square's edges.
        """
        corners = np.asarray(boxes, np.float64).reshape(*np.shape(boxes)[:-1], 2, 2)
        corners = corners * self.scale + self.shift
        return np.sort(corners, axis=-2).reshape(np.shape(boxes)).astype(np.float32)

    def to_picture(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes in shares of the square's side in pixels of the stored picture, float32 ``[..., 4]``."""
        corners = np.asarray(boxes, np.float64).reshape(*np.shape(boxes)[:-1], 2, 2)
        corners = (corners - self.shift) / self.scale
        return np.sort(corners, axis=-2).reshape(np.shape(boxes)).astype(np.float32)


def check_boxes(boxes: np.ndarray, width: int, height: int, what: str) -> np.ndarray:
    """Boxes once it is sure that each lies in its picture and holds something.

    Args:
        boxes: ``[n, 4]``, x0, y0, x1, y1 in pixels.
        width: of the picture.
        height: of the picture.
        what: whose boxes, for messages.

    Returns:
        float32 ``[n, 4]``, cut at the picture's edges.

    Raises:
        UserError: for another shape, a number that is not finite, a box without area (as where a width and a height
            were given in place of the second corner), or one that reaches more than a pixel beyond the picture.
    """
    given = np.asarray(boxes, np.float32)
    if given.ndim != 2 or given.shape[1] != 4 or not len(given):
        raise UserError(f"boxes of {what} are [n, 4] with at least one: x0, y0, x1, y1; given {list(given.shape)}")
    low, high = given[:, :2], given[:, 2:]
    edge = np.array([width, height], np.float32)
    broken = ~np.isfinite(given).all(1) | (high <= low).any(1)
    outside = (low < -_TOLERANCE).any(1) | (high > edge + _TOLERANCE).any(1)
    for bad, why in (
        (broken, "needs x0 < x1 and y0 < y1, the corners in pixels (not a corner with a width and a height)"),
        (outside, f"lies outside its picture of {width} x {height} pixels"),
    ):
        if bad.any():
            row = int(np.argmax(bad))
            raise UserError(f"box {row} of {what} is {given[row].tolist()}; it {why}")
    cut = np.concatenate([np.maximum(low, 0), np.minimum(high, edge)], axis=1)
    if (cut[:, 2:] <= cut[:, :2]).any():
        row = int(np.argmax((cut[:, 2:] <= cut[:, :2]).any(1)))
        raise UserError(f"box {row} of {what} is {given[row].tolist()}; nothing of it lies in its picture")
    return cut


@dataclass(frozen=True)
class TargetBox:
    """The part of a row that says where a phrase's region lies; see :class:`vla_jax.data.pipeline.TransformExample`.

    Attributes:
        key: the field with the box, ``[4]`` in pixels of the stored picture.
    """

    key: str = "box"

    def __call__(
        self, example: Mapping[str, Any], views: Sequence[View], generator: np.random.Generator | None
    ) -> dict[str, np.ndarray]:
        """``box`` float32 ``[4]``, in shares of the square's side, not cut at its edges."""
        del generator
        box = _boxes(example, self.key, views, self.key)
        return {"box": views[0].to_square(box)[0]}


@dataclass(frozen=True)
class CandidateBoxes:
    """The part of a row with the regions among which a phrase's own is looked for.

    Attributes:
        places: how many there is room for.
        key: the field with the boxes, ``[n, 4]`` in pixels of the stored picture.
    """

    places: int
    key: str = "boxes"

    def __post_init__(self):
        if self.places < 2:
            raise UserError(f"candidate boxes need at least 2 places, got {self.places}")

    def __call__(
        self, example: Mapping[str, Any], views: Sequence[View], generator: np.random.Generator | None
    ) -> dict[str, np.ndarray]:
        """``boxes`` float32 ``[places, 4]``, in shares of the square's side, and ``boxes_mask`` bool ``[places]``.

        Raises:
            UserError: for more boxes than places.
        """
        del generator
        boxes = _boxes(example, self.key, views, self.key)
        if len(boxes) > self.places:
            raise UserError(
                f"an example has {len(boxes)} candidate boxes and there are {self.places} places; give more"
            )
        # The whole square stands in the places that are left over: a box with an area, so that nothing divides by zero.
        padded = np.tile(np.array([0, 0, 1, 1], np.float32), (self.places, 1))
        padded[: len(boxes)] = views[0].to_square(boxes)
        return {"boxes": padded, "boxes_mask": np.arange(self.places) < len(boxes)}


def _boxes(example: Mapping[str, Any], key: str, views: Sequence[View], what: str) -> np.ndarray:
    if key not in example:
        raise unknown("field of an example", key, example)
    if len(views) != 1:
        raise UserError(f"boxes lie in one picture; the example has {len(views)}")
    boxes = np.asarray(example[key], np.float32)
    boxes = boxes[None] if boxes.ndim == 1 else boxes
    return check_boxes(boxes, views[0].width, views[0].height, f"an example's field {what!r}")
