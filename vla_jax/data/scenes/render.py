"""Pictures of scenes, and annotations that need pixels: boxes, padded arrays, labels of patches.

A glyph (one shape with one texture at one extent) is drawn once with Pillow at up to eight times its extent, averaged
down and kept; a picture is then a few blends of small arrays, which costs little beside a training step.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from vla_jax.data.scenes.sampling import MAX_OBJECTS, Scene, SceneObject
from vla_jax.data.scenes.vocabulary import COLORS, PALETTE, PLACES, SHAPES, SIZES, TEXTURES
from vla_jax.errors import UserError

# Small glyphs are drawn eight times as large as they are needed, larger ones at this many pixels, twice at least.
_DRAWN_SIDE = 160
_PALETTE = np.array([PALETTE[name] for name in COLORS], np.float32)
# Gaps between stripes, and dots, are white with some of the object's colour, so that the shape stays whole to the eye.
_GAP_WHITE = 0.7
# A patch belongs to an object that covers this share of it at least.
_PATCH_SHARE = 0.25


class Glyph(NamedTuple):
    """Coverage of a glyph's square, float32 [extent, extent, 1] from 0 to 1."""

    ink: np.ndarray
    """share of each pixel in the object's colour"""
    paper: np.ndarray
    """share of each pixel in white, times 255"""
    through: np.ndarray
    """share of each pixel that the background shows through"""
    outline: np.ndarray
    """bool [extent, extent]: at least half within the filled shape"""
    box: tuple[int, int, int, int]
    """bounds of the filled shape within the square, x0 y0 x1 y1 with x1 and y1 beyond the last pixel"""


def _polygon(points: list[tuple[float, float]], side: int) -> Image.Image:
    image = Image.new("L", (side, side), 0)
    ImageDraw.Draw(image).polygon([(x * (side - 1), y * (side - 1)) for x, y in points], fill=255)
    return image


def _circle(side: int) -> Image.Image:
    image = Image.new("L", (side, side), 0)
    ImageDraw.Draw(image).ellipse((0, 0, side - 1, side - 1), fill=255)
    return image


def _star(side: int) -> Image.Image:
    points = []
    for corner in range(10):
        radius = 0.526 if corner % 2 == 0 else 0.26
        angle = math.pi * corner / 5
        points.append((0.5 + radius * math.sin(angle), 0.526 - radius * math.cos(angle)))
    return _polygon(points, side)


def _heart(side: int) -> Image.Image:
    angles = [2 * math.pi * step / 200 for step in range(200)]
    across = [16 * math.sin(a) ** 3 for a in angles]
    down = [-13 * math.cos(a) + 5 * math.cos(2 * a) + 2 * math.cos(3 * a) + math.cos(4 * a) for a in angles]
    top, bottom = min(down), max(down)
    return _polygon([((x + 16) / 32, (y - top) / (bottom - top)) for x, y in zip(across, down, strict=True)], side)


_POLYGONS: dict[str, list[tuple[float, float]]] = {
    "square": [(0.04, 0.04), (0.96, 0.04), (0.96, 0.96), (0.04, 0.96)],
    "triangle": [(0.5, 0.04), (1.0, 0.94), (0.0, 0.94)],
    "rectangle": [(0.0, 0.24), (1.0, 0.24), (1.0, 0.76), (0.0, 0.76)],
    "diamond": [(0.5, 0.0), (0.92, 0.5), (0.5, 1.0), (0.08, 0.5)],
    "cross": [
        (0.34, 0.0), (0.66, 0.0), (0.66, 0.34), (1.0, 0.34), (1.0, 0.66), (0.66, 0.66),
        (0.66, 1.0), (0.34, 1.0), (0.34, 0.66), (0.0, 0.66), (0.0, 0.34), (0.34, 0.34),
    ],
}  # fmt: skip


def _silhouette(shape: str, side: int) -> Image.Image:
    drawn = {"circle": _circle, "star": _star, "heart": _heart}
    return drawn[shape](side) if shape in drawn else _polygon(_POLYGONS[shape], side)


def _inside(silhouette: Image.Image, thickness: int) -> Image.Image:
    """The silhouette less a rim of ``thickness`` pixels."""
    # A rim of the picture's own border, else shapes that touch the border would keep no rim there.
    side = silhouette.width
    framed = Image.new("L", (side + 2, side + 2), 0)
    framed.paste(silhouette, (1, 1))
    for _ in range(thickness):
        framed = framed.filter(ImageFilter.MinFilter(3))
    return framed.crop((1, 1, side + 1, side + 1))


def _gaps(texture: str, silhouette: Image.Image, extent: int, pixel: int) -> Image.Image:
    """What a texture leaves pale, or for ``hollow`` open; ``pixel`` is the drawn width of one pixel."""
    side = silhouette.width
    if texture == "hollow":
        return _inside(silhouette, round(max(1.3, 0.1 * extent) * pixel))
    pattern = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(pattern)
    if texture == "striped":
        # Horizontal bars, whole pixels wide so that averaging down keeps them sharp at every extent.
        bar = max(2, round(extent / 7)) * pixel
        start = (side // 2) % (2 * bar) - bar // 2 - 2 * bar
        for top in range(start, side, 2 * bar):
            draw.rectangle((0, top, side - 1, top + bar - 1), fill=255)
    elif texture == "dotted":
        pitch = max(4.0, extent / 3.7) * pixel
        radius = 0.32 * pitch
        reach = math.ceil(side / pitch)
        for row in range(-reach, reach + 1):
            for column in range(-reach, reach + 1):
                x, y = side / 2 + column * pitch, side / 2 + row * pitch
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return ImageChops.darker(pattern, silhouette)


@functools.lru_cache(maxsize=4096)
def glyph(shape: int, texture: int, extent: int) -> Glyph:
    """A shape (id) with a texture (id) in a square of ``extent`` pixels."""
    pixel = min(8, max(2, math.ceil(_DRAWN_SIDE / extent)))
    silhouette = _silhouette(SHAPES[shape], extent * pixel)
    gaps = _gaps(TEXTURES[texture], silhouette, extent, pixel)
    whole, open_ = (
        np.asarray(image, np.float32).reshape(extent, pixel, extent, pixel).mean((1, 3)) / 255
        for image in (silhouette, gaps)
    )
    hollow = TEXTURES[texture] == "hollow"
    ink = whole - (open_ if hollow else _GAP_WHITE * open_)
    paper = np.zeros_like(open_) if hollow else 255 * _GAP_WHITE * open_
    through = 1 - whole + (open_ if hollow else 0)
    covered = whole > 0.1
    rows, columns = np.flatnonzero(covered.any(1)), np.flatnonzero(covered.any(0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    arrays = (ink[..., None], paper[..., None], through[..., None], whole >= 0.5)
    return Glyph(*arrays, box)


@functools.lru_cache(maxsize=2048)
def _colored(shape: int, texture: int, color: int, extent: int) -> tuple[np.ndarray, np.ndarray]:
    """What a glyph adds to the picture, float32 [extent, extent, 3], and what share of the picture it leaves."""
    drawn = glyph(shape, texture, extent)
    return drawn.paper + drawn.ink * _PALETTE[color], drawn.through


def corner(thing: SceneObject, size: int) -> tuple[int, int, int]:
    """Left, top and extent of an object's square, in pixels."""
    extent = max(3, round(thing.scale * size))
    return math.floor(thing.x * size - extent / 2 + 0.5), math.floor(thing.y * size - extent / 2 + 0.5), extent


def render(scene: Scene, size: int = 64) -> np.ndarray:
    """The scene's picture, uint8 [size, size, 3], RGB."""
    picture = np.empty((size, size, 3), np.uint8)
    picture[:] = scene.background
    for thing in scene.objects:
        left, top, extent = corner(thing, size)
        added, through = _colored(thing.shape, thing.texture, thing.color, extent)
        window = picture[top : top + extent, left : left + extent]
        window[:] = window * through + (added + 0.5)
    return picture


def object_box(thing: SceneObject, size: int = 64) -> tuple[int, int, int, int]:
    """The bounds of an object in pixels: x0, y0, x1, y1 with x1 and y1 beyond the last pixel."""
    left, top, extent = corner(thing, size)
    x0, y0, x1, y1 = glyph(thing.shape, thing.texture, extent).box
    return left + x0, top + y0, left + x1, top + y1


def annotations(scene: Scene, size: int = 64) -> dict[str, Any]:
    """Everything that is known about a scene, as plain values that JSON can hold.

    Returns:
        ``background`` (RGB), and ``objects``: for each its attribute words, their ids under ``*_id``, its ``place``,
        ``cell`` and ``box`` (pixels, x1 and y1 beyond the last).
    """
    objects = []
    for thing in scene.objects:
        objects.append(
            {
                "shape": SHAPES[thing.shape],
                "color": COLORS[thing.color],
                "size": SIZES[thing.size],
                "texture": TEXTURES[thing.texture],
                "place": PLACES[thing.cell],
                "shape_id": thing.shape,
                "color_id": thing.color,
                "size_id": thing.size,
                "texture_id": thing.texture,
                "cell": thing.cell,
                "box": list(object_box(thing, size)),
            }
        )
    return {"background": list(scene.background), "objects": objects}


def object_arrays(scene: Scene, size: int = 64) -> dict[str, np.ndarray]:
    """The objects as arrays padded to five.

    Returns:
        ``attributes`` int32 [5, 5]: shape, color, size, texture and cell, each id plus one so that 0 is no object;
        ``boxes`` float32 [5, 4] in pixels; ``mask`` bool [5].
    """
    attributes = np.zeros((MAX_OBJECTS, 5), np.int32)
    boxes = np.zeros((MAX_OBJECTS, 4), np.float32)
    for index, o in enumerate(scene.objects):
        attributes[index] = (o.shape + 1, o.color + 1, o.size + 1, o.texture + 1, o.cell + 1)
        boxes[index] = object_box(o, size)
    return {"attributes": attributes, "boxes": boxes, "mask": attributes[:, 0] > 0}


def patch_labels(scene: Scene, grid: int, size: int = 64) -> np.ndarray:
    """What each patch of a picture shows: the object whose filled shape covers most of it, if a quarter at least.

    Args:
        scene: the scene.
        grid: patches a side.
        size: side of the picture in pixels, a multiple of ``grid``.

    Returns:
        int32 [grid, grid, 4]: shape, color, size and texture, each id plus one; 0 is background.

    Raises:
        UserError: ``grid`` does not divide ``size``.
    """
    if grid < 1 or size % grid:
        raise UserError(f"{size} pixels cannot be cut into {grid} patches a side; give a divisor of {size}")
    patch = size // grid
    least = max(1, math.ceil(_PATCH_SHARE * patch * patch))
    best = np.zeros((grid, grid), np.int64)
    labels = np.zeros((grid, grid, 4), np.int32)
    for thing in scene.objects:
        left, top, extent = corner(thing, size)
        covered = _covered(thing.shape, thing.texture, extent, left % patch, top % patch, patch)
        rows = slice(top // patch, top // patch + covered.shape[0])
        columns = slice(left // patch, left // patch + covered.shape[1])
        wins = (covered >= least) & (covered > best[rows, columns])
        best[rows, columns][wins] = covered[wins]
        labels[rows, columns][wins] = (thing.shape + 1, thing.color + 1, thing.size + 1, thing.texture + 1)
    return labels


@functools.lru_cache(maxsize=16384)
def _covered(shape: int, texture: int, extent: int, left: int, top: int, patch: int) -> np.ndarray:
    """Pixels of each patch within a filled shape, whose square starts ``left`` and ``top`` pixels into the first."""
    rows, columns = (-(-(start + extent) // patch) for start in (top, left))
    outline = np.zeros((rows * patch, columns * patch), bool)
    outline[top : top + extent, left : left + extent] = glyph(shape, texture, extent).outline
    return outline.reshape(rows, patch, columns, patch).sum((1, 3))
