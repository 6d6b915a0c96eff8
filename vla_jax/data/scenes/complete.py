"""One scene and everything that is said of it: captions, questions, statements, phrases, a class and a quadruple.

The statements keep the balance of :mod:`statements`, each by itself: what a statement is about (the two or three
objects of the group, and how many things share the first one's value) is drawn uniformly and never redrawn, and of each
kind there is one true statement and one false one, whose texts have the same distribution.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from vla_jax.data.scenes import captions, language, quadruples, statements
from vla_jax.data.scenes.quadruples import Quadruple
from vla_jax.data.scenes.sampling import Scene, SceneConfig, allowed_ids, draw_count, draw_scene
from vla_jax.data.scenes.vocabulary import ATTRIBUTES, COLORS, NUMBERS, PLACES, RELATIONS, SHAPES
from vla_jax.errors import UserError

CAPTIONS = 5
"""Captions of a scene, as COCO's pictures have."""
_ATTEMPTS = 10 * CAPTIONS


@dataclass(frozen=True)
class Complete:
    """A scene whose first objects differ from each other, with what its texts are about.

    Attributes:
        scene: its first ``members`` objects differ in shape, colour and ``attribute``, and the second one's shape and
            colour are nobody else's.
        members: 2, or 3 where the quadruple exchanges relations.
        attribute: what binding statements tie to shapes.
        relation: in which the first object is to the second.
        counted: ``shape`` or ``color``: of which value of the first object there are ``number`` things.
        number: how many.
        greatest: the largest number that was possible.
        tag: the quadruple's.
    """

    scene: Scene
    members: int
    attribute: str
    relation: str
    counted: str
    number: int
    greatest: int
    tag: str

    @property
    def value(self) -> int:
        """The id of the value that ``number`` things share."""
        return getattr(self.scene.objects[0], self.counted)


def draw_complete(rng: Random, config: SceneConfig, split: str) -> Complete:
    """Draws a scene of which everything can be said.

    Raises:
        UserError: the configuration allows too few objects (three at least), shapes, colours or tags.
    """
    if config.max_objects < 3:
        raise UserError(f"this kind of example needs 3 objects; max_objects is {config.max_objects}, raise it")
    # A false number must be possible beside the true one, so a group of three needs room for a fourth object.
    tags = [tag for tag in config.quadruple_tags if tag != "Relation" or config.max_objects > 3]
    if not tags:
        raise UserError("quadruples of the tag Relation alone need max_objects of at least 4 in this kind of example")
    tag = rng.choice(tags)
    members = 3 if tag == "Relation" else 2
    attribute = rng.choice(config.binding_attributes)
    values = {
        name: statements.draw_distinct(rng, config, name, members if name in ("shape", "color") else 2)
        for name in dict.fromkeys(("shape", "color", attribute))
    }
    # Beside things that differ in size alone, another thing of one of the shapes would make false statements true.
    counted = rng.choice(("shape", "color")) if attribute == "color" else "color"
    greatest = min(statements.MAX_STATED_COUNT, config.max_objects - members + 1)
    number = rng.randint(1, greatest)
    other_name = "color" if counted == "shape" else "shape"
    free = [value for value in allowed_ids(config, other_name) if value not in values[other_name]]
    if not free:
        raise UserError(f"this kind of example needs {members + 1} values of {other_name}; allow more")
    group = [{name: drawn[i] for name, drawn in values.items() if i < len(drawn)} for i in range(members)]
    alike = [{counted: values[counted][0], other_name: rng.choice(free)} for _ in range(number - 1)]

    def others(row: Mapping[str, int]) -> bool:
        shown = row["shape"] in values["shape"] and any(row[name] in values[name] for name in ("color", attribute))
        named = row["shape"] == values["shape"][1] or row["color"] == values["color"][1]
        return not shown and not named and row[counted] != values[counted][0]

    relation = rng.choice(tuple(RELATIONS))

    def cells(rng: Random) -> tuple[int, ...]:
        return quadruples.corner_cells(rng) if members == 3 else statements.draw_cells(rng, *RELATIONS[relation])

    total = draw_count(rng, config, least=members + number - 1)
    scene = draw_scene(rng, config, split, total, [*group, *alike], cells, others)
    if members == 3:
        relation = quadruples.first_relation(*scene.objects[:2])
    return Complete(scene, members, attribute, relation, counted, number, greatest, tag)


def captions_of(drawn: Complete, rng: Random, config: SceneConfig) -> list[str]:
    """Different captions, of the kinds and by the weights of the configuration, without questions."""
    weights = {kind: weight for kind, weight in vars(config.caption_weights).items() if kind != "question" and weight}
    weights = weights or {"full": 1.0}
    said: dict[str, None] = {}
    for _ in range(_ATTEMPTS):
        said[captions.caption(drawn.scene, rng, rng.choices(list(weights), list(weights.values()))[0])] = None
        if len(said) == CAPTIONS:
            break
    return list(said)


def statements_of(drawn: Complete, rng: Random, config: SceneConfig) -> list[tuple[str, int, str]]:
    """A true and a false statement of each kind, in random order: text, label and kind."""
    found = []
    for kind in config.statement_kinds:
        found += [(_statement(drawn, rng, kind, label), label, kind) for label in rng.sample((0, 1), 2)]
    return found


def _statement(drawn: Complete, rng: Random, kind: str, label: int) -> str:
    one, other = drawn.scene.objects[:2]
    if kind == "binding":
        pair = tuple((getattr(thing, drawn.attribute), thing.shape) for thing in (one, other))
        return statements.binding_statement(drawn.attribute, pair, label, rng.choice(statements.BINDING_TEMPLATES))
    if kind == "relation":
        partner, relation = other, drawn.relation
        if drawn.members == 3 and rng.random() < 0.5:  # the second lies in the first one's row, the third under it
            partner = drawn.scene.objects[2]
            relation = quadruples.first_relation(one, partner)
        return statements.relation_statement(rng, one, relation if label else language.opposite(relation), partner)
    number = drawn.number
    if not label:
        number = rng.choice([wrong for wrong in range(1, drawn.greatest + 1) if wrong != number])
    return statements.count_statement(drawn.counted, drawn.value, number, rng.choice(statements.COUNT_TEMPLATES))


def questions_of(drawn: Complete, rng: Random, config: SceneConfig) -> list[tuple[str, str, str]]:
    """A question of each kind: text, answer and kind."""
    one, other = drawn.scene.objects[:2]
    found = []
    for kind in config.question_kinds:
        if kind == "exist":
            exists = rng.random() < 0.5
            words = f"{COLORS[one.color]} {SHAPES[one.shape if exists else other.shape]}"
            question, answer = language.exist_question(rng, words, exists)
        elif kind in ("color", "shape"):
            named = "shape" if kind == "color" else "color"
            templates = language.COLOR_QUESTIONS if kind == "color" else language.SHAPE_QUESTIONS
            question = rng.choice(templates).format(ATTRIBUTES[named][getattr(other, named)])
            answer = ATTRIBUTES[kind][getattr(other, kind)]
        elif kind == "count":
            words = language.plural(drawn.counted, drawn.value)
            question, answer = rng.choice(language.COUNT_QUESTIONS).format(words), NUMBERS[drawn.number]
        else:
            thing = rng.choice((one, other))
            words = language.words_of(thing, ("color",))
            question, answer = rng.choice(language.PLACE_QUESTIONS).format(words), PLACES[thing.cell]
        found.append((question, answer, kind))
    return found


def phrases_of(drawn: Complete, rng: Random) -> list[str]:
    """A phrase for every object, which it alone answers to."""
    return [statements.phrase_of(rng, drawn.scene, index) for index in range(len(drawn.scene.objects))]


def class_of(drawn: Complete) -> dict[str, Any]:
    """The shape and colour of the largest object: ``label``, ``class_name``, ``color_label``, ``color_name``."""
    thing = max(drawn.scene.objects, key=lambda thing: thing.scale)
    names = {"class_name": SHAPES[thing.shape], "color_name": COLORS[thing.color]}
    return {"label": thing.shape, "color_label": thing.color} | names


def quadruple_of(drawn: Complete, rng: Random) -> Quadruple:
    """The scene, its twin, and two captions of the same words."""
    if drawn.tag == "Attribute":
        return quadruples.attribute_quadruple(rng, drawn.scene, drawn.attribute)
    if drawn.tag == "Object":
        return quadruples.object_quadruple(rng, drawn.scene, drawn.relation)
    return quadruples.relation_quadruple(rng, drawn.scene)
