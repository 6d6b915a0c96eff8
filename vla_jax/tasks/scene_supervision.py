"""Dense supervision of both towers from the exact annotations of generated scenes.

Three linear heads, used in pretraining and thrown away afterwards:

- ``patches``: every patch token tells the attributes of the object in the cell of the 3 x 3 grid that the patch is in;
- ``cells``: the joint feature tells the attributes of the object in every cell;
- ``pairings``: the joint feature tells which pairs of attribute values some object has together (a red circle, not a
  circle and something red).

The last two read the normalised feature of an image, or of a text, with the same weights. Both towers so learn one code
for one scene, and what a caption leaves open becomes a distribution over what may be there.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vla_jax.backbones.clip import normalise
from vla_jax.data.scenes.vocabulary import ATTRIBUTES, PLACES

VALUES = tuple(len(words) for words in ATTRIBUTES.values())
"""Number of values of shape, color, size and texture."""

# One class more for each attribute: no object.
_SPLITS = tuple(np.cumsum([count + 1 for count in VALUES])[:-1].tolist())
_CLASSES = sum(VALUES) + len(VALUES)
# Pairs of attributes whose values are to be bound: shape with each of the others.
_BOUND = tuple((0, other) for other in range(1, len(VALUES)))
_PAIRINGS = sum(VALUES[first] * VALUES[second] for first, second in _BOUND)


class SceneHeads(nn.Module):
    """The three heads; every method needs the parameters of one :meth:`__call__`."""

    def setup(self):
        self.patches = nn.Dense(_CLASSES)
        self.cells = nn.Dense(len(PLACES) * _CLASSES)
        self.pairings = nn.Dense(_PAIRINGS)
        self.norm = nn.LayerNorm(use_bias=False, use_scale=False)

    def __call__(self, patch_tokens: jax.Array, features: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """All logits; see the methods."""
        return self.of_patches(patch_tokens), *self.of_features(features)

    def of_patches(self, patch_tokens: jax.Array) -> jax.Array:
        """``[batch, patches, width]``, class token left out, to ``[batch, patches, classes]``."""
        return self.patches(self.norm(patch_tokens))

    def of_features(self, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        """``[batch, projection]`` to ``[batch, cells, classes]`` and ``[batch, pairings]``."""
        code = normalise(features) * features.shape[-1] ** 0.5
        return self.cells(code).reshape(-1, len(PLACES), _CLASSES), self.pairings(code)


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


def attribute_loss(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The mean cross-entropy over places and attributes, and the accuracy where there is an object.

    Args:
        logits: ``[batch, places, classes]``.
        labels: int32 ``[batch, places, 4]``, as :func:`cell_labels` gives them.

    Returns:
        The loss, float32 []; the accuracy of each attribute, float32 [4].
    """
    losses, accuracies = [], []
    for attribute, part in enumerate(jnp.split(logits.astype(jnp.float32), _SPLITS, axis=-1)):
        label = labels[..., attribute]
        losses.append(optax.softmax_cross_entropy_with_integer_labels(part, label).mean())
        present = label > 0
        right = (jnp.argmax(part, -1) == label) & present
        accuracies.append(right.sum() / jnp.maximum(present.sum(), 1))
    return jnp.stack(losses).mean(), jnp.stack(accuracies)


def pairing_labels(labels: jax.Array) -> jax.Array:
    """Which pairs of attribute values some object has together: ``[batch, cells, 4]`` to bool ``[batch, pairings]``."""
    parts = []
    for first, second in _BOUND:
        one = jax.nn.one_hot(labels[..., first] - 1, VALUES[first])  # an absent object's -1 has no one
        other = jax.nn.one_hot(labels[..., second] - 1, VALUES[second])
        together = jnp.einsum("bcm,bcn->bmn", one, other) > 0
        parts.append(together.reshape(labels.shape[0], -1))
    return jnp.concatenate(parts, axis=-1)


def pairing_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean binary cross-entropy of :func:`pairing_labels`, float32 []."""
    targets = pairing_labels(labels).astype(jnp.float32)
    return optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), targets).mean()
