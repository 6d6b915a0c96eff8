"""Twins, scenes that differ by one swap, and quadruples of two scenes and two captions made of the same words.

Quadruples have the format of Winoground (Thrush et al. 2022, https://arxiv.org/abs/2204.03162): ``caption_0`` is true
of ``image_0`` alone and ``caption_1`` of ``image_1`` alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

from vla_jax.data.scenes import captions, language
from vla_jax.data.scenes.language import color_and_shape, words_of
from vla_jax.data.scenes.sampling import SWAPS, Scene, SceneConfig, SceneObject, draw_count, draw_scene, settle
from vla_jax.data.scenes.statements import BINDING_TEMPLATES, draw_cells, draw_group
from vla_jax.data.scenes.vocabulary import RELATIONS

# Winoground collapses its tags to what is swapped: noun phrases (Object) or anything else (Relation).
COLLAPSED_TAGS = {"Object": "Object", "Attribute": "Relation", "Relation": "Relation"}


@dataclass(frozen=True)
class Quadruple:
    """Two scenes, two captions of the same words, and Winoground's tags."""

    scenes: tuple[Scene, Scene]
    captions: tuple[str, str]
    tag: str
    secondary_tag: str
    num_main_preds: int

    @property
    def collapsed_tag(self) -> str:
        """``Object`` or ``Relation``."""
        return COLLAPSED_TAGS[self.tag]


def swap(scene: Scene, first: int, second: int, what: str) -> Scene:
    """The scene with one attribute, or the cells, of two objects exchanged; everything else as it was."""
    objects = list(scene.objects)
    one, other = objects[first], objects[second]
    objects[first], objects[second] = _with(one, other, what), _with(other, one, what)
    return replace(scene, objects=tuple(objects))


def _with(thing: SceneObject, other: SceneObject, what: str) -> SceneObject:
    changes: Mapping[str, float] = {what: getattr(other, what)}
    if what == "size":
        changes = {"size": other.size, "scale": other.scale}
    elif what == "cell":
        columns, rows = (language.coordinate(other.cell, a) - language.coordinate(thing.cell, a) for a in (0, 1))
        changes = {"cell": other.cell, "x": thing.x + columns / 3, "y": thing.y + rows / 3}
    return settle(replace(thing, **changes))


def possible_swaps(scene: Scene) -> dict[str, list[tuple[int, int]]]:
    """The pairs of objects between which each swap changes the content; swaps without such a pair are left out."""
    found: dict[str, list[tuple[int, int]]] = {}
    for second, other in enumerate(scene.objects):
        for first, one in enumerate(scene.objects[:second]):
            differing = [name for name in SWAPS[:-1] if getattr(one, name) != getattr(other, name)]
            for what in [*differing, "cell"] if differing else []:
                found.setdefault(what, []).append((first, second))
    return found


def hard_twins(scene: Scene, rng: Random) -> Scene | None:
    """A scene that differs by one attribute, or the places, swapped between two objects; of the same split.

    Returns:
        The twin; None where no swap changes the content (a single object, or objects that are all alike).
    """
    drawn = _draw_swap(scene, rng)
    return None if drawn is None else swap(scene, *drawn)


def _draw_swap(scene: Scene, rng: Random, allowed: Sequence[str] = SWAPS) -> tuple[int, int, str] | None:
    found = {what: pairs for what, pairs in possible_swaps(scene).items() if what in allowed}
    if not found:
        return None
    what = rng.choice(list(found))
    return *rng.choice(found[what]), what


def draw_twins(rng: Random, config: SceneConfig, split: str) -> tuple[Scene, Scene, str, str, str]:
    """Draws a scene and its twin with captions that are true of their own scene and false of the other.

    Returns:
        Scene, twin, caption, the twin's caption, and what was swapped.
    """
    while True:
        scene = draw_scene(rng, config, split, draw_count(rng, config, least=2))
        drawn = _draw_swap(scene, rng, config.twin_swaps)
        if drawn is not None:
            break
    twin = swap(scene, *drawn)
    first, second, what = drawn
    seed = rng.getrandbits(64)  # one for both, so that both captions have the same form and order
    texts = None
    if rng.random() < config.twin_pair_share:
        texts = [_pair_caption(s, s.objects[first], s.objects[second], what, Random(seed)) for s in (scene, twin)]
        if not _tell_apart(scene, twin, first, second, what):
            texts = None
    if texts is None:
        texts = [captions.full_caption(s, Random(seed)) for s in (scene, twin)]
    return scene, twin, texts[0], texts[1], what


def _pair_caption(scene: Scene, one: SceneObject, other: SceneObject, what: str, rng: Random) -> str:
    if what == "cell":
        return captions.relation_sentence(
            words_of(one, ("color",)), first_relation(one, other), words_of(other, ("color",)), rng
        )
    modifiers = _pair_modifiers(what)
    return rng.choice(BINDING_TEMPLATES).format(language.both(words_of(one, modifiers), words_of(other, modifiers)))


def _pair_modifiers(what: str) -> tuple[str, ...]:
    return ("color",) if what in ("shape", "color") else (what,)


def first_relation(one: SceneObject, other: SceneObject) -> str:
    """A relation in which ``one`` is to ``other``; where two hold, the one across."""
    return next(name for name in RELATIONS if language.holds(name, one, other))


def _tell_apart(scene: Scene, twin: Scene, first: int, second: int, what: str) -> bool:
    """Whether a caption of the two swapped objects alone is false of the other scene, both ways."""
    if what == "cell":
        return all(language.unique(scene, scene.objects[index], color_and_shape) for index in (first, second))
    modifiers = _pair_modifiers(what)

    def named(of: Scene, indices: tuple[int, ...]) -> set[str]:
        return {words_of(of.objects[index], modifiers) for index in indices}

    everything = tuple(range(len(scene.objects)))
    pair = (first, second)
    return not (named(scene, pair) <= named(twin, everything) or named(twin, pair) <= named(scene, everything))


def draw_quadruple(rng: Random, config: SceneConfig, split: str) -> Quadruple:
    """Draws a quadruple of one of the configuration's tags.

    ``Attribute``: two objects exchange an attribute. ``Object``: two objects exchange places. ``Relation``: an object
    has one relation to a second and one to a third, and the relations are exchanged.

    Raises:
        UserError: the configuration allows too few objects (``Relation`` needs three), shapes or colours.
    """
    tag = rng.choice(config.quadruple_tags)
    if tag == "Attribute":
        what = rng.choice(config.binding_attributes)
        return attribute_quadruple(rng, draw_group(rng, config, split, what, 2), what)
    if tag == "Object":
        relation = rng.choice(tuple(RELATIONS))
        scene = draw_group(rng, config, split, "color", 2, lambda rng: draw_cells(rng, *RELATIONS[relation]))
        return object_quadruple(rng, scene, relation)
    return relation_quadruple(rng, draw_group(rng, config, split, "color", 3, corner_cells))


def attribute_quadruple(rng: Random, scene: Scene, what: str) -> Quadruple:
    """The scene and its twin whose first two objects have exchanged an attribute."""
    twin = swap(scene, 0, 1, what)
    template = rng.choice(BINDING_TEMPLATES)
    texts = [template.format(language.both(*(words_of(o, (what,)) for o in s.objects[:2]))) for s in (scene, twin)]
    return Quadruple((scene, twin), (texts[0], texts[1]), "Attribute", f"Adjective-{what.capitalize()}", 1)


def object_quadruple(rng: Random, scene: Scene, relation: str) -> Quadruple:
    """The scene and its twin whose first two objects, which are in this relation, have exchanged places."""
    twin = swap(scene, 0, 1, "cell")
    one, other = scene.objects[:2]
    words = words_of(one, ("color",)), words_of(other, ("color",))
    seed = rng.getrandbits(64)
    texts = [captions.relation_sentence(a, relation, b, Random(seed)) for a, b in (words, words[::-1])]
    return Quadruple((scene, twin), (texts[0], texts[1]), "Object", "Noun Phrase", 1)


def relation_quadruple(rng: Random, scene: Scene) -> Quadruple:
    """The scene and its twin whose second and third object have exchanged places; they lie as :func:`corner_cells`."""
    twin = swap(scene, 1, 2, "cell")
    centre, second, third = scene.objects[:3]
    relations = [language.relation_words(first_relation(centre, thing), rng) for thing in (second, third)]
    start, middle, end = (language.with_article(words_of(thing, ("color",))) for thing in scene.objects[:3])
    texts = [f"{start} {a} {middle} and {b} {end}" for a, b in (relations, relations[::-1])]
    return Quadruple((scene, twin), (texts[0], texts[1]), "Relation", "Preposition", 2)


def corner_cells(rng: Random) -> tuple[int, int, int]:
    """A cell, another one in its row, and another one in its column."""
    row, column = rng.randrange(3), rng.randrange(3)
    beside = rng.choice([other for other in range(3) if other != column])
    under = rng.choice([other for other in range(3) if other != row])
    return 3 * row + column, 3 * row + beside, 3 * under + column
