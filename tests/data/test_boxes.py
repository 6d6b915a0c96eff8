"""Boxes through the picture's transformation: where a painted rectangle comes out, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil

from vla_jax.data.boxes import CandidateBoxes, TargetBox, View, check_boxes
from vla_jax.data.image import Preprocess
from vla_jax.data.pipeline import TransformExample
from vla_jax.errors import UserError

SIZE = 48


def processor(**settings):
    plain = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3, "resample": 0}
    given = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}} | settings
    return CLIPImageProcessorPil(**(plain | given))


def painted(width, height, box):
    pixels = np.zeros((height, width, 3), np.uint8)
    x0, y0, x1, y1 = box
    pixels[y0:y1, x0:x1] = 255
    return pixels


def found_box(pixels):
    """Where the rectangle lies in the square, in shares of its side, by looking at it."""
    seen = pixels[..., 0] > 0.5
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / len(pixels)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"size": {"shortest_edge": 60}},
        {"size": {"height": SIZE, "width": SIZE}, "do_center_crop": False},
        {"size": {"shortest_edge": 31}},  # smaller than the crop: the processor pads
    ],
)
@pytest.mark.parametrize("size", [(96, 96), (192, 97), (73, 140), (48, 48), (20, 33)])
@pytest.mark.parametrize("augment", ["none", "flip_crop"])
def test_a_box_follows_its_picture(settings, size, augment):
    width, height = size
    box = (width * 2 // 5, height // 3, width * 3 // 5, height * 3 // 4)
    preprocess = Preprocess(processor(**settings), augment=augment, min_area=0.7)
    for seed in range(4):
        generator = None if augment == "none" else np.random.default_rng(seed)
        pixels, view = preprocess.with_view(painted(*size, box), generator)
        # Each edge may be off by a pixel of the square, or by one of the stored picture: nearest-neighbour resizing.
        off = max(1 / SIZE, abs(view.scale[0]), abs(view.scale[1]))
        expected = np.clip(view.to_square(np.array(box)), 0, 1)  # a crop may cut the rectangle
        np.testing.assert_allclose(found_box(pixels), expected, rtol=0, atol=1.01 * off)
        np.testing.assert_array_equal(
            pixels, preprocess(painted(*size, box), None if augment == "none" else np.random.default_rng(seed))
        )


def test_mirrored_boxes_are_mirrored():
    box = np.array([10, 5, 30, 20])
    plain = View.of_crop((64, 32), (0, 0, 64, 32)).to_square(box)
    mirrored = View.of_crop((64, 32), (0, 0, 64, 32), mirrored=True).to_square(box)
    np.testing.assert_allclose(mirrored, [1 - plain[2], plain[1], 1 - plain[0], plain[3]], rtol=1e-6)


@pytest.mark.parametrize("mirrored", [False, True])
def test_there_and_back(mirrored):
    view = View.of_crop((640, 480), (70.5, -3, 510, 400), mirrored=mirrored)
    boxes = np.random.default_rng(0).uniform(0, 480, (5, 3, 2, 2))
    boxes = np.sort(boxes, axis=-2).reshape(5, 3, 4)
    np.testing.assert_allclose(view.to_picture(view.to_square(boxes)), boxes, rtol=1e-5, atol=1e-3)


def test_what_the_centre_crop_cuts_off_lies_outside_of_the_square():
    _, view = Preprocess(processor()).with_view(np.zeros((48, 96, 3), np.uint8))
    np.testing.assert_allclose(view.to_square(np.array([0, 0, 96, 48])), [-0.5, 0, 1.5, 1], atol=1e-6)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([10, 10, 10, 20], "x0 < x1 and y0 < y1"),
        ([40, 10, 8, 20], "not a corner with a width and a height"),
        ([0, 0, 52, 20], "outside its picture of 50 x 30"),
        ([-2, 0, 5, 20], "outside its picture"),
        ([0, 0, np.nan, 20], "x0 < x1"),
        ([50.2, 0, 50.9, 20], "nothing of it lies in its picture"),
        ([1, 2, 3], r"\[n, 4\]"),
    ],
)
def test_impossible_boxes_are_refused(box, message):
    with pytest.raises(UserError, match=message):
        check_boxes(np.atleast_2d(box), 50, 30, "a test")


def test_a_box_that_sticks_out_by_less_than_a_pixel_is_cut():
    np.testing.assert_array_equal(check_boxes(np.array([[-0.4, 3, 50.7, 30]]), 50, 30, "a test"), [[0, 3, 50, 30]])


@pytest.fixture(scope="module")
def example():
    picture = Image.fromarray(painted(96, 48, (48, 12, 72, 36)))
    boxes = np.array([[48, 12, 72, 36], [0, 0, 96, 48]], np.float32)
    return {"image": picture, "box": [48, 12, 72, 36], "boxes": boxes, "phrase": "the white one"}


def transform(*parts):
    return TransformExample(
        Preprocess(processor()), lambda text: (np.zeros(3), np.ones(3)), "image", "phrase", parts=parts
    )


def test_rows_carry_boxes_in_the_square(example):
    row = transform(TargetBox(), CandidateBoxes(4))(example)
    np.testing.assert_allclose(row["box"], [0.5, 0.25, 1.0, 0.75])
    np.testing.assert_allclose(row["boxes"][:2], [[0.5, 0.25, 1.0, 0.75], [-0.5, 0, 1.5, 1]])
    np.testing.assert_array_equal(row["boxes_mask"], [True, True, False, False])
    assert {name: (row[name].dtype, row[name].shape) for name in ("box", "boxes")} == {
        "box": (np.dtype(np.float32), (4,)),
        "boxes": (np.dtype(np.float32), (4, 4)),
    }


def test_mistakes_in_examples_are_named(example):
    with pytest.raises(UserError, match="3 candidate boxes and there are 2 places"):
        transform(CandidateBoxes(2))({**example, "boxes": np.tile(example["boxes"], (2, 1))[:3]})
    with pytest.raises(UserError, match="did you mean 'boxes'"):
        transform(TargetBox("boxs"))(example)
    with pytest.raises(UserError, match=r"field 'box' is .*outside its picture of 96 x 48"):
        transform(TargetBox())({**example, "box": [0, 0, 300, 20]})
    with pytest.raises(UserError, match="at least 2 places"):
        CandidateBoxes(1)
