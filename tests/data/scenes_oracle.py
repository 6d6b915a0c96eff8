"""An independent reader of the texts: decides from annotations alone, by boxes rather than cells, what is true."""

from __future__ import annotations

import hashlib
import itertools
import re

import numpy as np

NUMBERS = {"zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5}
PREFIXES = r"^(?:there is|there are|this is|a picture of|an image of|a photo of) (?=\w)"
PLACES = r"(top left|top right|bottom left|bottom right|top|bottom|left|right|center)"
RELATION = r"(?:to the )?(left of|right of|above|below)"
# Centres in neighbouring columns are at least 0.21 picture widths apart, in the same column at most 0.08.
MARGIN = 0.15


def matches(words: str, thing: dict, image_size: int) -> bool:
    """Whether a noun phrase with or without a place is true of one object."""
    words = re.sub(r"^(a|an|the) ", "", words)
    found = re.fullmatch(rf"(.+?) (?:at the )?{PLACES}", words)
    if found:
        words, place = found.groups()
        if place != place_of(thing, image_size):
            return False
    for word in words.split():
        if word not in ("object", "shape", thing["shape"], thing["color"], thing["size"], thing["texture"]):
            return False
    return True


def centre(thing: dict) -> tuple[float, float]:
    x0, y0, x1, y1 = thing["box"]
    return (x0 + x1) / 2, (y0 + y1) / 2


def place_of(thing: dict, image_size: int) -> str:
    across, down = (int(3 * value / image_size) for value in centre(thing))
    words = [("top", "", "bottom")[down], ("left", "", "right")[across]]
    return " ".join(word for word in words if word) or "center"


def related(relation: str, one: dict, other: dict, image_size: int) -> bool:
    axis = 0 if relation in ("left of", "right of") else 1
    difference = centre(one)[axis] - centre(other)[axis]
    if relation in ("left of", "above"):
        difference = -difference
    return difference > MARGIN * image_size


def true_of(sentence: str, objects: list[dict], image_size: int = 64) -> bool:
    """Whether a caption or statement is true of a picture with these objects."""
    sentence = re.sub(PREFIXES, "", sentence)
    if re.match(r"(exactly )?(one|two|three|four|five) ", sentence):
        return all(count_is_true(part, objects) for part in sentence.removeprefix("exactly ").split(" and "))
    found = re.fullmatch(rf"(.+?) (?:is )?{RELATION} (.+?)(?: and {RELATION} (.+))?", sentence)
    if found:
        first, relation, second, also, third = found.groups()
        for one, two, three in itertools.product(objects, repeat=3):
            facts = matches(first, one, image_size) and matches(second, two, image_size)
            facts = facts and related(relation, one, two, image_size)
            if also:
                facts = facts and matches(third, three, image_size) and related(also, one, three, image_size)
            if facts:
                return True
        return False
    parts = sentence.split(" and ")
    return any(
        all(matches(part, thing, image_size) for part, thing in zip(parts, chosen, strict=True))
        for chosen in itertools.permutations(objects, len(parts))
    )


def count_is_true(words: str, objects: list[dict]) -> bool:
    number, *rest = words.split()
    noun = rest[-1]
    if noun in ("object", "objects"):
        chosen = [thing for thing in objects if all(word in thing.values() for word in rest[:-1])]
    else:
        chosen = [thing for thing in objects if noun in (thing["shape"], f"{thing['shape']}s", f"{thing['shape']}es")]
    return len(chosen) == NUMBERS[number]


def answer_to(question: str, objects: list[dict], image_size: int = 64) -> set[str]:
    """Every right answer to a question."""
    question = question.rstrip("?")
    found = re.fullmatch(
        r"(?:is there|does the image contain|is) (a|no) (.+?)(?: in the image| present)?"
        r"|(?:is there not|does the image not contain) a (.+?)(?: in the image)?",
        question,
    )
    if found:
        kind, positive, negative = found.groups()
        exists = true_of(f"a {positive or negative}", objects, image_size)
        negated = kind != "a"
        return {"yes" if exists != negated else "no"}
    found = re.fullmatch(r"how many (.+?) (?:are there|are in the image|does the image contain)", question)
    if found:
        return {word for word in NUMBERS if count_is_true(f"{word} {found[1]}", objects)}
    found = re.fullmatch(r"where (?:in the image )?is the (.+)", question)
    if found:
        return {place_of(thing, image_size) for thing in objects if matches(found[1], thing, image_size)}
    found = re.fullmatch(r"what (\w+) is (?:present|in the image)", question)
    if found:
        return {thing[found[1]] for thing in objects}
    found = re.fullmatch(r"what (\w+) is the (.+)|what is the (\w+) of the (.+)|(what) is the (.+)", question)
    attribute, words = found[1] or found[3] or "shape", found[2] or found[4] or found[6]
    return {thing[attribute] for thing in objects if matches(words, thing, image_size)}


def digest(source) -> str:
    """Hash of every seventh example of a source."""
    hashed = hashlib.sha256()
    for index in range(0, len(source), 7):
        example = source[index]
        for name in sorted(example):
            value = example[name]
            hashed.update(name.encode())
            hashed.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return hashed.hexdigest()
