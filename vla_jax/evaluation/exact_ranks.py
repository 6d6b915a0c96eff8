"""How many wrong candidates stand before the right one, among 100,000 and without holding all scores at once.

Scores are products of features, taken in float32, a block of images with a block of texts at a time; one pass serves
both directions. Rounding must not decide who is first, and captions do occur twice in a data set: where two scores
differ by no more than float32 can tell apart, they are computed again in float64, and only what is then equal is a tie.
A tie stands before the right one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.errors import UserError

BLOCK = (512, 2048)
"""Images and texts of which the products are held at once: few enough for a cache to hold them."""

# Rounding errors of a sum of n products grow like sqrt(n) units: beyond four times that they do not occur in practice
# (Higham and Mary 2019, section 3, whose constant is lambda = 4 for a chance of 1e-3 in the worst case).
_ERROR_SIZE = 4 * 2.0**-24
# Scores this near, for features of length one, are the same score: float64's own rounding.
_SAME = 1e-12
# From this share of a block on, it is cheaper to compute all of it in float64.
_MANY = 1 / 256
_PAIRS_AT_A_TIME = 2**14


@dataclass(frozen=True)
class Before:
    """How many wrong candidates score at least as high as a right one.

    Attributes:
        image_to_text: int64 ``[images, most texts of an image]``: for each of an image's own texts, the best first, the
            texts of other images before it; -1 where an image has fewer.
        text_to_image: int64 ``[texts]``: for each text the other images before its own.
    """

    image_to_text: np.ndarray
    text_to_image: np.ndarray


def count_before(
    images: np.ndarray, texts: np.ndarray, owner: np.ndarray | None = None, *, block: tuple[int, int] = BLOCK
) -> Before:
    """Ranks every text for every image, and every image for every text.

    The memory is that of the features, of the texts once more, of one block and, in the worst case (most scores equal),
    three times as much of it again in float64.

    Args:
        images: float32 ``[images, width]``, of any length.
        texts: float32 ``[texts, width]``.
        owner: int ``[texts]``, which image each text belongs to; text i belongs to image i if left out.
        block: images and texts of which the products are held at once.

    Raises:
        UserError: for shapes that do not fit, a feature that is not finite, a text of no image, or an image without a
            text, or a block out of range.
    """
    images, texts = checked("images", images), checked("texts", texts)
    owner = check_owner(owner, len(images), len(texts))
    if images.shape[1] != texts.shape[1]:
        raise UserError(f"images have features of width {images.shape[1]} and texts of {texts.shape[1]}")
    if not 1 <= min(block) <= max(block) < 2**16:
        raise UserError(f"a block has 1 to {2**16 - 1} images and as many texts, got {block}")
    own, score = _own_texts(images, texts, owner)
    error = _ERROR_SIZE * images.shape[1] ** 0.5
    image_length, text_length = _lengths(images), _lengths(texts)
    # No product exceeds the product of the lengths, so that one bound a row serves all of its scores.
    sides = (
        _Side(np.where(own >= 0, score[own], np.inf), image_length * text_length.max()),
        _Side(score[:, None], text_length * image_length.max()),
    )
    rows, columns = _even(len(images), block[0]), _even(len(texts), block[1])
    text_parts = [_Part(texts, sides[1], start, columns, error) for start in range(0, len(texts), columns)]
    for start in range(0, len(images), rows):
        image_part = _Part(images, sides[0], start, rows, error)
        for text_part in text_parts:
            _count_block(image_part, text_part, owner)
    counted = np.where(own >= 0, sides[0].count, -1)
    return Before(image_to_text=counted, text_to_image=sides[1].count[:, 0])


def checked(what: str, features: np.ndarray) -> np.ndarray:
    """Features as contiguous float32.

    Raises:
        UserError: for another number of axes, none of them, or one that is not finite.
    """
    features = np.ascontiguousarray(features, np.float32)
    if features.ndim != 2 or not features.size:
        raise UserError(f"features of {what} are [{what}, width] with at least one; given {features.shape}")
    if not np.isfinite(features).all():
        bad = int(np.argmax(~np.isfinite(features).all(1)))
        raise UserError(f"features of {what} must be finite; row {bad} is not, and nothing can be ranked against it")
    return features


def check_owner(owner: np.ndarray | None, images: int, texts: int) -> np.ndarray:
    """Which image each text belongs to, once it is sure that every image has one.

    Raises:
        UserError: for a text of no image, an image without a text, or different numbers where none is given.
    """
    if owner is None:
        if images != texts:
            raise UserError(f"{images} images and {texts} texts do not go in pairs; say in owner which belong together")
        return np.arange(texts)
    owner = np.asarray(owner)
    if owner.shape != (texts,) or not np.issubdtype(owner.dtype, np.integer):
        raise UserError(f"owner names an image for each of {texts} texts; given {owner.dtype} {list(owner.shape)}")
    if (owner < 0).any() or (owner >= images).any():
        row = int(np.argmax((owner < 0) | (owner >= images)))
        raise UserError(f"text {row} belongs to image {owner[row]}; there are images 0 to {images - 1}")
    if (alone := np.flatnonzero(np.bincount(owner, minlength=images) == 0)).size:
        raise UserError(f"{alone.size} images have no text, the first of them image {alone[0]}; leave them out")
    return owner.astype(np.int64)


def _even(total: int, most: int) -> int:
    """A size of parts that leaves no smaller last one, if one above half of ``most`` does: one program serves all."""
    return next((size for size in range(min(most, total), most // 2, -1) if total % size == 0), most)


class _Side:
    """The queries of one direction on their way through the blocks.

    Attributes:
        score: float64 ``[queries, right ones]``, what the right ones score; infinite where there are fewer.
        size: float64 ``[queries]``, what no product of this query exceeds.
        count: int64 ``[queries, right ones]``, wrong ones found before each so far.
    """

    def __init__(self, score: np.ndarray, size: np.ndarray):
        self.score, self.size = score, size
        self.count = np.zeros(score.shape, np.int64)


class _Part:
    """Some of one side's queries, with what a block needs of them on the device.

    Attributes:
        side: the side.
        at: which of its queries.
        features: float32 ``[queries, width]``, on the host.
        device: the same, and between which float32 scores nothing is sure, ``[queries, right ones]`` each.
        equal_from: float64 ``[queries, right ones]``, from which score on a candidate stands before the right one.
    """

    def __init__(self, features: np.ndarray, side: _Side, start: int, size: int, error: float):
        self.side, self.at = side, slice(start, min(start + size, len(features)))
        self.features = features[self.at]
        score, length = side.score[self.at], side.size[self.at][:, None]
        self.low, self.high = np.float32(score - error * length), np.float32(score + error * length)
        self.equal_from = score - _SAME * length
        self.device = jax.device_put((self.features, self.low, self.high))

    def __len__(self) -> int:
        return len(self.features)


def _count_block(images: _Part, texts: _Part, owner: np.ndarray) -> None:
    """Adds one block's counts to both directions."""
    own = owner[texts.at] - images.at.start
    own = np.where((own >= 0) & (own < len(images)), own, len(images)).astype(np.int32)
    scores, *packed = _block(images.device, texts.device, own)
    parts = [(part, *_unpacked(counts)) for part, counts in zip((images, texts), packed, strict=True)]
    if max(unsure.sum() for _, _, unsure in parts) > _MANY * len(images) * len(texts):
        _count_exactly(images, texts, own)
        return
    for direction, (part, above, unsure) in enumerate(parts):
        part.side.count[part.at] += above
        queries, places = np.nonzero(unsure)
        if not len(queries):
            continue
        low, high = part.low[queries, places], part.high[queries, places]
        rows = np.asarray(scores)[queries] if direction == 0 else np.asarray(scores)[:, queries].T
        which, candidates = np.nonzero((rows >= low[:, None]) & (rows <= high[:, None]))
        queries, places = queries[which], places[which]
        pairs = (queries, candidates) if direction == 0 else (candidates, queries)
        before = _products(images.features, texts.features, *pairs) >= part.equal_from[queries, places]
        np.add.at(part.side.count, (queries[before] + part.at.start, places[before]), 1)


def _count_exactly(images: _Part, texts: _Part, own: np.ndarray) -> None:
    """The same for a block of which so many scores are nearly equal that all of it is computed in float64."""
    exact = images.features.astype(np.float64) @ texts.features.astype(np.float64).T
    inside = np.flatnonzero(own < len(images))
    exact[own[inside], inside] = -np.inf
    for part, scores in ((images, exact), (texts, exact.T)):
        for place in range(part.equal_from.shape[1]):
            part.side.count[part.at, place] += (scores >= part.equal_from[:, place, None]).sum(1)


@jax.jit
def _block(
    images: tuple[jax.Array, ...], texts: tuple[jax.Array, ...], own: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A block's products without those of own pairs; and each direction's counts, packed, [queries, right ones]."""
    scores = product(images[0], texts[0])
    scores = scores.at[own, jnp.arange(scores.shape[1])].set(-jnp.inf, mode="drop")
    packed = []
    for axis, (_, low, high) in ((1, images), (0, texts)):
        counts = []
        for place in range(low.shape[1]):
            near, sure = (jnp.expand_dims(bound[:, place], axis) for bound in (low, high))
            # Both counts in one number: a pass over the scores costs more than what is done to each.
            each = (scores >= near).astype(jnp.uint32) + ((scores > sure).astype(jnp.uint32) << 16)
            counts.append(each.sum(axis, dtype=jnp.uint32))
        packed.append(jnp.stack(counts, axis=-1))
    return scores, *packed


def _unpacked(packed: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """How many scores lie above both bounds, and how many between them, int64 [queries, right ones]."""
    packed = np.asarray(packed).astype(np.int64)
    above = packed >> 16
    return above, (packed & 0xFFFF) - above


@functools.partial(jax.jit, inline=True)
def product(first: jax.Array, second: jax.Array) -> jax.Array:
    """All products of rows, ``[first, second]``, in float32."""
    # Accelerators would otherwise round to shorter types first, by more than the bounds allow for.
    return jnp.matmul(first, second.T, precision=jax.lax.Precision.HIGHEST)


def _own_texts(images: np.ndarray, texts: np.ndarray, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each image's own texts, the best first, int64 [images, most]; -1 where fewer; and what each text scores there."""
    score = _products(images, texts, owner, np.arange(len(texts)))
    counts = np.bincount(owner, minlength=len(images))
    order = np.lexsort((-score, owner))
    own = np.full((len(images), counts.max()), -1, np.int64)
    own[np.arange(counts.max()) < counts[:, None]] = order
    return own, score


def _products(images: np.ndarray, texts: np.ndarray, of_images: np.ndarray, of_texts: np.ndarray) -> np.ndarray:
    """The products of pairs in float64, each summed in the same order."""
    found = np.empty(len(of_images))
    for start in range(0, len(of_images), _PAIRS_AT_A_TIME):
        part = slice(start, start + _PAIRS_AT_A_TIME)
        found[part] = (images[of_images[part]].astype(np.float64) * texts[of_texts[part]]).sum(1)
    return found


def _lengths(features: np.ndarray) -> np.ndarray:
    """The features' lengths, float64, without a float64 copy of all of them."""
    return np.sqrt(np.einsum("nw,nw->n", features, features, dtype=np.float64))
