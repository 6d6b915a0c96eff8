"""The closed world of `scenes`: attribute names, colours, places, and every word any text about them can contain."""

from __future__ import annotations

import re

SHAPES = ("circle", "square", "triangle", "rectangle", "star", "cross", "diamond", "heart")

# The eight colours of the published easy-VQA set, by its names and with its values, so that both sets share words.
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "teal": (0, 128, 128),
    "brown": (165, 42, 42),
    "yellow": (255, 255, 0),
}
COLORS = tuple(PALETTE)
SIZES = ("small", "large")
TEXTURES = ("solid", "striped", "dotted", "hollow")

# The cells of the 3 x 3 grid in reading order: cell = 3 * row + column.
PLACES = (
    "top left", "top", "top right",
    "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip

ATTRIBUTES: dict[str, tuple[str, ...]] = {"shape": SHAPES, "color": COLORS, "size": SIZES, "texture": TEXTURES}

NUMBERS = ("zero", "one", "two", "three", "four", "five")
PLURALS = {"cross": "crosses"} | {shape: f"{shape}s" for shape in SHAPES if shape != "cross"}

# Each relation with its axis (0: across, 1: down) and direction (-1: the first object has the smaller coordinate).
RELATIONS: dict[str, tuple[int, int]] = {
    "left of": (0, -1),
    "right of": (0, 1),
    "above": (1, -1),
    "below": (1, 1),
}

STATEMENT_KINDS = ("binding", "relation", "count")
"""What statements are about."""

ANSWERS = ("yes", "no", *SHAPES, *COLORS, *NUMBERS[1:], *PLACES)
"""Every answer of `questions`; an answer's id is its index here."""

CLASS_TEMPLATES = ("{}", "a {}", "a picture of a {}", "an image of a {}", "a photo of a {}", "there is a {}")
"""Prompts for zero-shot classification; the braces take a class name such as ``circle`` or ``red circle``."""

FUNCTION_WORDS = (
    "a", "an", "the", "of", "at", "in", "to", "and", "is", "are", "there", "exactly", "no", "not", "yes", "true",
    "false", "this", "picture", "image", "photo", "object", "objects", "shape", "color", "size", "texture",
    "what", "where", "how", "many", "does", "contain", "present", "?",
)  # fmt: skip


def split_words(text: str) -> list[str]:
    """The words of a text: runs of letters, and each other visible character by itself, in lower case."""
    return re.findall(r"[a-z]+|[^a-z\s]", text.lower())


def _all_words() -> tuple[str, ...]:
    names = (*SHAPES, *PLURALS.values(), *COLORS, *SIZES, *TEXTURES, *NUMBERS, *PLACES, *RELATIONS)
    words = {word: None for text in (*FUNCTION_WORDS, *names) for word in split_words(text)}
    return tuple(sorted(words))


WORDS = _all_words()
"""Every word of every text of this data set and of easy-VQA, sorted."""

MAX_WORDS = 46
"""No text is longer than this, so that it fits in 48 tokens with the start and end tokens."""


def article(words: str) -> str:
    """``"a"`` or ``"an"``, whichever stands before these words."""
    return "an" if words[0] in "aeiou" else "a"
