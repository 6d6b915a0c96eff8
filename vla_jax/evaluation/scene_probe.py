"""A compositional probe of generated scenes whose difficulty grows: quadruples by kind of swap and number of objects.

Every picture of a cell has as many objects, of which two (three for relations) are spoken of; the others are clutter,
none of which the captions fit. What is swapped says what must be bound: an attribute to a shape, things to their
places, or relations to things. With the number of objects grows the number of ways to bind wrongly, while the captions
stay as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vla_jax.data.scenes import SceneConfig, SceneSource
from vla_jax.data.scenes.sampling import MAX_OBJECTS
from vla_jax.errors import UserError, unknown
from vla_jax.evaluation import winoground
from vla_jax.reporting.table import Column, Table

SWAPS: Mapping[str, tuple[Mapping[str, Any], int]] = {
    "color": ({"quadruple_tags": ("Attribute",), "binding_attributes": ("color",)}, 2),
    "size": ({"quadruple_tags": ("Attribute",), "binding_attributes": ("size",)}, 2),
    "texture": ({"quadruple_tags": ("Attribute",), "binding_attributes": ("texture",)}, 2),
    "places": ({"quadruple_tags": ("Object",)}, 2),
    "relations": ({"quadruple_tags": ("Relation",)}, 3),
}
"""By kind of swap, the configuration of its scenes and the fewest objects that it needs."""


@dataclasses.dataclass(frozen=True)
class SceneProbe:
    """Quadruples, cell after cell: all swaps with the fewest objects first, then with more.

    An example has the fields of ``quadruples`` (:class:`vla_jax.data.scenes.SceneSource`) with ``swap``, one of
    :data:`SWAPS`, and ``objects``, their number.

    Attributes:
        length: quadruples in each cell.
        scene: what scenes look like; its tags, binding attributes and numbers of objects are set by the cells.
        split: of the scenes.
        swaps: kinds of swap.
        objects: numbers of objects; cells with fewer than a swap needs are left out.

    Raises:
        UserError: an unknown swap, a number of objects that no scene has, a swap named twice, or no cell.
    """

    length: int = 400
    scene: SceneConfig = dataclasses.field(default_factory=SceneConfig)
    split: str = "test"
    swaps: tuple[str, ...] = tuple(SWAPS)
    objects: tuple[int, ...] = tuple(range(2, MAX_OBJECTS + 1))
    _sources: tuple[SceneSource, ...] = dataclasses.field(init=False, repr=False)

    def __post_init__(self):
        for swap in self.swaps:
            if swap not in SWAPS:
                raise unknown("swap", swap, SWAPS)
        if outside := [number for number in self.objects if not 2 <= number <= MAX_OBJECTS]:
            raise UserError(f"a probe with {outside[0]} objects; scenes with something to swap have 2 to {MAX_OBJECTS}")
        if len(set(self.swaps)) < len(self.swaps) or len(set(self.objects)) < len(self.objects):
            raise UserError(f"swaps {self.swaps} or numbers of objects {self.objects} name one twice")
        if not self.cells:
            raise UserError(f"no swap of {self.swaps} can be made among {self.objects} objects; relations need three")
        sources = []
        for swap, number in self.cells:
            config = dataclasses.replace(self.scene, min_objects=number, max_objects=number, **SWAPS[swap][0])
            sources.append(SceneSource(self.split, "quadruples", config, length=self.length))
        object.__setattr__(self, "_sources", tuple(sources))

    @property
    def cells(self) -> list[tuple[str, int]]:
        """The swap and number of objects of each cell, in order."""
        return [(swap, number) for number in self.objects for swap in self.swaps if number >= SWAPS[swap][1]]

    def __len__(self) -> int:
        return self.length * len(self.cells)

    def __getitem__(self, index: int) -> dict[str, Any]:
        cell, place = divmod(int(index), self.length)
        swap, number = self.cells[cell]
        return self._sources[cell][place] | {"id": int(index), "swap": swap, "objects": number}

    @property
    def difficulty(self) -> tuple[np.ndarray, np.ndarray]:
        """The swap, text [examples], and the number of objects, int [examples]; draws nothing."""
        swaps, numbers = zip(*self.cells, strict=True)
        return np.repeat(swaps, self.length), np.repeat(numbers, self.length)


def by_difficulty(
    scores: np.ndarray, swaps: Sequence[str] | np.ndarray, objects: Sequence[int] | np.ndarray
) -> list[dict[str, Any]]:
    """Scores by kind of swap and number of objects.

    Args:
        scores: float [examples, 2 captions, 2 images] or [seeds, examples, 2, 2].
        swaps: [examples], the kind of swap of each.
        objects: [examples], the number of objects in each.

    Returns:
        A row a cell, in the order of :data:`SWAPS` and of numbers: ``swap``, ``objects`` and the fields of
        :class:`vla_jax.evaluation.winoground.Scores`.

    Raises:
        UserError: as many swaps, numbers and scores are not given.
    """
    scores, swaps, objects = np.asarray(scores), np.asarray(swaps), np.asarray(objects)
    if scores.ndim < 3 or not scores.shape[-3] == len(swaps) == len(objects):
        raise UserError(
            f"scores {scores.shape} of {len(swaps)} swaps and {len(objects)} numbers of objects; each example needs "
            "one of each"
        )
    order = {name: place for place, name in enumerate(SWAPS)}
    cells = sorted(set(zip(swaps.tolist(), objects.tolist(), strict=True)), key=lambda cell: (order[cell[0]], cell[1]))
    rows = []
    for swap, number in cells:
        at = np.flatnonzero((swaps == swap) & (objects == number))
        found = winoground.evaluate(scores[..., at, :, :])
        rows.append({"swap": swap, "objects": number} | vars(found))
    return rows


def table(rows: Sequence[Mapping[str, Any]], title: str = "") -> Table:
    """The rows of :func:`by_difficulty` for people and files."""
    columns = [
        Column.text("swap", "Swapped"),
        Column.number("objects", "Objects", format=",d"),
        Column.number("examples", "Quadruples", format=",d"),
        *(Column.accuracy(part, part.capitalize(), "range") for part in winoground.CHANCE),
        *(Column.percent(f"{part}_ties", f"{part.capitalize()} ties") for part in winoground.CHANCE),
    ]
    return Table(columns, rows, title)
