"""Contrastive losses of matching images and texts: symmetric InfoNCE and the sigmoid loss.

Both are plain functions of the features of the global batch. Under :func:`jax.jit` over a mesh the compiler gathers
what a device lacks, so every image meets every text of the whole batch, and the loss is the single device's.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from vla_jax.errors import UserError, unknown
from vla_jax.tasks.heads import masked_mean

Loss = Literal["info_nce", "sigmoid"]


def info_nce(logits: Float[Array, "images texts"], valid: Bool[Array, "images"] | None = None) -> Float[Array, ""]:
    """Symmetric InfoNCE: each image picks its text, each text its image (Radford et al. 2021, figure 3).

    Args:
        logits: ``[batch, batch]``, scaled cosines of image i with text j; the diagonal belongs together.
        valid: ``[batch]``, which pairs there are; others neither choose nor are chosen from. All of them if None.

    Returns:
        The mean of both cross-entropies, float32 [].

    Raises:
        UserError: if the logits are not square.
    """
    logits = _square(logits)
    matched = jnp.diagonal(logits)
    if valid is not None:
        # A pair that is not there keeps its own logit, so that no logarithm is of zero.
        logits = jnp.where(_seen(valid) | jnp.eye(len(logits), dtype=bool), logits, -jnp.inf)
    of_images = jax.nn.logsumexp(logits, axis=1) - matched
    of_texts = jax.nn.logsumexp(logits, axis=0) - matched
    return (masked_mean(of_images, valid) + masked_mean(of_texts, valid)) / 2


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


def matched_first(
    logits: Float[Array, "images texts"], valid: Bool[Array, "images"] | None = None
) -> dict[str, Float[Array, ""]]:
    """Shares of images, and of texts, whose own partner scores strictly highest in the batch, float32 [].

    Arguments are those of :func:`info_nce`.
    """
    logits = _square(logits)
    others = ~jnp.eye(len(logits), dtype=bool)
    others = jnp.where(others if valid is None else others & _seen(valid), logits, -jnp.inf)
    matched = jnp.diagonal(logits)
    return {
        "image_to_text": masked_mean((matched > others.max(1)).astype(jnp.float32), valid),
        "text_to_image": masked_mean((matched > others.max(0)).astype(jnp.float32), valid),
    }


def _seen(valid: Bool[Array, "batch"]) -> Bool[Array, "batch batch"]:
    """Which logits are of an image and a text that are there."""
    return valid[:, None] & valid[None, :]


def _square(logits: jax.Array) -> jax.Array:
    """The logits in float32: exponentials and their sums lose what distinguishes pairs in a shorter type."""
    if logits.ndim != 2 or logits.shape[0] != logits.shape[1]:
        raise UserError(f"contrastive logits are [batch, batch], one text for each image; given {logits.shape}")
    return logits.astype(jnp.float32)
