"""What the heads of pair tasks have in common: one feature vector from both towers, and a linear map on it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vla_jax.backbones.clip import CLIPOutput, normalise
from vla_jax.names import Tree


def pair_features(output: CLIPOutput) -> Float[Array, "batch features"]:
    """u, v, u * v and |u - v| of the normalised features, or the one that there is.

    Each normalised feature is scaled by the square root of its width, so that its entries are of the order of one.
    """
    image, text = output.image_features, output.text_features
    given = [normalise(f) * f.shape[-1] ** 0.5 for f in (image, text) if f is not None]
    if len(given) < 2:
        return given[0]
    u, v = given
    return jnp.concatenate([u, v, u * v, jnp.abs(u - v)], axis=-1)


def linear_head(features: int, outputs: int) -> dict[str, jax.Array]:
    """A linear head that starts at zero, where every output is equally likely."""
    return {"kernel": jnp.zeros((features, outputs), jnp.float32), "bias": jnp.zeros((outputs,), jnp.float32)}


def apply_linear(head: Tree, features: Float[Array, "batch features"]) -> Float[Array, "batch outputs"]:
    """The head's outputs, in float32."""
    return features.astype(jnp.float32) @ head["kernel"] + head["bias"]


def masked_mean(values: Float[Array, "batch"], valid: Bool[Array, "batch"] | None) -> Float[Array, ""]:
    """The mean over the global batch, of valid rows alone where there is a mask."""
    if valid is None:
        return values.mean()
    weights = valid.astype(values.dtype)
    return (values * weights).sum() / jnp.maximum(weights.sum(), 1)
