"""Dense supervision of both towers from the exact annotations of generated scenes.

Linear heads, used in pretraining and thrown away afterwards:

- ``patches``: every patch token tells the attributes of the object in the cell of the 3 x 3 grid that the patch is in;
- ``cells``: the joint feature tells the attributes of the object in every cell;
- ``pairings``: the joint feature tells which pairs of attribute values some object has together (a red circle, not a
  circle and something red);
- ``coordinates``: the joint feature gives every shape and every colour a place on each axis, in the order in which the
  objects lie (the red one left of the blue one);
- ``numbers``: the joint feature tells how many objects have each shape and each colour.

All but the first read the normalised feature of an image, or of a text, with the same weights. Both towers so learn one
code for one scene, and what a caption leaves open becomes a distribution over what may be there.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from vla_jax.backbones.clip import normalise
from vla_jax.data.scenes.vocabulary import ATTRIBUTES, NUMBERS, PLACES

VALUES = tuple(len(words) for words in ATTRIBUTES.values())
"""Number of values of shape, color, size and texture."""

# One class more for each attribute: no object.
_SPLITS = tuple(np.cumsum([count + 1 for count in VALUES])[:-1].tolist())
_CLASSES = sum(VALUES) + len(VALUES)
# Pairs of attributes whose values are to be bound: shape with each of the others.
_BOUND = tuple((0, other) for other in range(1, len(VALUES)))
_PAIRINGS = sum(VALUES[first] * VALUES[second] for first, second in _BOUND)
# The attributes by whose values objects are put in order and counted.
_NAMING = (0, 1)
_NAMED = sum(VALUES[attribute] for attribute in _NAMING)
_LINE = np.arange(len(PLACES))
# Which cells lie before which, across and down: bool [2, cells, cells].
_BEFORE = np.stack([a[:, None] < a[None, :] for a in (_LINE % 3, _LINE // 3)])


class FeatureLogits(NamedTuple):
    """What the heads read off a joint feature.

    Attributes:
        cells: ``[batch, cells, classes]``.
        pairings: ``[batch, pairings]``.
        coordinates: ``[batch, 2, shapes and colours]``; only differences have a meaning.
        numbers: ``[batch, shapes and colours, 6]``, from none to five.
    """

    cells: jax.Array
    pairings: jax.Array
    coordinates: jax.Array
    numbers: jax.Array


class SceneHeads(nn.Module):
    """The heads; every method needs the parameters of one :meth:`__call__`."""

    def setup(self):
        self.patches = nn.Dense(_CLASSES)
        self.cells = nn.Dense(len(PLACES) * _CLASSES)
        self.pairings = nn.Dense(_PAIRINGS)
        self.coordinates = nn.Dense(2 * _NAMED)
        self.numbers = nn.Dense(_NAMED * len(NUMBERS))
        self.norm = nn.LayerNorm(use_bias=False, use_scale=False)

    def __call__(
        self, patch_tokens: Float[Array, "batch patches width"], features: Float[Array, "_ projection"]
    ) -> tuple[jax.Array, FeatureLogits]:
        """All logits; see the methods."""
        return self.of_patches(patch_tokens), self.of_features(features)

    def of_patches(self, patch_tokens: Float[Array, "batch patches width"]) -> Float[Array, "batch patches classes"]:
        """What each patch, the class token left out, tells."""
        return self.patches(self.norm(patch_tokens))

    def of_features(self, features: Float[Array, "batch projection"]) -> FeatureLogits:
        """What each image, or text, tells."""
        code = normalise(features) * features.shape[-1] ** 0.5
        return FeatureLogits(
            self.cells(code).reshape(-1, len(PLACES), _CLASSES),
            self.pairings(code),
            self.coordinates(code).reshape(-1, 2, _NAMED),
            self.numbers(code).reshape(-1, _NAMED, len(NUMBERS)),
        )


def cell_labels(scene: dict) -> np.ndarray:
    """What each cell of a scene holds.

    Args:
        scene: annotations, as :func:`vla_jax.data.scenes.annotations` gives them.

    Returns:
        int32 [cells, 4]: shape, color, size and texture, each id plus one; 0 where there is no object.
    """
    labels = np.zeros((len(PLACES), len(VALUES)), np.int32)
    for thing in scene["objects"]:
        labels[thing["cell"]] = [thing[f"{name}_id"] + 1 for name in ATTRIBUTES]
    return labels


def cell_of_patch(grid: int) -> np.ndarray:
    """The cell in which the centre of each patch of a ``grid`` x ``grid`` picture lies, int [grid * grid]."""
    line = (np.arange(grid) + 0.5) * 3 // grid
    return (3 * line[:, None] + line[None, :]).astype(int).ravel()


def attribute_loss(
    logits: Float[Array, "batch places classes"], labels: Int[Array, "batch places 4"]
) -> tuple[Float[Array, ""], Float[Array, "4"]]:
    """The mean cross-entropy over places and attributes, and the accuracy where there is an object.

    Args:
        logits: of all attributes in a row.
        labels: as :func:`cell_labels` gives them.

    Returns:
        The loss, and the accuracy of each attribute.
    """
    losses, accuracies = [], []
    for attribute, part in enumerate(jnp.split(logits.astype(jnp.float32), _SPLITS, axis=-1)):
        label = labels[..., attribute]
        losses.append(optax.softmax_cross_entropy_with_integer_labels(part, label).mean())
        present = label > 0
        right = (jnp.argmax(part, -1) == label) & present
        accuracies.append(right.sum() / jnp.maximum(present.sum(), 1))
    return jnp.stack(losses).mean(), jnp.stack(accuracies)


def pairing_labels(labels: Int[Array, "batch cells 4"]) -> Bool[Array, "batch pairings"]:
    """Which pairs of attribute values some object has together."""
    parts = []
    for first, second in _BOUND:
        one = jax.nn.one_hot(labels[..., first] - 1, VALUES[first])  # an absent object's -1 has no one
        other = jax.nn.one_hot(labels[..., second] - 1, VALUES[second])
        together = jnp.einsum("bcm,bcn->bmn", one, other) > 0
        parts.append(together.reshape(labels.shape[0], -1))
    return jnp.concatenate(parts, axis=-1)


def pairing_loss(logits: Float[Array, "batch pairings"], labels: Int[Array, "batch cells 4"]) -> Float[Array, ""]:
    """The mean binary cross-entropy of :func:`pairing_labels`."""
    targets = pairing_labels(labels).astype(jnp.float32)
    return optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), targets).mean()


def order_labels(labels: Int[Array, "batch cells 4"]) -> Bool[Array, "batch 2 values values"]:
    """Which value lies before which, whatever objects have it.

    Args:
        labels: as :func:`cell_labels` gives them.

    Returns:
        For shapes and colours: across (left of) and down (above), whether an object of the first value lies before
        one of the second and none the other way round. False between a shape and a colour.
    """
    parts = []
    for attribute in _NAMING:
        present = jax.nn.one_hot(labels[..., attribute] - 1, VALUES[attribute])  # [batch, cells, values]
        before = jnp.einsum("bim,aij,bjn->bamn", present, _BEFORE.astype(np.float32), present) > 0
        parts.append(before & ~before.swapaxes(2, 3))
    shapes, colors = parts
    shapes = jnp.pad(shapes, [(0, 0), (0, 0), (0, 0), (0, VALUES[1])])
    colors = jnp.pad(colors, [(0, 0), (0, 0), (0, 0), (VALUES[0], 0)])
    return jnp.concatenate([shapes, colors], axis=2)


def order_loss(
    coordinates: Float[Array, "batch 2 values"], labels: Int[Array, "batch cells 4"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The mean logistic loss of the differences of coordinates that are in order (Bradley-Terry), and their accuracy.

    Args:
        coordinates: of shapes and colours.
        labels: as :func:`cell_labels` gives them.

    Returns:
        The loss and the share of pairs in the right order; 0 for a batch without a pair in order.
    """
    coordinates = coordinates.astype(jnp.float32)
    ordered = order_labels(labels)
    apart = coordinates[:, :, None, :] - coordinates[:, :, :, None]  # how much later the second value lies
    pairs = jnp.maximum(ordered.sum(), 1)
    loss = jnp.where(ordered, jax.nn.softplus(-apart), 0).sum() / pairs
    return loss, jnp.where(ordered, apart > 0, False).sum() / pairs


def number_labels(labels: Int[Array, "batch cells 4"]) -> Int[Array, "batch values"]:
    """How many objects have each shape and each colour."""
    counts = [jax.nn.one_hot(labels[..., a] - 1, VALUES[a], dtype=jnp.int32).sum(1) for a in _NAMING]
    return jnp.concatenate(counts, axis=-1)


def number_loss(logits: Float[Array, "batch values 6"], labels: Int[Array, "batch cells 4"]) -> Float[Array, ""]:
    """The mean cross-entropy of :func:`number_labels`."""
    targets = number_labels(labels)
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets).mean()
