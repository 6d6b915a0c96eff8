"""Pictures of scenes as :class:`vla_jax.data.scenes.shift.Shift` says; geometry and annotations are those of the plain.

What is random in them (ground, strokes, noise) follows from the scene itself, so that a shifted picture is a function
of its scene as the plain one is, and the scenes that a source draws are the same with a shift and without.
"""

from __future__ import annotations

import functools
import math
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from vla_jax.data.scenes.render import corner, glyph
from vla_jax.data.scenes.sampling import Scene, seeded
from vla_jax.data.scenes.shift import Shift
from vla_jax.data.scenes.vocabulary import TEXTURES

_DRAWN = 4  # strokes are drawn so many times as large and averaged down
_PALE = 0.6  # how far a pale part of a texture is from the object's colour to the ground's
_TINT = 0.35  # share of the colour inside what is hollow


def render_shifted(scene: Scene, shift: Shift, size: int = 64) -> np.ndarray:
    """The scene's picture in the shifted world, uint8 [size, size, 3], RGB."""
    rng = seeded("shifted", scene)
    ground = _ground(rng, shift, size)  # [size, size, 3]
    picture = ground.copy()
    for thing in scene.objects:
        left, top, extent = corner(thing, size)
        covered, full = _coverage(thing.shape, thing.texture, extent, shift.textures)  # [extent, extent, 1] each
        window = (slice(top, top + extent), slice(left, left + extent))
        color = np.array(shift.palette[thing.color], np.float32)
        pale = color + _PALE * (ground[window] - color)
        painted = full * color + (1 - full) * pale
        picture[window] = covered * painted + (1 - covered) * picture[window]
    if shift.noise:
        generator = np.random.default_rng(rng.getrandbits(64))
        picture += shift.noise * generator.standard_normal(picture.shape, np.float32)
    return (np.clip(picture, 0, 255) + 0.5).astype(np.uint8)


def _ground(rng: Random, shift: Shift, size: int) -> np.ndarray:
    """A tinted slope from one level to another with strokes across it, float32 [size, size, 3]."""
    low, high = shift.background
    ends = np.array([[rng.uniform(low, high)] * 3 for _ in range(2)], np.float32)
    ends += np.array([[rng.uniform(-12, 12) for _ in range(3)] for _ in range(2)], np.float32)
    angle = rng.uniform(0, 2 * math.pi)
    across = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    slope = 0.5 + (across * math.cos(angle) + across[:, None] * math.sin(angle)) / math.sqrt(2)  # [size, size]
    ground = ends[0] + slope[..., None] * (ends[1] - ends[0])
    side = size * _DRAWN
    image = Image.new("L", (side, side), 128)
    draw = ImageDraw.Draw(image)
    for _ in range(shift.strokes):
        x, y, turn = rng.uniform(0, side), rng.uniform(0, side), rng.uniform(0, 2 * math.pi)
        reach = rng.uniform(0.08, 0.3) * side
        ends_at = [(x + sign * reach * math.cos(turn), y + sign * reach * math.sin(turn)) for sign in (-1, 1)]
        draw.line(
            ends_at, fill=128 + rng.choice((-1, 1)) * rng.randint(25, 60), width=round(rng.uniform(1, 2.5) * _DRAWN)
        )
    strokes = np.asarray(image, np.float32).reshape(size, _DRAWN, size, _DRAWN).mean((1, 3)) - 128
    return np.clip(ground + strokes[..., None], 0, 255)


@functools.lru_cache(maxsize=4096)
def _coverage(shape: int, texture: int, extent: int, otherwise: bool) -> tuple[np.ndarray, np.ndarray]:
    """Which share of each pixel an object covers, and which share of that has its full colour, [extent, extent, 1]."""
    drawn, name = glyph(shape, texture, extent), TEXTURES[texture]
    covered = 1 - drawn.through
    if not otherwise:  # what the plain texture leaves white is pale here
        return covered, np.divide(drawn.ink, covered, out=np.zeros_like(covered), where=covered > 0)
    whole = 1 - glyph(shape, TEXTURES.index("solid"), extent).through
    place = (np.arange(extent, dtype=np.float32) + 0.5) / extent  # centres of pixels
    x, y = place[None, :, None], place[:, None, None]
    if name == "hollow":  # the rim is opaque, and the inside a thin wash of the same colour
        return np.maximum(covered, _TINT * whole), np.ones_like(whole)
    if name == "solid":
        full = 1 - 0.5 * (x + y) / 2
    elif name == "striped":
        full = _bands(x - y, extent, 3.0)
    else:
        full = 0.5 + 2 * (_bands(x, extent, 2.5) - 0.5) * (_bands(y, extent, 2.5) - 0.5)
    return whole, np.broadcast_to(full, whole.shape)


def _bands(place: np.ndarray, extent: int, count: float) -> np.ndarray:
    """Alternating bands of 0 and 1 with edges about a pixel wide, ``count`` pairs of them from 0 to 1."""
    wave = np.sin(2 * math.pi * count * place)
    return np.clip(0.5 + wave * extent / (2 * math.pi * count), 0, 1).astype(np.float32)
