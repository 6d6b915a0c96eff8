from __future__ import annotations

import numpy as np
import pytest

from vla_jax.slots import LINEAR_SLOTS, SLOTS, Segment, TowerShape, between, empty_slot, vacant


def fill_a(tree):
    return empty_slot


def fill_b(tree):
    return empty_slot


# Layers 0-2, 3 and 4-6; each leaf's rows are the numbers of the layers they belong to.
SEGMENTS = (
    Segment(0, 3, {"a": np.arange(0, 3), "b": np.arange(0, 3)[:, None]}, fill_a),
    Segment(3, 4, (), fill_b),
    Segment(4, 7, {"a": np.arange(4, 7)}, fill_a),
)
DEPTH = 7


@pytest.mark.parametrize("start", range(DEPTH + 1))
@pytest.mark.parametrize("stop", range(DEPTH + 1))
def test_every_cut_holds_exactly_its_layers(start, stop):
    parts = between(SEGMENTS, start, stop)
    assert [layer for part in parts for layer in range(part.start, part.stop)] == list(range(start, stop))
    for part in parts:
        assert part.stop > part.start
        original = next(s for s in SEGMENTS if s.start <= part.start and part.stop <= s.stop)
        assert part.fill is original.fill
        if original.tree:
            assert part.tree.keys() == original.tree.keys()
            for leaf in part.tree.values():
                np.testing.assert_array_equal(leaf.reshape(-1), range(part.start, part.stop))
        else:
            assert part.tree == ()


def test_whole_segments_pass_through_without_a_copy():
    parts = between(SEGMENTS, 0, DEPTH)
    assert all(part is segment for part, segment in zip(parts, SEGMENTS, strict=True))
    assert between(SEGMENTS, 1, DEPTH)[1:] == SEGMENTS[1:]


def test_cutting_twice_is_cutting_once():
    once, twice = between(SEGMENTS, 2, 5), between(between(SEGMENTS, 1, 6), 2, 5)
    assert [(part.start, part.stop) for part in once] == [(part.start, part.stop) for part in twice]
    np.testing.assert_array_equal(once[0].tree["a"], twice[0].tree["a"])


@pytest.mark.parametrize("slot", SLOTS)
def test_only_the_mlps_hidden_layer_and_the_feature_have_another_width(slot):
    others = {"mlp_fc1": (8, 20), "mlp_hidden": (20, 20), "mlp_fc2": (20, 8), "projection": (8, 5)}
    assert TowerShape(depth=3, width=8, mlp_width=20, features=5).widths(slot) == others.get(slot, (8, 8))


def test_slots_have_names_of_their_own_and_linear_ones_are_among_them():
    assert len(set(SLOTS)) == len(SLOTS)
    assert set(LINEAR_SLOTS) < set(SLOTS)


def test_an_empty_slot_hands_on_the_very_same_output():
    y = (np.ones(2), np.ones(3))
    assert empty_slot("attn_kv", np.zeros(2), y) is y


def test_a_vacant_occupancy_is_one_empty_segment_a_tower():
    occupancy = vacant({"vision": 4, "text": 2})
    assert occupancy.joints == ()
    y = np.ones(2)
    for tower, depth in (("vision", 4), ("text", 2)):
        assert occupancy.embed[tower]("embed", y, y) is y
        (segment,) = occupancy.segments[tower]
        assert (segment.start, segment.stop, segment.tree) == (0, depth, ())
        assert segment.fill(segment.tree)("mlp_out", np.zeros(2), y) is y
