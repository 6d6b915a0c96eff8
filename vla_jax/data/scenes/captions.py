"""Captions: true descriptions of a scene, from one object to all of them, in varied words."""

from __future__ import annotations

from random import Random

from vla_jax.data.scenes import language
from vla_jax.data.scenes.language import color_and_shape, words_of
from vla_jax.data.scenes.sampling import Scene, SceneConfig, SceneObject, allowed_ids, draw_count, draw_scene
from vla_jax.data.scenes.vocabulary import ATTRIBUTES, NUMBERS, PLACES, RELATIONS, SHAPES

PREFIXES = ("a picture of", "an image of", "a photo of", "there is", "this is")
_PLAIN = 0.6  # share of captions without a prefix

# What a short caption says of an object besides its shape, with weights.
_SHORT_MODIFIERS = {
    ("color",): 0.4,
    (): 0.2,
    ("texture", "color"): 0.1,
    ("size", "color"): 0.1,
    ("texture",): 0.06,
    ("size",): 0.06,
    ("size", "texture", "color"): 0.08,
}


def draw_captioned_scene(rng: Random, config: SceneConfig, split: str) -> tuple[Scene, str]:
    """Draws a kind of caption by the configuration's weights, and a scene that suits it.

    Returns:
        The scene, and one of ``full``, ``short``, ``relation``, ``count``, ``question``.
    """
    weights = vars(config.caption_weights)
    kind = rng.choices(list(weights), list(weights.values()))[0]
    if kind == "relation":
        if config.max_objects == 1:
            kind = "short"
        else:
            return draw_scene(rng, config, split, draw_count(rng, config, least=2)), kind
    if kind == "count":
        # Numbers above two are rare in independent draws; here each is equally frequent.
        number = rng.randint(1, config.max_objects)
        attribute = rng.choice(("shape", "color"))
        pinned = [{attribute: rng.choice(allowed_ids(config, attribute))}] * number
        return draw_scene(rng, config, split, draw_count(rng, config, least=number), pinned), kind
    return draw_scene(rng, config, split), kind


def caption(scene: Scene, rng: Random, kind: str) -> str:
    """A caption of a kind; ``relation`` needs a scene of at least two objects."""
    return _CAPTIONS[kind](scene, rng)


def _prefixed(rng: Random, words: str) -> str:
    return words if rng.random() < _PLAIN else f"{rng.choice(PREFIXES)} {words}"


def full_caption(scene: Scene, rng: Random) -> str:
    """All objects with size, texture, colour, shape and place, in any order."""
    order = rng.sample(scene.objects, len(scene.objects))
    style = rng.random()
    if style < 0.4 and len(order) <= 4:
        parts = [f"{language.with_article(words_of(o))} {language.at_place(o)}" for o in order]
    elif style < 0.7:
        parts = [f"{language.with_article(words_of(o))} {PLACES[o.cell]}" for o in order]
    else:
        return " and ".join(f"{words_of(o)} {PLACES[o.cell]}" for o in order)
    return _prefixed(rng, " and ".join(parts))


def _short_words(thing: SceneObject, rng: Random) -> str:
    modifiers = rng.choices(list(_SHORT_MODIFIERS), list(_SHORT_MODIFIERS.values()))[0]
    noun = rng.choice(("object", "shape")) if rng.random() < 0.1 else ""
    return words_of(thing, modifiers, noun)


def short_caption(scene: Scene, rng: Random) -> str:
    """One object, or two, by some of their attributes."""
    count = 2 if len(scene.objects) > 1 and rng.random() < 0.35 else 1
    chosen = rng.sample(scene.objects, count)
    if count == 1 and rng.random() < 0.15:
        return _short_words(chosen[0], rng)
    places = rng.random() < 0.2
    parts = []
    for thing in chosen:
        words = language.with_article(_short_words(thing, rng))
        parts.append(f"{words} {language.at_place(thing)}" if places else words)
    return _prefixed(rng, " and ".join(parts))


def relation_caption(scene: Scene, rng: Random) -> str:
    """Two objects and where one lies from the other."""
    first, second = rng.sample(scene.objects, 2)
    modifiers = ("color",) if rng.random() < 0.7 else language.MODIFIERS
    relation = rng.choice([name for name in RELATIONS if language.holds(name, first, second)])
    return relation_sentence(words_of(first, modifiers), relation, words_of(second, modifiers), rng)


def relation_sentence(first: str, relation: str, second: str, rng: Random) -> str:
    """Says of two things, given in words, that they are in this relation."""
    relation = language.relation_words(relation, rng)
    style = rng.random()
    if style < 0.4:
        return f"the {first} is {relation} the {second}"
    words = f"{language.with_article(first)} {relation} {language.with_article(second)}"
    return f"there is {words}" if style < 0.6 else words


def count_caption(scene: Scene, rng: Random) -> str:
    """How many objects share an attribute; or how many there are of two kinds, or at all."""
    number = len(scene.objects)
    style = rng.random()
    if style < 0.1:
        words = f"{NUMBERS[number]} {'object' if number == 1 else 'objects'}"
        return f"there {'is' if number == 1 else 'are'} exactly {words}"
    # The first object, which the scene was drawn around, is told of most of the time.
    thing = scene.objects[0] if rng.random() < 0.7 else rng.choice(scene.objects)
    attribute = _commonest(scene, thing) if rng.random() < 0.7 else rng.choice(tuple(ATTRIBUTES))
    value = getattr(thing, attribute)
    number = sum(getattr(other, attribute) == value for other in scene.objects)
    words = language.counted(number, attribute, value)
    rest = sorted({getattr(other, attribute) for other in scene.objects} - {value})
    if rest and style < 0.3:
        other = rng.choice(rest)
        return f"{words} and {language.counted(_count(scene, attribute, other), attribute, other)}"
    if style < 0.55:
        return f"there {'is' if number == 1 else 'are'} exactly {words}"
    return f"exactly {words}" if style < 0.7 else words


def _count(scene: Scene, attribute: str, value: int) -> int:
    return sum(getattr(thing, attribute) == value for thing in scene.objects)


def _commonest(scene: Scene, thing: SceneObject) -> str:
    return max(("shape", "color"), key=lambda name: _count(scene, name, getattr(thing, name)))


def question_caption(scene: Scene, rng: Random) -> str:
    """A question about the scene with its answer behind it, so that question words are known before any task."""
    thing = rng.choice(scene.objects)
    kind = rng.random()
    words = words_of(thing, ("color",))
    if kind < 0.45:
        exists = rng.random() < 0.5
        if not exists:
            words = _absent(scene, rng)
        if rng.random() < 0.3:
            return f"there is {language.with_article(words)}? {'true' if exists else 'false'}"
        question, answer = language.exist_question(rng, words, exists)
    elif kind < 0.6:
        name = rng.choice(language.MODIFIERS)
        rest = tuple(modifier for modifier in language.MODIFIERS if modifier != name)
        subject = rng.choice(("shape", SHAPES[thing.shape], words_of(thing, rest)))
        if name == "color":
            question = rng.choice(language.COLOR_QUESTIONS).format(subject)
        else:
            question = f"what {name} is the {subject}?"
        answer = ATTRIBUTES[name][getattr(thing, name)]
    elif kind < 0.75:
        question = rng.choice(language.SHAPE_QUESTIONS).format(ATTRIBUTES["color"][thing.color])
        if rng.random() < 0.5:
            question = rng.choice(("what shape is present?", "what shape is in the image?"))
        answer = SHAPES[thing.shape]
    elif kind < 0.9:
        attribute = rng.choice(("shape", "color"))
        value = getattr(thing, attribute) if rng.random() < 0.8 else rng.randrange(len(ATTRIBUTES[attribute]))
        question = rng.choice(language.COUNT_QUESTIONS).format(language.plural(attribute, value))
        answer = NUMBERS[_count(scene, attribute, value)]
    else:
        question, answer = rng.choice(language.PLACE_QUESTIONS).format(words), PLACES[thing.cell]
    return f"{question} {answer}"


def _absent(scene: Scene, rng: Random) -> str:
    """A colour and a shape that no object has together."""
    present = {color_and_shape(thing) for thing in scene.objects}
    while True:
        color, shape = (rng.randrange(len(ATTRIBUTES[name])) for name in ("color", "shape"))
        if (color, shape) not in present:
            return f"{ATTRIBUTES['color'][color]} {SHAPES[shape]}"


_CAPTIONS = {
    "full": full_caption,
    "short": short_caption,
    "relation": relation_caption,
    "count": count_caption,
    "question": question_caption,
}
