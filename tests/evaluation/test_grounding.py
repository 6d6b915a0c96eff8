"""Overlaps against counting cells, pointing, and heat maps laid over pictures."""

from __future__ import annotations

import numpy as np
import pytest

from vla_jax.data.boxes import View
from vla_jax.errors import UserError
from vla_jax.evaluation import grounding
from vla_jax.evaluation.statistics import wilson


def boxes(count, seed, size=40):
    generator = np.random.default_rng(seed)
    low = generator.integers(0, size - 10, (count, 2))
    return np.concatenate([low, low + generator.integers(1, 10, (count, 2))], axis=1)


def cells(box, size=40):
    """A picture in which the box's pixels are true."""
    picture = np.zeros((size, size), bool)
    picture[box[1] : box[3], box[0] : box[2]] = True
    return picture


def test_overlap_is_a_share_of_pixels():
    first, second = boxes(200, 0, 25), boxes(200, 1, 25)
    for one, other, found in zip(first, second, grounding.iou(first, second), strict=True):
        both, either = (cells(one) & cells(other)).sum(), (cells(one) | cells(other)).sum()
        assert found == pytest.approx(both / either)
    assert (grounding.iou(first, first) == 1).all()


def test_overlap_is_the_same_in_shares_of_a_cropped_and_mirrored_square():
    first, second = boxes(50, 0, 20), boxes(50, 1, 20)
    view = View.of_crop((40, 30), (3, -2, 31, 25), mirrored=True)
    seen = grounding.iou(view.to_square(first), view.to_square(second))
    np.testing.assert_allclose(seen, grounding.iou(first, second), atol=1e-5)


def test_accuracy_counts_overlaps_of_half_and_more():
    annotated = np.array([[0, 0, 10, 10]] * 4)
    predicted = np.array([[0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 4.9], [8, 8, 30, 30]])
    found = grounding.evaluate(predicted, annotated)
    assert found.accuracy == {0.5: wilson(2, 4), 0.75: wilson(1, 4)}
    assert found.mean_iou == pytest.approx((1 + 0.5 + 0.49 + 4 / (100 + 484 - 4)) / 4)
    assert found.pointing == wilson(3, 4)  # the last box's middle lies outside


def test_points_can_be_given():
    annotated = np.array([[0, 0, 10, 10]] * 3)
    found = grounding.evaluate(annotated, annotated, np.array([[10, 10], [10.1, 3], [5, -1]]))
    assert found.pointing == wilson(1, 3)


def test_peaks_are_the_middles_of_the_hottest_patches():
    heat = np.zeros((2, 12 // 4, 3))
    heat[0, 2, 0] = heat[1, 0, 1] = 1
    expected = [[1 / 6, 5 / 6], [1 / 2, 1 / 6]]
    np.testing.assert_allclose(grounding.peaks(heat), expected)
    np.testing.assert_allclose(grounding.peaks(heat.reshape(2, 9)), expected)


@pytest.mark.parametrize("mirrored", [False, True])
def test_heat_lies_over_the_pixels_that_a_patch_was_made_of(mirrored):
    view = View.of_crop((12, 10), (1, 2, 9, 10), mirrored=mirrored)  # a square of 8 pixels, four patches of 4
    shown = grounding.over_picture(np.array([1.0, 2, 3, 4]), view)
    left, right = ([2, 4], [1, 3]) if mirrored else ([1, 3], [2, 4])
    expected = np.full((10, 12), np.nan)
    for row, (near, far) in enumerate(zip(left, right, strict=True)):
        expected[2 + 4 * row : 6 + 4 * row, 1:5] = near
        expected[2 + 4 * row : 6 + 4 * row, 5:9] = far
    np.testing.assert_array_equal(shown, expected)


def test_mistakes_are_named():
    good = np.array([[0, 0, 1, 1]])
    with pytest.raises(UserError, match=r"predicted box at \[0\] is \[0.0, 0.0, 0.0, 1.0\]"):
        grounding.evaluate(np.array([[0, 0, 0, 1]]), good)
    with pytest.raises(UserError, match="annotated box"):
        grounding.evaluate(good, np.array([[0, 0, np.inf, 1]]))
    with pytest.raises(UserError, match="one box a phrase"):
        grounding.evaluate(np.tile(good, (2, 1)), good)
    with pytest.raises(UserError, match="points are x and y"):
        grounding.evaluate(good, good, np.zeros((1, 3)))
    with pytest.raises(UserError, match="square grid"):
        grounding.peaks(np.zeros((1, 5)))
