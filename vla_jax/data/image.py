"""Pictures into a backbone's normalised pixels: what its image processor does, with optional random crops and flips."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vla_jax.data.boxes import View
from vla_jax.errors import UserError, unknown
from vla_jax.foreign import read_bytes

AUGMENTATIONS = ("none", "crop", "flip_crop")

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What is decoded. PIL knows many more, for which few have looked for flaws, and runs Ghostscript for one of them."""

MOST_PIXELS = 1 << 26
"""Of a picture: 8192 x 8192, some 200 MB as RGB, what cameras of 50 megapixels make. A file of a few kilobytes can
claim any number, and PIL by itself refuses none below three times this one."""

MOST_ELONGATED = 100
"""The longer edge in shorter ones. Processors make the shorter edge some hundred pixels long, and a picture of one row
would become one of a hundred times as many pixels."""

MOST_PICTURE_BYTES = 1 << 28
"""Of a picture's file: more than :data:`MOST_PIXELS` take without compression."""


class UnreadablePicture(Exception):
    """A picture that cannot be decoded; the pipeline names it, skips it and counts it."""


def opened(file: Path | io.BytesIO) -> Image.Image:
    """A picture whose size is known and within bounds, and of which no pixel is decoded yet.

    Raises:
        UnreadablePicture: it is of another format, damaged, or too large.
    """
    try:
        image = Image.open(file, formats=FORMATS)
    except Exception as error:  # whatever the reader of any format may raise on a damaged file
        reason = "it is no picture that can be read" if "cannot identify" in str(error) else str(error)
        raise UnreadablePicture(f"cannot be decoded: {reason}") from error
    _check_size(*image.size)
    return image


def _check_size(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise UnreadablePicture(f"cannot be decoded: it is {width} x {height}, and {MOST_PIXELS:,} pixels are the most")
    if max(width, height) > MOST_ELONGATED * min(width, height):
        raise UnreadablePicture(
            f"cannot be decoded: it is {width} x {height}, and no edge may be over {MOST_ELONGATED} times the other"
        )


def read_picture(path: Path) -> bytes:
    """The bytes of a picture's file.

    Raises:
        UserError: it is no regular file, or has more than :data:`MOST_PICTURE_BYTES`.
        OSError: it cannot be read.
    """
    return read_bytes(path, MOST_PICTURE_BYTES)


class Preprocess:
    """Turns one picture into float32 pixels ``[size, size, 3]`` as the backbone's image processor defines them.

    The processor of ``transformers`` does the work; a uint8 picture that already has the right size takes a shorter way
    of the same arithmetic, equal bit for bit and several times faster. Training may draw a random crop (and flip) in
    place of the processor's resize and centre crop. A flip makes "left of" wrong: use ``"flip_crop"`` only where text
    says nothing of sides.
    """

    def __init__(self, processor: Any, *, augment: str = "none", min_area: float = 0.9):
        """Reads the processor's settings.

        Args:
            processor: a ``CLIPImageProcessorPil`` or another processor of transformers with the same settings.
            augment: ``"none"``, ``"crop"`` (a random crop of ``min_area`` to 1 of the picture's area with a width to
                height ratio of 3/4 to 4/3, resized; Szegedy et al. 2015, with OpenCLIP's 0.9 for captioned pictures)
                or ``"flip_crop"`` (the same, then mirrored in half of the cases).
            min_area: the smallest share of the area that a crop keeps.

        Raises:
            UserError: if the processor's output is not square, does not rescale and normalise, or ``augment`` is
                unknown or ``min_area`` out of range.
        """
        if augment not in AUGMENTATIONS:
            raise unknown("augmentation", augment, AUGMENTATIONS)
        if not 0 < min_area <= 1:
            raise UserError(f"min_area is the share of a picture's area that a crop keeps, in (0, 1]; given {min_area}")
        if not (processor.do_resize and processor.do_rescale and processor.do_normalize):
            raise UserError(
                "the image processor must resize, rescale and normalise; set do_resize, do_rescale and do_normalize to "
                "true in preprocessor_config.json"
            )
        self._processor = processor
        self._augment = augment
        self._min_area = min_area
        resized = (processor.size.height or processor.size.shortest_edge, processor.size.width)
        cropped = (processor.crop_size.height, processor.crop_size.width) if processor.do_center_crop else resized
        if cropped[0] is None or cropped[0] != cropped[1]:
            raise UserError(
                "the image processor must give square pictures of one size; given "
                f"size={dict(processor.size)}, crop_size={dict(processor.crop_size or {})}"
            )
        self.size = int(cropped[0])
        self._resized = resized
        # With another resize target than the crop, a picture of the crop's size is still resized: no short way.
        self._resize_is_identity = resized[0] == self.size and resized[1] in (None, self.size)
        # The processor's own order of operations and dtypes, so that both ways agree bit for bit.
        self._levels = (np.arange(256) * processor.rescale_factor).astype(np.float32)
        # A row of pixels at a time: numpy is slow over an axis of three.
        self._mean = np.tile(np.asarray(processor.image_mean, np.float32), self.size)  # [size * 3]
        self._std = np.tile(np.asarray(processor.image_std, np.float32), self.size)

    def __call__(
        self, picture: bytes | Image.Image | np.ndarray, generator: np.random.Generator | None = None
    ) -> np.ndarray:
        """Decodes and normalises one picture.

        Args:
            picture: an encoded file (of :data:`FORMATS`), a PIL picture, or a uint8 array
                ``[height, width]`` or ``[height, width, 1, 3 or 4]``. Grey and palette become RGB; what is
                transparent becomes white, as in the processor.
            generator: draws the augmentation; None (evaluation) leaves it out.

        Returns:
            float32 ``[size, size, 3]``.

        Raises:
            UnreadablePicture: if the picture cannot be decoded.
            UserError: if ``picture`` is none of the above.
        """
        return self.with_view(picture, generator)[0]

    def with_view(
        self, picture: bytes | Image.Image | np.ndarray, generator: np.random.Generator | None = None
    ) -> tuple[np.ndarray, View]:
        """The same, and which part of the picture it is, by which boxes follow."""
        augmented = generator is not None and self._augment != "none"
        ready = isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and self._fits(picture.shape)
        if ready and not augmented:
            return self._normalise(picture), self._view(self.size, self.size)
        image = self._as_rgb(_decoded(picture))
        if augmented:
            pixels, view = self._augmented(image, generator)
            return self._normalise(pixels), view
        view = self._view(*image.size)
        if self._fits((image.height, image.width, 3)):
            return self._normalise(np.asarray(image)), view
        pixels = self._processor(image, return_tensors="np")["pixel_values"][0]  # [3, size, size]
        return np.ascontiguousarray(pixels.transpose(1, 2, 0), np.float32), view

    def _as_rgb(self, image: Image.Image) -> Image.Image:
        if image.mode == "RGB" and "transparency" not in image.info:
            return image
        try:
            return Image.fromarray(np.asarray(self._processor.convert_to_rgb(image)))
        except Exception as error:  # a palette or a transparent colour may be damaged though all pixels are there
            raise UnreadablePicture(f"cannot be decoded: {error}") from error

    def _view(self, width: int, height: int) -> View:
        """What the processor's resize and centre crop show of a picture, by its own rounding."""
        edge, fixed_width = self._resized
        if fixed_width is None:
            short, long = min(width, height), int(edge * max(width, height) / min(width, height))
            resized = (edge, long) if width == short else (long, edge)
        else:
            resized = (fixed_width, edge)
        scale = (width / resized[0], height / resized[1])
        start = [(length - self.size) // 2 for length in resized]
        corners = ((start[axis] + far) * scale[axis] for far in (0, self.size) for axis in (0, 1))
        return View.of_crop((width, height), tuple(corners))

    def _fits(self, shape: tuple[int, ...]) -> bool:
        return self._resize_is_identity and shape == (self.size, self.size, 3)

    def _normalise(self, pixels: np.ndarray) -> np.ndarray:
        normalised = self._levels.take(pixels.reshape(self.size, -1))  # [size, size * 3]
        normalised -= self._mean
        normalised /= self._std
        return normalised.reshape(pixels.shape)

    def _augmented(self, image: Image.Image, generator: np.random.Generator) -> tuple[np.ndarray, View]:
        width, height = image.size
        area = width * height * generator.uniform(self._min_area, 1.0)
        ratio = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
        crop_width = min(math.sqrt(area * ratio), width)
        crop_height = min(math.sqrt(area / ratio), height)
        left = generator.uniform(0, width - crop_width)
        top = generator.uniform(0, height - crop_height)
        box = (left, top, left + crop_width, top + crop_height)
        pixels = np.asarray(image.resize((self.size, self.size), Image.Resampling(self._processor.resample), box=box))
        mirrored = self._augment == "flip_crop" and generator.random() < 0.5
        if mirrored:
            pixels = pixels[:, ::-1]
        return pixels, View.of_crop(image.size, box, mirrored=mirrored)


def _decoded(picture: bytes | Image.Image | np.ndarray) -> Image.Image:
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or picture.shape[2:] not in ((), (1,), (3,), (4,)):
            raise UserError(
                f"a picture array is uint8 [height, width] or [height, width, 1, 3 or 4]; given {picture.dtype} "
                f"{list(picture.shape)}"
            )
        _check_size(picture.shape[1], picture.shape[0])
        return Image.fromarray(picture[..., 0] if picture.shape[2:] == (1,) else picture)
    if not isinstance(picture, Image.Image | bytes):
        raise UserError(f"a picture is the bytes of a file, a PIL picture or an array; given {type(picture).__name__}")
    if isinstance(picture, bytes):
        image = opened(io.BytesIO(picture))
    else:
        image = picture
        _check_size(*image.size)
    try:
        image.load()
    except Exception as error:  # whatever the decoder of any format may raise on a damaged file
        raise UnreadablePicture(f"cannot be decoded: {error}") from error
    return image
