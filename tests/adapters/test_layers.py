from __future__ import annotations

import itertools

import pytest

from vla_jax.adapters.layers import NOTATION, layers
from vla_jax.errors import UserError


@pytest.mark.parametrize(
    ("notation", "depth", "expected"),
    [
        ("all", 4, (0, 1, 2, 3)),
        ("all", 1, (0,)),
        ("early", 4, (0, 1)),
        ("late", 4, (2, 3)),
        ("early", 5, (0, 1)),
        ("late", 5, (2, 3, 4)),
        ("late", 1, (0,)),
        ("first 1", 5, (0,)),
        ("first 3", 5, (0, 1, 2)),
        ("last 3", 5, (2, 3, 4)),
        ("last 5", 5, (0, 1, 2, 3, 4)),
        ("every 1st", 3, (0, 1, 2)),
        ("every 2nd", 6, (1, 3, 5)),
        ("every 2nd", 5, (0, 2, 4)),
        ("every 3rd", 6, (2, 5)),
        ("every 3rd", 7, (0, 3, 6)),
        ("every 4th", 12, (3, 7, 11)),
        ("every 5th", 12, (1, 6, 11)),
        ("every 6th", 6, (5,)),
        ("3", 5, (3,)),
        ("-1", 5, (4,)),
        ("-5", 5, (0,)),
        ("0,5,7", 8, (0, 5, 7)),
        ("7,0,-3", 8, (0, 5, 7)),
        ("1,1,-4", 5, (1,)),
        (" 0 , 2 ", 3, (0, 2)),
        ("2:8", 12, (2, 3, 4, 5, 6, 7)),
        ("2:", 5, (2, 3, 4)),
        (":2", 5, (0, 1)),
        ("-2:", 5, (3, 4)),
        (":-2", 5, (0, 1, 2)),
        ("-4:-1", 5, (1, 2, 3)),
        (":", 3, (0, 1, 2)),
        ("::3", 7, (0, 3, 6)),
        ("1:6:2", 7, (1, 3, 5)),
        ("0:5", 5, (0, 1, 2, 3, 4)),
        ("first 1,last 1,2:4", 6, (0, 2, 3, 5)),
    ],
)
def test_notation_by_hand(notation, depth, expected):
    assert layers(notation, depth, "the vision tower") == expected


@pytest.mark.parametrize("depth", range(1, 14))
def test_early_and_late_halves_make_the_whole(depth):
    late = layers("late", depth, "here")
    early = layers("early", depth, "here") if depth > 1 else ()
    assert early + late == tuple(range(depth))
    assert len(late) - len(early) == depth % 2


@pytest.mark.parametrize("depth", range(1, 14))
def test_every_nth_is_evenly_spaced_up_to_the_last_layer(depth):
    for step in range(1, depth + 1):
        chosen = layers(f"every {step}th", depth, "here")
        assert chosen[-1] == depth - 1
        assert chosen[0] < step
        assert {b - a for a, b in itertools.pairwise(chosen)} <= {step}


@pytest.mark.parametrize(
    ("notation", "message"),
    [
        ("12", r"layer 12 does not exist: the text tower has 12 layers, 0 to 11 \(or -12 to -1\)"),
        ("-13", "layer -13 does not exist: the text tower has 12 layers"),
        ("0,3,40", "layer 40 does not exist: the text tower has 12 layers"),
        ("first 13", "'first 13' ask for 13 of the 12 layers of the text tower"),
        ("last 20", "'last 20' ask for 20 of the 12 layers of the text tower"),
        ("2:13", "'2:13' reach beyond the text tower, which has 12 layers"),
        ("-13:", "'-13:' reach beyond the text tower, which has 12 layers"),
        ("every 0th", "the step must be at least 1"),
        ("5:5", "'5:5' name none of the 12 layers of the text tower"),
        ("12:", "'12:' name none of the 12 layers of the text tower"),
        ("first 0", "name none of the 12 layers"),
        ("every 13th", "name none of the 12 layers"),
    ],
)
def test_layers_that_do_not_exist_are_refused_with_the_depth(notation, message):
    with pytest.raises(UserError, match=message):
        layers(notation, 12, "the text tower")


@pytest.mark.parametrize(
    "notation", ["", "middle", "every second", "first", "1-3", "1.5", "::0", "::-1", "0,,2", "All"]
)
def test_what_cannot_be_read_is_refused_with_the_notation(notation):
    with pytest.raises(UserError) as error:
        layers(notation, 12, "the text tower")
    assert NOTATION in str(error.value)


def test_the_lower_half_of_one_layer_is_nothing():
    with pytest.raises(UserError, match="name none of the 1 layers"):
        layers("early", 1, "the text tower")
