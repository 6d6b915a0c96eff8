"""CLIP's two towers: embeddings, blocks, pooling, and the places where adapters insert tokens."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from vla_jax.backbones.clip_config import CLIPConfig
from vla_jax.backbones.transformer import (
    BlockOutputs,
    Compute,
    Linear,
    as_bias,
    init_blocks,
    layer_norm,
    run_blocks,
)
from vla_jax.errors import UserError
from vla_jax.slots import Insert, Inserted, Segment, Slot

Given = jax.Array | np.ndarray
"""An array from outside: what comes from a pipeline may not have met a device yet."""


class PatchEmbedding(nn.Module):
    """One linear map for every patch: a convolution without overlap, written as the product it is."""

    patch_size: int
    width: int
    dtype: str

    @nn.compact
    def __call__(self, image: Float[Given, "batch size size 3"]) -> Float[Array, "batch patches width"]:
        """Maps the patches, row by row."""
        patch = self.patch_size
        kernel = self.param("kernel", nn.initializers.normal(0.02), (patch, patch, 3, self.width))
        batch, size = image.shape[0], image.shape[1]
        patches = image.reshape(batch, size // patch, patch, size // patch, patch, 3).swapaxes(2, 3)
        patches = patches.reshape(batch, -1, patch * patch * 3).astype(self.dtype)
        return patches @ kernel.reshape(-1, self.width).astype(self.dtype)


class VisionTower(nn.Module):
    """The image transformer up to its projection."""

    config: CLIPConfig
    compute: Compute

    def setup(self):
        config, width = self.config, self.config.vision.width
        self.patch_embedding = PatchEmbedding(config.patch_size, width, self.compute.dtype)
        self.class_embedding = self.param("class_embedding", nn.initializers.normal(0.02), (width,))
        self.position_embedding = self.param(
            "position_embedding", nn.initializers.normal(0.02), (1 + config.grid**2, width)
        )
        self.pre_norm = layer_norm(config.vision, self.compute)
        self.blocks = self.param("blocks", init_blocks, config.vision)
        self.post_norm = layer_norm(config.vision, self.compute)
        self.projection = Linear(config.projection, self.compute, use_bias=False)

    def embed(
        self, image: Float[Given, "batch size size 3"], insert: Insert | None
    ) -> tuple[Float[Array, "batch tokens width"], Inserted | None]:
        """The class token, the patches and what is inserted behind them, as they enter the first block."""
        dtype = self.compute.dtype
        patches = self.patch_embedding(image)
        first = jnp.broadcast_to(self.class_embedding.astype(dtype), (patches.shape[0], 1, patches.shape[-1]))
        stream = jnp.concatenate([first, patches], axis=1) + self.position_embedding.astype(dtype)
        inserted = None
        if insert is not None:
            added, seen = insert(stream, None)
            inserted = Inserted(stream.shape[1], added.shape[1], seen)
            stream = jnp.concatenate([stream, added], axis=1)
        return self.pre_norm(stream), inserted

    def run(
        self,
        stream: Float[Array, "batch tokens width"],
        segments: Sequence[Segment],
        hidden: bool,
        inserted: Inserted | None,
    ) -> tuple[Float[Array, "batch tokens width"], list[BlockOutputs]]:
        """Runs the blocks of ``segments``; see :func:`run_blocks`."""
        bias = None
        if inserted is not None and inserted.seen is not None:
            own = jnp.ones((stream.shape[0], inserted.start), bool)
            bias = as_bias(jnp.concatenate([own, inserted.seen], axis=1))[:, None, None]  # [batch, 1, 1, tokens]
        config = self.config.vision
        return run_blocks(config, self.compute, self.blocks, stream, bias, segments, hidden=hidden, inserted=inserted)

    def pool(
        self, stream: Float[Array, "batch tokens width"], slot: Slot
    ) -> tuple[Float[Array, "batch width"], Float[Array, "batch projection"]]:
        """The class token after the last LayerNorm, and its projection."""
        pooled = self.post_norm(stream[:, 0])
        return pooled, _project(self.projection, pooled, slot)

    def patch_features(self, stream: Float[Array, "batch tokens width"]) -> Float[Array, "batch patches projection"]:
        """Every patch after the last LayerNorm and the projection, which are trained for the class token alone."""
        return self.projection(self.post_norm(stream[:, 1:]))[0]


class TextTower(nn.Module):
    """The causal text transformer up to its projection."""

    config: CLIPConfig
    compute: Compute

    def setup(self):
        config, width = self.config, self.config.text.width
        embedding_init = nn.initializers.normal(0.02)
        self.token_embedding = self.param("token_embedding", embedding_init, (config.vocabulary_size, width))
        self.position_embedding = self.param("position_embedding", embedding_init, (config.context_length, width))
        self.blocks = self.param("blocks", init_blocks, config.text)
        self.post_norm = layer_norm(config.text, self.compute)
        self.projection = Linear(config.projection, self.compute, use_bias=False)

    def embed(
        self,
        tokens: Int[Given, "batch length"],
        insert: Insert | None,
        image_features: Float[Array, "batch projection"] | None,
    ) -> tuple[Float[Array, "batch tokens width"], Inserted | None]:
        """The tokens, and what is inserted after the first of them, as they enter the first block.

        Raises:
            UserError: for more tokens than the context has positions.
        """
        dtype = self.compute.dtype
        embedded = jnp.take(self.token_embedding, tokens, axis=0)
        if insert is None:
            return (embedded + self.position_embedding[: tokens.shape[1]]).astype(dtype), None
        added, seen = insert(embedded.astype(dtype), image_features)
        inserted = Inserted(1, added.shape[1], seen)
        length = tokens.shape[1] + inserted.count
        if length > self.config.context_length:
            raise UserError(
                f"texts of {tokens.shape[1]} tokens and {inserted.count} inserted ones exceed the context of "
                f"{self.config.context_length}; use shorter texts (text_length) or fewer prompts"
            )
        stream = jnp.concatenate([embedded[:, :1], added.astype(embedded.dtype), embedded[:, 1:]], axis=1)
        if seen is None:
            return (stream + self.position_embedding[:length]).astype(dtype), inserted
        # What an example does without takes none of its positions.
        first, rest = jnp.ones_like(seen[:, :1]), jnp.ones((len(seen), tokens.shape[1] - 1), bool)
        place = jnp.cumsum(jnp.concatenate([first, seen, rest], axis=1), axis=1) - 1  # [batch, tokens]
        return (stream + self.position_embedding[place]).astype(dtype), inserted

    def run(
        self,
        stream: Float[Array, "batch tokens width"],
        text_mask: Shaped[Given, "batch length"] | None,
        segments: Sequence[Segment],
        hidden: bool,
        inserted: Inserted | None,
    ) -> tuple[Float[Array, "batch tokens width"], list[BlockOutputs]]:
        """Runs the blocks of ``segments`` causally, padding unseen where a mask is given."""
        seen = seen_by_words(stream.shape[1], with_inserted(text_mask, stream, inserted))
        bias, config = as_bias(seen)[:, None], self.config.text
        return run_blocks(config, self.compute, self.blocks, stream, bias, segments, hidden=hidden, inserted=inserted)

    def pool(
        self,
        stream: Float[Array, "batch length width"],
        tokens: Int[Given, "batch length"],
        slot: Slot,
    ) -> tuple[Float[Array, "batch length width"], Float[Array, "batch width"], Float[Array, "batch projection"]]:
        """Every token after the last LayerNorm, the pooled one, and its projection."""
        stream = self.post_norm(stream)
        pooled = jnp.take_along_axis(stream, pool_position(self.config, tokens)[:, None, None], axis=1)[:, 0]
        return stream, pooled, _project(self.projection, pooled, slot)


def _project(projection: Linear, pooled: Float[Array, "batch width"], slot: Slot) -> Float[Array, "batch projection"]:
    """The feature of a pooled token; at its slot it is a stream of one token."""
    feature, weights = projection(pooled)
    return slot("projection", pooled[:, None], feature[:, None], weights)[:, 0]


def seen_by_words(length: int, mask: Bool[Array, "batch length"] | None) -> Bool[Array, "#batch length length"]:
    """Which token of a text sees which: those before it and itself, and no padding."""
    seen = jnp.tril(jnp.ones((length, length), bool))[None]
    return seen if mask is None else seen & mask[:, None, :]


def with_inserted(
    mask: Shaped[Given, "batch length"] | None, stream: Float[Array, "batch tokens width"], inserted: Inserted | None
) -> Bool[Array, "batch tokens"] | None:
    """The mask of a text with tokens inserted in it; None where everything is seen."""
    mask = None if mask is None else jnp.asarray(mask, bool)
    if inserted is None or (mask is None and inserted.seen is None):
        return mask
    batch, tokens, _ = stream.shape
    own = jnp.ones((batch, tokens - inserted.count), bool) if mask is None else mask
    added = jnp.ones((batch, inserted.count), bool) if inserted.seen is None else inserted.seen
    return jnp.concatenate([own[:, : inserted.start], added, own[:, inserted.start :]], axis=1)


def without_inserted(tokens: Float[Array, "*batch tokens width"], inserted: Inserted | None) -> jax.Array:
    """A stream without the tokens that were inserted."""
    if inserted is None:
        return tokens
    start, stop = inserted.start, inserted.start + inserted.count
    return jnp.concatenate([tokens[..., :start, :], tokens[..., stop:, :]], axis=-2)


def pool_position(config: CLIPConfig, tokens: Int[Given, "batch length"]) -> Int[Array, "batch"]:
    """Where each text's feature is read: its first end-of-text token or its largest token id."""
    if config.pooling == "largest_id":
        return jnp.argmax(tokens, axis=-1)
    return jnp.argmax(tokens == config.eos_token_id, axis=-1)
