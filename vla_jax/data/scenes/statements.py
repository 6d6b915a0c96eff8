"""Statements that are true or false of a picture, and questions with answers; neither text nor picture tells alone.

Why the text alone stays at 50 %: the label is a fair coin, independent of everything, and the text is a function of
what was pinned and the label. For each label the text has the same distribution, because what is pinned is uniform on a
set that the change from true to false maps onto itself: swapping the two values of a binding, taking the opposite
relation, replacing a number by another one drawn uniformly. Why the picture alone stays there: the label is independent
of it.
:func:`sampling.draw_scene` never redraws what is pinned, so this holds in every split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random

from vla_jax.data.scenes import language
from vla_jax.data.scenes.sampling import (
    MAX_OBJECTS,
    Scene,
    SceneConfig,
    SceneObject,
    allowed_ids,
    draw_count,
    draw_scene,
)
from vla_jax.data.scenes.vocabulary import ATTRIBUTES, COLORS, NUMBERS, PLACES, RELATIONS, SHAPES
from vla_jax.errors import UserError

MAX_STATED_COUNT = 4

BINDING_TEMPLATES = ("there is {}", "{}")
COUNT_TEMPLATES = ("there {} exactly {}", "{1}", "exactly {1}")
Pair = tuple[tuple[int, int], tuple[int, int]]


def draw_distinct(rng: Random, config: SceneConfig, attribute: str, count: int = 2) -> list[int]:
    """Different values of an attribute, in random order.

    Raises:
        UserError: the configuration allows too few values.
    """
    values = allowed_ids(config, attribute)
    if len(values) < count:
        raise UserError(f"this kind of example needs {count} values of {attribute}; allowed are {len(values)}")
    return rng.sample(values, count)


def draw_group(
    rng: Random,
    config: SceneConfig,
    split: str,
    attribute: str,
    count: int,
    cells: Callable[[Random], Sequence[int]] | None = None,
) -> Scene:
    """Draws a scene whose first ``count`` objects differ from each other in shape and in ``attribute``.

    No other object has one of these shapes together with one of these values, so exchanging values within the group
    makes every description of its members false.
    """
    shapes = draw_distinct(rng, config, "shape", count)
    values = draw_distinct(rng, config, attribute, count)
    pinned = [{"shape": shape, attribute: value} for shape, value in zip(shapes, values, strict=True)]

    def others(row: Mapping[str, int]) -> bool:
        return row["shape"] not in shapes or row[attribute] not in values

    return draw_scene(rng, config, split, draw_count(rng, config, least=count), pinned, cells, others)


def draw_cells(rng: Random, axis: int, direction: int) -> tuple[int, int]:
    """Two cells in different columns (axis 0) or rows (axis 1), anywhere along the other axis.

    The first has the smaller column or row if ``direction`` is -1, the larger one if it is 1.
    """
    along = sorted(rng.sample(range(3), 2), reverse=direction > 0)
    across = rng.randrange(3), rng.randrange(3)
    first, second = (a + 3 * b if axis == 0 else 3 * a + b for a, b in zip(along, across, strict=True))
    return first, second


def binding_statement(attribute: str, pair: Pair, label: int, template: str) -> str:
    """Says that two things of (value, shape) are there; label 0 exchanges their values."""
    (first_value, first_shape), (second_value, second_shape) = pair
    if not label:
        first_value, second_value = second_value, first_value
    names = ATTRIBUTES[attribute]
    words = f"{names[first_value]} {SHAPES[first_shape]}", f"{names[second_value]} {SHAPES[second_shape]}"
    return template.format(language.both(*words))


def relation_statement(rng: Random, one: SceneObject, relation: str, other: SceneObject) -> str:
    """Says where a thing lies from another."""
    said = language.relation_words(relation, rng)
    first, second = (language.words_of(thing, ("color",)) for thing in (one, other))
    return f"the {first} is {said} the {second}"


def count_statement(attribute: str, value: int, number: int, template: str) -> str:
    """Says how many things share a value."""
    return template.format("is" if number == 1 else "are", language.counted(number, attribute, value))


def draw_statement(rng: Random, config: SceneConfig, split: str) -> tuple[Scene, str, int, str]:
    """Draws a statement and its scene.

    Returns:
        The scene, the text, the label (1 true, 0 false) and the kind (``binding``, ``relation``, ``count``).
    """
    kind = rng.choice(config.statement_kinds)
    label = rng.randrange(2)
    if kind == "binding":
        attribute = rng.choice(config.binding_attributes)
        scene = draw_group(rng, config, split, attribute, 2)
        first, second = ((getattr(o, attribute), o.shape) for o in scene.objects[:2])
        text = binding_statement(attribute, (first, second), label, rng.choice(BINDING_TEMPLATES))
    elif kind == "relation":
        relation = rng.choice(tuple(RELATIONS))
        scene = draw_group(rng, config, split, "color", 2, lambda rng: draw_cells(rng, *RELATIONS[relation]))
        text = relation_statement(
            rng, scene.objects[0], relation if label else language.opposite(relation), scene.objects[1]
        )
    else:
        greatest = min(MAX_STATED_COUNT, config.max_objects)
        if greatest < 2:
            raise UserError("count statements need max_objects of at least 2, or a false number could not be said")
        scene, attribute, value, number = _draw_counted(rng, config, split, greatest)
        if not label:
            number = rng.choice([other for other in range(1, greatest + 1) if other != number])
        text = count_statement(attribute, value, number, rng.choice(COUNT_TEMPLATES))
    return scene, text, label, kind


def _draw_counted(rng: Random, config: SceneConfig, split: str, greatest: int) -> tuple[Scene, str, int, int]:
    """A scene with exactly so many objects of a value, the number uniform from 1 to ``greatest``."""
    attribute = rng.choice(("shape", "color"))
    value = rng.choice(allowed_ids(config, attribute))
    number = rng.randint(1, greatest)
    total = draw_count(rng, config, least=number)
    scene = draw_scene(
        rng, config, split, total, [{attribute: value}] * number, None, lambda row: row[attribute] != value
    )
    return scene, attribute, value, number


def draw_question(rng: Random, config: SceneConfig, split: str) -> tuple[Scene, str, str, str]:
    """Draws a question and its scene; each kind's answers are equally frequent whatever the question says.

    Returns:
        The scene, the question, the answer (one of :data:`vocabulary.ANSWERS`) and the kind.
    """
    kind = rng.choice(config.question_kinds)
    if kind == "exist":
        scene = draw_group(rng, config, split, "color", 2)
        exists = rng.random() < 0.5
        color, shape = scene.objects[0].color, scene.objects[0 if exists else 1].shape
        question, answer = language.exist_question(rng, f"{COLORS[color]} {SHAPES[shape]}", exists)
    elif kind in ("color", "shape"):
        # The other of the two attributes names the object, so nothing else may share it.
        named = "shape" if kind == "color" else "color"
        pinned = {name: rng.choice(allowed_ids(config, name)) for name in ("color", "shape")}
        scene = draw_scene(rng, config, split, pinned=[pinned], others=lambda row: row[named] != pinned[named])
        templates = language.COLOR_QUESTIONS if kind == "color" else language.SHAPE_QUESTIONS
        question = rng.choice(templates).format(ATTRIBUTES[named][pinned[named]])
        answer = ATTRIBUTES[kind][pinned[kind]]
    elif kind == "count":
        scene, attribute, value, number = _draw_counted(rng, config, split, min(MAX_OBJECTS, config.max_objects))
        question = rng.choice(language.COUNT_QUESTIONS).format(language.plural(attribute, value))
        answer = NUMBERS[number]
    else:
        pinned = {name: rng.choice(allowed_ids(config, name)) for name in ("color", "shape")}
        cell = rng.randrange(len(PLACES))
        scene = draw_scene(
            rng, config, split, pinned=[pinned], cells=lambda rng: (cell,),
            others=lambda row: (row["color"], row["shape"]) != (pinned["color"], pinned["shape"]),
        )  # fmt: skip
        words = language.words_of(scene.objects[0], ("color",))
        question, answer = rng.choice(language.PLACE_QUESTIONS).format(words), PLACES[cell]
    return scene, question, answer, kind


def draw_phrase(rng: Random, config: SceneConfig, split: str) -> tuple[Scene, str, int]:
    """Draws a scene and a phrase that one of its objects alone answers to.

    Returns:
        The scene, the phrase, and the index of the object.
    """
    scene = draw_scene(rng, config, split)
    index = rng.randrange(len(scene.objects))
    return scene, phrase_of(rng, scene, index), index


def phrase_of(rng: Random, scene: Scene, index: int) -> str:
    """A phrase that this object of the scene alone answers to."""
    thing = scene.objects[index]
    choices = [f"the object {language.at_place(thing)}"]
    for modifiers in ((), ("color",), ("size", "color"), ("texture", "color"), language.MODIFIERS):
        words = language.words_of(thing, modifiers)
        if sum(language.words_of(other, modifiers) == words for other in scene.objects) == 1:
            choices.append(f"the {words}")
    return rng.choice(choices)
