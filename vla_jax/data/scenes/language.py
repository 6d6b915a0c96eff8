"""Noun phrases, and the sentences that statements, questions and captions share.

Everything is in lower case and without punctuation other than the question mark.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from vla_jax.data.scenes.sampling import Scene, SceneObject
from vla_jax.data.scenes.vocabulary import ATTRIBUTES, NUMBERS, PLACES, PLURALS, RELATIONS, SHAPES, article

MODIFIERS = ("size", "texture", "color")  # in the order in which they stand before a noun

POSITIVE_QUESTIONS = (
    "is there a {}?",
    "is there a {} in the image?",
    "does the image contain a {}?",
    "is a {} present?",
)
NEGATIVE_QUESTIONS = (
    "is there not a {}?",
    "is there not a {} in the image?",
    "does the image not contain a {}?",
    "is no {} present?",
)
COLOR_QUESTIONS = ("what color is the {}?", "what is the color of the {}?")
SHAPE_QUESTIONS = ("what shape is the {} object?", "what is the {} shape?", "what is the shape of the {} object?")
COUNT_QUESTIONS = ("how many {} are there?", "how many {} are in the image?", "how many {} does the image contain?")
PLACE_QUESTIONS = ("where is the {}?", "where in the image is the {}?")


def words_of(thing: SceneObject, modifiers: Sequence[str] = MODIFIERS, noun: str = "") -> str:
    """An object in words, such as ``large striped red circle``; another ``noun`` takes the place of the shape."""
    words = [ATTRIBUTES[name][getattr(thing, name)] for name in MODIFIERS if name in modifiers]
    return " ".join([*words, noun or SHAPES[thing.shape]])


def with_article(words: str) -> str:
    """Words with ``a`` or ``an`` before them."""
    return f"{article(words)} {words}"


def at_place(thing: SceneObject) -> str:
    """Where an object lies, such as ``at the top left``."""
    return f"at the {PLACES[thing.cell]}"


def both(first: str, second: str) -> str:
    """Two noun phrases in one, such as ``a red circle and a blue square``."""
    return f"{with_article(first)} and {with_article(second)}"


def counted(number: int, attribute: str, value: int) -> str:
    """A number of things, such as ``three circles``, ``one circle`` or ``two red objects``."""
    name = ATTRIBUTES[attribute][value]
    if attribute == "shape":
        return f"{NUMBERS[number]} {name if number == 1 else PLURALS[name]}"
    return f"{NUMBERS[number]} {name} {'object' if number == 1 else 'objects'}"


def plural(attribute: str, value: int) -> str:
    """All things with a value, such as ``circles`` or ``red objects``."""
    name = ATTRIBUTES[attribute][value]
    return PLURALS[name] if attribute == "shape" else f"{name} objects"


def relation_words(relation: str, rng: Random) -> str:
    """A relation as it may be said: across also as ``to the left of``."""
    return f"to the {relation}" if RELATIONS[relation][0] == 0 and rng.random() < 0.3 else relation


def opposite(relation: str) -> str:
    """The relation with its direction reversed."""
    axis, direction = RELATIONS[relation]
    return next(name for name, value in RELATIONS.items() if value == (axis, -direction))


def coordinate(cell: int, axis: int) -> int:
    """Column (axis 0) or row (axis 1) of a cell."""
    return cell % 3 if axis == 0 else cell // 3


def holds(relation: str, first: SceneObject, second: SceneObject) -> bool:
    """Whether ``first`` is in this relation to ``second``, by at least one column or row of the grid."""
    axis, direction = RELATIONS[relation]
    return (coordinate(first.cell, axis) - coordinate(second.cell, axis)) * direction > 0


def exist_question(rng: Random, words: str, exists: bool) -> tuple[str, str]:
    """A question whether something is there, in positive or negated form, and its answer."""
    negated = rng.random() < 0.5
    template = rng.choice(NEGATIVE_QUESTIONS if negated else POSITIVE_QUESTIONS)
    return template.format(words), "yes" if exists != negated else "no"


def unique(scene: Scene, thing: SceneObject, same: Callable[[SceneObject], object]) -> bool:
    """Whether no other object of the scene has the same value of ``same``."""
    return sum(same(other) == same(thing) for other in scene.objects) == 1


def color_and_shape(thing: SceneObject) -> tuple[int, int]:
    """The two attributes that name an object in relations and questions."""
    return thing.color, thing.shape
