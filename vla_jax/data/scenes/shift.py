"""Another world of the same scenes: the same objects under the same names, seen otherwise.

A shifted scene has the shapes, places, sizes and annotations of the plain one. Its colours are dull and lie elsewhere,
though they keep their names; its textures are drawn in another way; it lies on a darker ground that is crossed by
strokes; and its picture is noisy. A model that knows the plain scenes meets in it a domain that is new to it, of which
everything is known.
"""

from __future__ import annotations

from dataclasses import dataclass

from vla_jax.errors import UserError

Color = tuple[int, int, int]

DULL: tuple[Color, ...] = (
    (142, 52, 66),  # red
    (58, 112, 66),  # green
    (56, 66, 124),  # blue
    (24, 24, 30),  # black
    (92, 94, 102),  # gray
    (36, 92, 106),  # teal
    (92, 62, 44),  # brown
    (158, 142, 62),  # yellow
)
"""A colour for each name of :data:`vla_jax.data.scenes.vocabulary.COLORS`, in their order."""


@dataclass(frozen=True)
class Shift:
    """How shifted scenes look.

    Attributes:
        palette: RGB of each colour name, in the order of the names.
        background: darkest and lightest level of the ground, 0 to 255, which changes across the picture.
        strokes: how many strokes cross the ground behind the objects.
        noise: standard deviation of the noise on each channel of each pixel, in levels.
        textures: whether textures are drawn in another way: solid shaded, stripes slanted, dots as a chequerboard,
            hollow with a tinted inside.
    """

    palette: tuple[Color, ...] = DULL
    background: tuple[int, int] = (130, 210)
    strokes: int = 14
    noise: float = 14.0
    textures: bool = True

    def __post_init__(self) -> None:
        levels = [level for color in self.palette for level in color]
        if len(self.palette) != len(DULL) or len(levels) != 3 * len(DULL) or not _are_levels(levels):
            raise UserError(
                f"a shifted palette has {len(DULL)} colours of three levels from 0 to 255, one for each name; given "
                f"{self.palette}"
            )
        low, high = self.background
        if not _are_levels(self.background) or low > high:
            raise UserError(
                f"the background of shifted scenes lies between two levels from 0 to 255, the darker one first; given "
                f"{self.background}"
            )
        if self.strokes < 0 or self.noise < 0:
            raise UserError(f"strokes {self.strokes} and noise {self.noise} of shifted scenes cannot be negative")


def _are_levels(values: tuple[int, ...] | list[int]) -> bool:
    return all(0 <= value <= 255 for value in values)
