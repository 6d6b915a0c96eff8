"""Pictures: equality with transformers' own processor, every mode of picture, augmentation, damage."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil

from vla_jax.data.image import Preprocess, UnreadablePicture
from vla_jax.errors import UserError


@pytest.fixture(scope="module")
def processor():
    return CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def random_picture(mode: str, width: int, height: int, seed: int = 0) -> Image.Image:
    generator = np.random.default_rng(seed)
    channels = {"L": (), "RGB": (3,), "RGBA": (4,), "LA": (2,), "P": (3,)}[mode]
    pixels = generator.integers(0, 256, (height, width, *channels), dtype=np.uint8)
    if mode == "P":
        return Image.fromarray(pixels).quantize(16)
    return Image.fromarray(pixels, mode if mode == "LA" else None)


def encoded(picture: Image.Image, file_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, file_format)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P"])
@pytest.mark.parametrize("size", [(32, 32), (32, 57), (33, 31), (100, 40), (7, 9)])
def test_equals_the_processor(processor, mode, size):
    picture = random_picture(mode, *size)
    expected = processor(picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    for given in (picture, encoded(picture)):
        pixels = Preprocess(processor)(given)
        assert pixels.dtype == np.float32
        assert pixels.shape == (32, 32, 3)
        np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("size", [(32, 32), (40, 36)])
def test_jpeg_equals_the_processor(processor, size):
    data = encoded(random_picture("RGB", *size), "JPEG")
    expected = processor(Image.open(io.BytesIO(data)), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_array_equal(Preprocess(processor)(data), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"height": 24, "width": 24}, "do_center_crop": False},
        {"size": {"shortest_edge": 28}, "crop_size": {"height": 24, "width": 24}},
        {
            "size": {"shortest_edge": 24},
            "crop_size": {"height": 24, "width": 24},
            "resample": 2,
            "image_mean": [0.5] * 3,
            "image_std": [0.25] * 3,
        },
    ],
)
@pytest.mark.parametrize("size", [(24, 24), (50, 30)])
def test_equals_processors_of_other_settings(settings, size):
    processor = CLIPImageProcessorPil(**settings)
    picture = random_picture("RGB", *size)
    expected = processor(picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    preprocess = Preprocess(processor)
    assert preprocess.size == 24
    np.testing.assert_array_equal(preprocess(picture), expected)


@pytest.mark.parametrize("shape", [(32, 32), (32, 32, 1), (32, 32, 3), (32, 32, 4), (20, 45, 3)])
def test_arrays_equal_their_pictures(processor, shape):
    pixels = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    picture = Image.fromarray(pixels[..., 0] if shape[2:] == (1,) else pixels)
    np.testing.assert_array_equal(Preprocess(processor)(pixels), Preprocess(processor)(picture))


def test_normalisation_follows_its_definition(processor):
    pixels = np.full((32, 32, 3), (0, 128, 255), np.uint8)
    expected = (np.array([0, 128, 255]) / 255 - processor.image_mean) / processor.image_std
    np.testing.assert_allclose(Preprocess(processor)(pixels)[5, 7], expected, rtol=1e-6)


@pytest.mark.parametrize("augment", ["crop", "flip_crop"])
def test_augmentation_follows_its_generator_and_is_left_out_without_one(processor, augment):
    picture = random_picture("RGB", 48, 40)
    preprocess = Preprocess(processor, augment=augment, min_area=0.4)
    first, again = (preprocess(picture, np.random.default_rng(3)) for _ in range(2))
    other = preprocess(picture, np.random.default_rng(4))
    assert first.shape == (32, 32, 3)
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    np.testing.assert_array_equal(preprocess(picture), Preprocess(processor)(picture))


def test_crops_stay_inside_and_flips_mirror_half(processor):
    # Red grows to the right and green downwards, so a crop tells where it was taken and whether it was mirrored.
    ramp = np.arange(64, dtype=np.uint8) * 4
    pixels = np.stack([np.tile(ramp, (64, 1)), np.tile(ramp[:, None], (1, 64)), np.zeros((64, 64), np.uint8)], -1)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=[0.0] * 3, image_std=[1.0] * 3
    )
    preprocess = Preprocess(processor, augment="flip_crop", min_area=0.5)
    mirrored = 0
    shares = []
    for seed in range(200):
        crop = preprocess(pixels, np.random.default_rng(seed)) * 255 / 4  # source coordinates
        across, down = crop[16, -1, 0] - crop[16, 0, 0], crop[-1, 16, 1] - crop[0, 16, 1]
        mirrored += across < 0
        assert down > 0
        shares.append(abs(across) * down * (32 / 31) ** 2 / 64**2)
    assert 70 < mirrored < 130
    # The picture's bounds may cut a long crop short, which takes at most a factor of 4/3.
    assert min(shares) > 0.5 * 3 / 4 * 0.9
    assert 0.9 < max(shares) < 1.02


@pytest.mark.parametrize("keep", [0, 20, 200])
def test_damaged_files_are_unreadable(processor, keep):
    data = encoded(random_picture("RGB", 32, 32))
    with pytest.raises(UnreadablePicture, match="cannot be decoded"):
        Preprocess(processor)(data[:keep])


def test_damaged_checksum_is_unreadable(processor):
    data = bytearray(encoded(random_picture("RGB", 32, 32)))
    data[60] ^= 255
    with pytest.raises(UnreadablePicture):
        Preprocess(processor)(bytes(data))


def test_mistakes_are_named(processor):
    with pytest.raises(UserError, match="did you mean 'flip_crop'"):
        Preprocess(processor, augment="flipcrop")
    with pytest.raises(UserError, match="min_area"):
        Preprocess(processor, augment="crop", min_area=0.0)
    with pytest.raises(UserError, match="uint8"):
        Preprocess(processor)(np.zeros((32, 32, 3), np.float32))
    with pytest.raises(UserError, match="bytes"):
        Preprocess(processor)("picture.png")
    with pytest.raises(UserError, match="square"):
        Preprocess(CLIPImageProcessorPil(crop_size={"height": 32, "width": 30}))
    with pytest.raises(UserError, match="do_normalize"):
        Preprocess(CLIPImageProcessorPil(do_normalize=False))


def test_survives_pickling(processor):
    picture = random_picture("RGB", 40, 50)
    copy = pickle.loads(pickle.dumps(Preprocess(processor)))
    np.testing.assert_array_equal(copy(picture), Preprocess(processor)(picture))
