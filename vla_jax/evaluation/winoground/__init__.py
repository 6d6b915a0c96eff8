"""Winoground: two captions of the same words, two pictures, and which belongs to which (Thrush et al. 2022).

With s(c, i) the score of caption c with picture i, section 4.1 of the paper asks of every example

    text:   s(0,0) > s(1,0)  and  s(1,1) > s(0,1)      each picture prefers its caption
    image:  s(0,0) > s(0,1)  and  s(1,1) > s(1,0)      each caption prefers its picture
    group:  both

Strictly greater: a tie fails, so a scorer that gives one constant gets 0. Random scores get 25, 25 and 16.67 %.

Published on the 400 examples, in per cent (text, image, group): human 89.50, 88.50, 85.50; CLIP ViT-B/32 30.75, 10.50,
8.00; FLAVA ITM 32.25, 20.50, 14.25. One example is 0.25 points, and at a group score of 8 the interval is about
5 points wide: compare two models by :func:`compare`, on the same examples.

    python -m vla_jax.evaluation.winoground --examples=examples.jsonl --scores=model.jsonl --scores=other.jsonl

prints the tables of score files in the authors' format. Nothing here imports JAX;
:mod:`vla_jax.evaluation.scorers` makes the scores.
"""

from vla_jax.evaluation.winoground.examples import (
    Example,
    Winoground,
    groups_of_examples,
    read_examples,
    read_relabelling,
    relabelled_groups,
)
from vla_jax.evaluation.winoground.judging import (
    CHANCE,
    Outcomes,
    Scores,
    compare,
    compare_trained,
    evaluate,
    evaluate_groups,
    group_by,
    outcomes,
)
from vla_jax.evaluation.winoground.score_files import read_scores, write_scores

__all__ = [
    "CHANCE",
    "Example",
    "Outcomes",
    "Scores",
    "Winoground",
    "compare",
    "compare_trained",
    "evaluate",
    "evaluate_groups",
    "group_by",
    "groups_of_examples",
    "outcomes",
    "read_examples",
    "read_relabelling",
    "read_scores",
    "relabelled_groups",
    "write_scores",
]
