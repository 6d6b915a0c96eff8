"""Twins as pairs: which caption stands beside which picture, and that only the false captions differ."""

import pytest

from vla_jax.data.twin_pairs import TwinPairs
from vla_jax.errors import UserError

TWINS = [
    {f"{twin}{part}": f"{twin}{part} {n}" for part in ("image", "caption") for twin in ("", "twin_")} for n in range(3)
]


def test_hard_negatives_are_the_twins_captions():
    pairs = TwinPairs(TWINS, "hard")
    assert len(pairs) == 12
    assert [tuple(pairs[4 + k].values()) for k in range(4)] == [
        ("image 1", "caption 1", 1),
        ("image 1", "twin_caption 1", 0),
        ("twin_image 1", "twin_caption 1", 1),
        ("twin_image 1", "caption 1", 0),
    ]


def test_plain_negatives_are_captions_of_other_scenes_and_nothing_else_differs():
    plain, hard = TwinPairs(TWINS, "plain"), TwinPairs(TWINS, "hard")
    assert [tuple(plain[8 + k].values()) for k in range(4)] == [
        ("image 2", "caption 2", 1),
        ("image 2", "caption 0", 0),
        ("twin_image 2", "twin_caption 2", 1),
        ("twin_image 2", "twin_caption 0", 0),
    ]
    for one, other in zip((plain[n] for n in range(12)), (hard[n] for n in range(12)), strict=True):
        assert (one["image"], one["label"]) == (other["image"], other["label"])
        assert one["text"] == other["text"] or not one["label"]


def test_every_true_caption_is_false_elsewhere_as_often_so_that_texts_alone_tell_nothing():
    for negatives in ("plain", "hard"):
        pairs = [TwinPairs(TWINS, negatives)[n] for n in range(12)]
        told = {label: sorted(pair["text"] for pair in pairs if pair["label"] == label) for label in (0, 1)}
        assert told[0] == told[1]


def test_what_has_no_meaning_is_refused():
    with pytest.raises(UserError, match="unknown kind of negatives 'hart'; did you mean 'hard'"):
        TwinPairs(TWINS, "hart")
    with pytest.raises(UserError, match="at least 2 pairs of twins"):
        TwinPairs(TWINS[:1], "plain")
