"""Contrastive losses of matching images and texts: symmetric InfoNCE and the sigmoid loss.

Both are plain functions of the features of the global batch. Under :func:`jax.jit` over a mesh the compiler gathers
what a device lacks, so every image meets every text of the whole batch, and the loss is the single device's.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from vla_jax.errors import UserError, unknown

Loss = Literal["info_nce", "sigmoid"]


def info_nce(logits: Float[Array, "images texts"]) -> Float[Array, ""]:
    """Symmetric InfoNCE: each image picks its text, each text its image (Radford et al. 2021, figure 3).

    Args:
        logits: ``[batch, batch]``, scaled cosines of image i with text j; the diagonal belongs together.

    Returns:
        The mean of both cross-entropies, float32 [].

    Raises:
        UserError: if the logits are not square.
    """
    logits = _square(logits)
    matched = jnp.diagonal(logits)
    of_images = jax.nn.logsumexp(logits, axis=1) - matched
    of_texts = jax.nn.logsumexp(logits, axis=0) - matched
    return (of_images.mean() + of_texts.mean()) / 2


def sigmoid(logits: Float[Array, "images texts"], bias: Float[Array, ""] | float = 0.0) -> Float[Array, ""]:
    """The sigmoid loss of SigLIP: each pair is judged for itself (Zhai et al. 2023, equation 1).

    Args:
        logits: ``[batch, batch]``, scaled cosines of image i with text j; the diagonal belongs together.
        bias: added to every logit; the paper starts it at -10, since nearly all pairs do not match.

    Returns:
        The binary cross-entropies, summed over the pairs and divided by the batch, float32 [].

    Raises:
        UserError: if the logits are not square.
    """
    logits = _square(logits)
    count = logits.shape[0]
    return optax.sigmoid_binary_cross_entropy(logits + bias, jnp.eye(count)).sum() / count


def contrastive_loss(
    logits: Float[Array, "images texts"], loss: Loss = "info_nce", bias: Float[Array, ""] | float = 0.0
) -> Float[Array, ""]:
    """One of the losses by name; ``bias`` is used by ``sigmoid`` alone.

    Raises:
        UserError: if there is no loss of that name, or the logits are not square.
    """
    if loss == "info_nce":
        return info_nce(logits)
    if loss == "sigmoid":
        return sigmoid(logits, bias)
    raise unknown("contrastive loss", loss, ("info_nce", "sigmoid"))


def matched_first(logits: Float[Array, "images texts"]) -> dict[str, Float[Array, ""]]:
    """Shares of images, and of texts, whose own partner scores strictly highest in the batch, float32 []."""
    logits = _square(logits)
    others = jnp.where(jnp.eye(logits.shape[0], dtype=bool), -jnp.inf, logits)
    matched = jnp.diagonal(logits)
    return {
        "image_to_text": (matched > others.max(1)).astype(jnp.float32).mean(),
        "text_to_image": (matched > others.max(0)).astype(jnp.float32).mean(),
    }


def _square(logits: jax.Array) -> jax.Array:
    """The logits in float32: exponentials and their sums lose what distinguishes pairs in a shorter type."""
    if logits.ndim != 2 or logits.shape[0] != logits.shape[1]:
        raise UserError(f"contrastive logits are [batch, batch], one text for each image; given {logits.shape}")
    return logits.astype(jnp.float32)
