"""The axes of the device mesh, and the one hint that models give the compiler about it."""

from __future__ import annotations

import math

import jax
from jax.sharding import PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def keep_batch_cut(x: jax.Array) -> jax.Array:
    """Keeps an activation cut along its batch, and whole in every other dimension, over the mesh that is set.

    To be called where a block begins. Without it the compiler may follow the weights instead: under ``fsdp`` it then
    cuts the width and sums activations in every block, where it should gather one layer's weights; and under
    ``tensor`` it may leave a cut behind the pair of products that needs it.

    Args:
        x: [batch, ...].

    Returns:
        The same values. Where no mesh with these axes is set (:func:`jax.set_mesh`), or where they do not divide the
        batch, the array itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not set(BATCH_AXES) <= set(mesh.axis_names) or x.shape[0] % math.prod(mesh.shape[axis] for axis in BATCH_AXES):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))
