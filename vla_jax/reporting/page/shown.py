"""What the gallery shows, as values without a look."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in shares of the square that the backbone is shown."""


@dataclass(frozen=True)
class Answer:
    """What one model made of an example.

    Attributes:
        title: the variant's; that of the frozen backbone, which has no head, has nothing below.
        said: the prediction in words, may be empty.
        score: the number behind it, may be empty.
        right: whether it is right; None for the frozen backbone.
        heat: by picture, float ``[grid, grid]``; empty for a model that is shown one modality.
        box: the predicted box, of grounding.
    """

    title: str
    said: str = ""
    score: str = ""
    right: bool | None = None
    heat: tuple[np.ndarray, ...] = ()
    box: Box | None = None


@dataclass(frozen=True)
class Example:
    """One example of a task.

    Attributes:
        place: in the test split.
        note: what kind of example it is, may be empty.
        pictures: uint8 ``[size, size, 3]``, as the backbone is shown them.
        text: the statement, question, caption or phrase, may be empty.
        truth: the right answer in words, may be empty.
        box: the annotated box, of grounding.
        answers: the frozen backbone's, then every variant's.
    """

    place: int
    note: str
    pictures: tuple[np.ndarray, ...]
    text: str
    truth: str
    box: Box | None
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Judgement:
    """What one model made of a quadruple.

    Attributes:
        title: the variant's; that of the frozen backbone has maps alone.
        scores: float ``[2 captions, 2 pictures]``, or None.
        right: by ``text``, ``image`` and ``group``, or empty.
        heat: float ``[2 captions, 2 pictures, grid, grid]``; None for a model that is shown one modality.
    """

    title: str
    scores: np.ndarray | None = None
    right: Mapping[str, bool] | None = None
    heat: np.ndarray | None = None


@dataclass(frozen=True)
class Quadruple:
    """An example in Winoground's format.

    Attributes:
        place: among the quadruples.
        note: what was swapped, may be empty.
        pictures: two, as those of :class:`Example`.
        captions: two.
        judgements: the frozen backbone's, then every variant's.
    """

    place: int
    note: str
    pictures: tuple[np.ndarray, ...]
    captions: tuple[str, ...]
    judgements: tuple[Judgement, ...]


@dataclass(frozen=True)
class Shelf:
    """Examples that fared alike.

    Attributes:
        title: how they fared.
        count: how many there are of them.
        of: of how many.
        shown: those shown, :class:`Example` or :class:`Quadruple`.
    """

    title: str
    count: int
    of: int
    shown: tuple[Any, ...]


@dataclass(frozen=True)
class Gallery:
    """The gallery of one group of runs.

    Attributes:
        group: what the runs were trained for, may be empty.
        kind: of the task, may be empty.
        seed: whose predictions are shown.
        quadruples: shelves of :class:`Quadruple`.
        examples: shelves of :class:`Example`.
        problems: what could not be shown, as sentences.
    """

    group: str
    kind: str = ""
    seed: int = 0
    quadruples: tuple[Shelf, ...] = ()
    examples: tuple[Shelf, ...] = ()
    problems: tuple[str, ...] = ()
