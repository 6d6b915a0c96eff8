"""What adapters on frozen features have in common: checked sets of features, and the order in which they are seen."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from vla_jax.errors import UserError

AnyArray = Array | np.ndarray
"""On the host or on devices."""


class Labelled(NamedTuple):
    """Frozen features with a label each.

    Attributes:
        features: float ``[examples, width]``.
        labels: int ``[examples]``, from 0.
    """

    features: ArrayLike
    labels: ArrayLike


def unit(features: Float[AnyArray, "*batch width"]) -> Float[Array, "*batch width"]:
    """Features of length one, in float32."""
    features = jnp.asarray(features, jnp.float32)
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)


def checked_features(what: str, features: ArrayLike, width: int | None = None) -> Float[Array, "examples width"]:
    """Features in float32, once it is sure that they can be normalised.

    Args:
        what: whose features, for messages.
        features: ``[examples, width]``.
        width: the width that they must have, if that is known.

    Raises:
        UserError: for another number of axes, no example, another width, or a row that is zero or not finite.
    """
    found = np.asarray(features)
    if found.ndim != 2 or not found.size:
        raise UserError(f"features of {what} are [examples, width] with at least one example; given {found.shape}")
    if width is not None and found.shape[1] != width:
        raise UserError(f"features of {what} have width {found.shape[1]}; the width here is {width}")
    found = found.astype(np.float32)
    length = np.linalg.norm(found, axis=1)
    bad = np.flatnonzero(~np.isfinite(length) | (length == 0))
    if bad.size:
        raise UserError(
            f"{bad.size} of {len(found)} features of {what} are zero or not finite, the first in row {bad[0]}; "
            "leave these examples out"
        )
    return jnp.asarray(found)


def checked_labels(
    what: str, labels: ArrayLike, examples: int, classes: int, classes_of: str
) -> Int[Array, "examples"]:
    """Labels in int32, once it is sure that each names a class.

    Args:
        what: whose labels, for messages.
        labels: ``[examples]``.
        examples: how many there must be.
        classes: how many classes there are.
        classes_of: what says so, for messages.

    Raises:
        UserError: for another shape, a type that is no integer, or a label that names no class.
    """
    found = np.asarray(labels)
    if found.shape != (examples,) or not np.issubdtype(found.dtype, np.integer):
        raise UserError(
            f"labels of {what} are whole numbers, one for each of {examples} examples; "
            f"given {found.dtype} {list(found.shape)}"
        )
    beyond = np.flatnonzero((found < 0) | (found >= classes))
    if beyond.size:
        raise UserError(
            f"label {found[beyond[0]]} in row {beyond[0]} of {what} names no class; {classes_of} "
            f"{'has' if classes == 1 else 'have'} labels 0 to {classes - 1}"
        )
    return jnp.asarray(found.astype(np.int32))


def epoch_orders(
    key: jax.Array, examples: int, batch_size: int, epochs: int
) -> Int[np.ndarray, "epochs batches batch"]:
    """Which examples each batch of each epoch holds, int32; -1 fills up an epoch's last batch.

    The orders are drawn one after the other by NumPy's generator, seeded with the key's words.

    Args:
        key: of the order.
        examples: how many there are.
        batch_size: of a batch; where there are fewer examples, all of them make one batch.
        epochs: how often all of them are seen.
    """
    size = min(batch_size, examples)
    batches = -(-examples // size)
    generator = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    orders = np.full((epochs, batches * size), -1, np.int32)
    for order in orders:
        order[:examples] = generator.permutation(examples)
    return orders.reshape(epochs, batches, size)
