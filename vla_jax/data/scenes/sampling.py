"""Scenes and how they are drawn: a pure function of a seed, with splits that share no content.

The key that assigns a scene to a split holds only what swaps leave unchanged: for each attribute the multiset of its
values, and the multiset of cells. Two scenes of different splits therefore never have the same content, a scene and any
twin made by swapping attributes or places always lie in the same split, and within a split the distribution of scenes
stays exactly symmetric under swaps, which the balance of the statements rests on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from vla_jax.data.scenes.shift import Shift
from vla_jax.data.scenes.vocabulary import ATTRIBUTES, COLORS, PLACES, SHAPES, SIZES, STATEMENT_KINDS, TEXTURES
from vla_jax.errors import UserError, unknown

SPLITS = ("train", "validation", "test")
MAX_OBJECTS = 5
# Buckets of the key's hash: 0 is test, 1 is validation, the other eight are train.
_BUCKETS = 10
_HELD_OUT = {0: "test", 1: "validation"}
_ATTEMPTS = 1000
SWAPS = (*ATTRIBUTES, "cell")
"""What twins may have exchanged: an attribute, or places."""
_ALL_IDS = {name: tuple(range(len(values))) for name, values in ATTRIBUTES.items()}
# What an object keeps free on each side of its cell, in picture widths: three quarters of a pixel at 64 pixels, which
# is the largest error that rounding to pixels can make, so boxes in neighbouring cells never overlap.
_MARGIN = 0.012
# More jitter would let small objects of one row look as if one lay above the other.
_MAX_JITTER = 0.04
_MAX_SCALE = 1 / 3 - 2 * _MARGIN
# An object alone in its picture may be larger than a cell, as long as its centre can still lie in a corner cell.
_MAX_SCALE_ALONE = 0.64


class NoContent(UserError):
    """No scene with what was pinned lies in the split, or none was found."""


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One object: attributes as ids into :data:`vocabulary.ATTRIBUTES`, and where it lies.

    Attributes:
        shape: id of the shape.
        color: id of the colour.
        size: id of the size word.
        texture: id of the texture.
        cell: cell of the 3 x 3 grid, in reading order.
        x: centre across, in picture widths from the left edge.
        y: centre down, in picture heights from the top edge.
        scale: extent (the longer side of the bounding box), in picture widths.
    """

    shape: int
    color: int
    size: int
    texture: int
    cell: int
    x: float
    y: float
    scale: float


@dataclass(frozen=True, slots=True)
class Scene:
    """One to five objects in different cells, on a light background (RGB, 0 to 255)."""

    objects: tuple[SceneObject, ...]
    background: tuple[int, int, int] = (245, 245, 245)


@dataclass(frozen=True)
class CaptionWeights:
    """How often each kind of caption is drawn; relative, and 0 leaves a kind out.

    Kinds that need two objects count as ``short`` where the scene has one.
    """

    full: float = 0.4
    short: float = 0.25
    relation: float = 0.15
    count: float = 0.1
    question: float = 0.1

    def __post_init__(self) -> None:
        weights = vars(self)
        if min(weights.values()) < 0 or sum(weights.values()) <= 0:
            raise UserError(f"caption weights {weights} must not be negative, and one at least must be positive")


@dataclass(frozen=True)
class SceneConfig:
    """What scenes look like and what is said about them.

    Attributes:
        seed: of everything; examples are a function of (seed, split, kind, index).
        length: number of examples of a source that is not told its length.
        image_size: side of the pictures, in pixels; at least 32.
        min_objects: fewest objects in a scene; a kind that needs more (a relation needs two) has more.
        max_objects: most objects in a scene, 1 to 5.
        shapes: shapes to draw from.
        colors: colours to draw from.
        sizes: size words to draw from.
        textures: textures to draw from.
        small: least and greatest extent of a small object, in picture widths.
        large: the same for a large one. Above 0.309 a cell is too small for it: that needs ``max_objects=1``.
        caption_weights: how often each kind of caption is drawn.
        statement_kinds: kinds of statements to draw from, equally often.
        question_kinds: kinds of questions to draw from, equally often.
        quadruple_tags: kinds of quadruples to draw from, equally often.
        binding_attributes: attributes that binding statements and attribute-swap quadruples tie to shapes.
        twin_swaps: what twins have exchanged, drawn equally often of those that change the scene.
        twin_pair_share: share of twins whose captions tell of the two exchanged objects alone, where that tells the
            twins apart; the others' captions are full.
        patch_grid: if positive, captions and twins also carry ``patch_labels`` on a grid of this many patches a side,
            and ``objects`` as padded arrays.
        shift: the world in which pictures show the scenes; None for the plain one. What scenes are drawn, and what is
            said of them, does not depend on it.
    """

    seed: int = 0
    length: int = 100_000
    image_size: int = 64
    min_objects: int = 1
    max_objects: int = MAX_OBJECTS
    shapes: tuple[str, ...] = SHAPES
    colors: tuple[str, ...] = COLORS
    sizes: tuple[str, ...] = SIZES
    textures: tuple[str, ...] = TEXTURES
    small: tuple[float, float] = (0.19, 0.22)
    large: tuple[float, float] = (0.28, 0.305)
    caption_weights: CaptionWeights = field(default_factory=CaptionWeights)
    statement_kinds: tuple[str, ...] = STATEMENT_KINDS
    question_kinds: tuple[str, ...] = ("exist", "color", "shape", "count", "place")
    quadruple_tags: tuple[str, ...] = ("Object", "Attribute", "Relation")
    binding_attributes: tuple[str, ...] = ("color",)
    twin_swaps: tuple[str, ...] = SWAPS
    twin_pair_share: float = 0.5
    patch_grid: int = 0
    shift: Shift | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.min_objects <= self.max_objects <= MAX_OBJECTS:
            raise UserError(
                f"objects from {self.min_objects} to {self.max_objects}: need 1 <= min_objects <= max_objects <= "
                f"{MAX_OBJECTS}"
            )
        if self.image_size < 32:
            raise UserError(f"image_size {self.image_size} is too small to tell objects apart; give 32 or more")
        if self.length < 1:
            raise UserError(f"length {self.length} must be at least 1")
        for name, allowed in ATTRIBUTES.items():
            _check_names(name, getattr(self, f"{name}s"), allowed)
        defaults = type(self).__dataclass_fields__
        for name in ("statement_kinds", "question_kinds", "quadruple_tags", "twin_swaps"):
            _check_names(name[:-1].replace("_", " "), getattr(self, name), defaults[name].default)
        _check_names("binding attribute", self.binding_attributes, ("color", "size", "texture"))
        if not 0 <= self.twin_pair_share <= 1:
            raise UserError(f"twin_pair_share is a share, 0 to 1; got {self.twin_pair_share}")
        limit = _MAX_SCALE_ALONE if self.max_objects == 1 else _MAX_SCALE
        for name in ("small", "large"):
            least, greatest = getattr(self, name)
            if not 0.05 <= least <= greatest <= limit:
                raise UserError(
                    f"{name} {least} to {greatest}: need 0.05 <= least <= greatest <= {limit:.3f} with max_objects "
                    f"{self.max_objects} (up to {_MAX_SCALE_ALONE} with max_objects=1)"
                )
        if self.patch_grid and (self.patch_grid < 0 or self.image_size % self.patch_grid):
            raise UserError(f"patch_grid {self.patch_grid} must divide image_size {self.image_size}")


def _check_names(kind: str, given: Sequence[str], allowed: Sequence[str]) -> None:
    if not given:
        raise UserError(f"no {kind} given; allowed: {', '.join(allowed)}")
    for name in given:
        if name not in allowed:
            raise unknown(kind, name, allowed)
    if len(set(given)) < len(given):
        raise UserError(f"a {kind} stands twice in {tuple(given)}")


def seeded(*parts: object) -> Random:
    """A generator seeded by these parts: the same in every process and on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return Random(int.from_bytes(digest, "big"))


def content_key(scene: Scene) -> bytes:
    """The scene's content as far as swaps leave it unchanged; see the module's docstring."""
    return _key([(o.shape, o.color, o.size, o.texture) for o in scene.objects], [o.cell for o in scene.objects])


def _key(rows: Iterable[Iterable[int]], cells: Sequence[int]) -> bytes:
    return b"".join(bytes(sorted(values)) for values in (*zip(*rows, strict=True), cells))


def _split_of_key(key: bytes) -> str:
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return _HELD_OUT.get(int.from_bytes(digest, "big") % _BUCKETS, "train")


def split_of(scene: Scene) -> str:
    """The split that a scene belongs to by its content."""
    return _split_of_key(content_key(scene))


def check_split(split: str) -> str:
    """``split`` itself if it is one of :data:`SPLITS`; else raises :class:`UserError`."""
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    return split


def allowed_ids(config: SceneConfig, attribute: str) -> tuple[int, ...]:
    """The ids of an attribute that the configuration allows."""
    if getattr(config, f"{attribute}s") is ATTRIBUTES[attribute]:
        return _ALL_IDS[attribute]
    names = ATTRIBUTES[attribute]
    return tuple(names.index(name) for name in getattr(config, f"{attribute}s"))


def draw_count(rng: Random, config: SceneConfig, least: int = 1) -> int:
    """A number of objects, uniform over what the configuration allows from ``least`` on.

    Raises:
        UserError: the configuration's ``max_objects`` is below ``least``.
    """
    if config.max_objects < least:
        raise UserError(f"this kind of example needs {least} objects; max_objects is {config.max_objects}, raise it")
    return rng.randint(max(config.min_objects, least), config.max_objects)


def draw_scene(
    rng: Random,
    config: SceneConfig,
    split: str,
    count: int | None = None,
    pinned: Sequence[Mapping[str, int]] = (),
    cells: Callable[[Random], Sequence[int]] | None = None,
    others: Callable[[Mapping[str, int]], bool] | None = None,
) -> Scene:
    """Draws a scene of a split.

    What is pinned is decided before and never redrawn; the rest is drawn again, as a whole, until the content lies in
    the split. So the distribution of what is pinned is the same in every split.

    Args:
        rng: source of randomness.
        config: what may be drawn.
        split: the split that the content must lie in.
        count: number of objects; drawn from the configuration if not given.
        pinned: attribute ids of the first objects, each a mapping that may leave attributes open.
        cells: draws the cells of the first objects.
        others: which attributes the objects beyond the pinned ones may have; anything if not given.

    Returns:
        The scene; its first objects are the pinned ones.

    Raises:
        NoContent: no content in the split was found.
    """
    choices = [(name, allowed_ids(config, name)) for name in ATTRIBUTES]
    draw = rng.random
    for _ in range(_ATTEMPTS):
        number = draw_count(rng, config, least=max(1, len(pinned))) if count is None else count
        rows: list[dict[str, int]] = []
        while len(rows) < number:
            row = {name: ids[int(draw() * len(ids))] for name, ids in choices}
            if len(rows) < len(pinned):
                row.update(pinned[len(rows)])
            elif others is not None and not others(row):
                break
            rows.append(row)
        if len(rows) < number:
            continue
        placed = list(cells(rng)) if cells is not None else []
        while len(placed) < number:
            cell = int(draw() * len(PLACES))
            if cell not in placed:
                placed.append(cell)
        if _split_of_key(_key([row.values() for row in rows], placed)) == split:
            background = (230 + int(draw() * 26), 230 + int(draw() * 26), 230 + int(draw() * 26))
            objects = tuple(_place(rng, config, row, cell) for row, cell in zip(rows, placed, strict=True))
            return Scene(objects, background)
    raise NoContent(
        f"no scene with the objects asked for lies in split {split!r}; allow more shapes, colors, sizes or textures"
    )


def _place(rng: Random, config: SceneConfig, row: Mapping[str, int], cell: int) -> SceneObject:
    least, greatest = config.small if SIZES[row["size"]] == "small" else config.large
    scale = least + (greatest - least) * rng.random()
    jitter = _jitter(scale)
    x = (2 * (cell % 3) + 1) / 6 + jitter * (2 * rng.random() - 1)
    y = (2 * (cell // 3) + 1) / 6 + jitter * (2 * rng.random() - 1)
    thing = SceneObject(row["shape"], row["color"], row["size"], row["texture"], cell, x, y, scale)
    return thing if scale <= _MAX_SCALE else settle(thing)


def _jitter(scale: float) -> float:
    """How far from its cell's centre an object may lie so that it keeps to its cell."""
    return max(0.0, min(_MAX_JITTER, (1 / 3 - scale) / 2 - _MARGIN))


def settle(thing: SceneObject) -> SceneObject:
    """The object moved as little as needed to keep to its cell; one larger than a cell is moved into the picture."""
    jitter, low = _jitter(thing.scale), thing.scale / 2 + _MARGIN / 2
    centre = []
    for value, index in ((thing.x, thing.cell % 3), (thing.y, thing.cell // 3)):
        middle = (2 * index + 1) / 6
        kept = min(max(value, middle - jitter), middle + jitter)
        centre.append(min(max(kept, low), 1 - low))
    if centre == [thing.x, thing.y]:
        return thing
    return replace(thing, x=centre[0], y=centre[1])


def same_content(first: Scene, second: Scene) -> bool:
    """Whether two scenes have the same attributes in the same cells, wherever in the cells the objects lie."""
    return _content(first) == _content(second)


def _content(scene: Scene) -> set[tuple[Any, ...]]:
    return {(o.cell, o.shape, o.color, o.size, o.texture) for o in scene.objects}
