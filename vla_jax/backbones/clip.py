"""CLIP (Radford et al. 2021): an image and a text transformer that meet in one feature space.

Parameter names are listed in ``docs/architecture.md``; :mod:`vla_jax.backbones.convert` maps them to the hub's.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from vla_jax.backbones.clip_config import CLIPConfig
from vla_jax.backbones.transformer import Compute, init_blocks, layer_norm, run_blocks
from vla_jax.errors import UserError
from vla_jax.slots import Adapters, Occupancy, Segment, between, empty_slot, vacant

Given = jax.Array | np.ndarray
"""An array from outside: what comes from a pipeline may not have met a device yet."""


@flax.struct.dataclass
class Prefix:
    """Both streams somewhere on their way, so that what no trained weight touches is computed once and kept.

    Attributes:
        image: ``[batch, image tokens, width]`` after ``image_layers`` blocks, or None.
        text: ``[batch, text tokens, width]`` after ``text_layers`` blocks, or None.
        image_layers: blocks the image stream has passed.
        text_layers: blocks the text stream has passed.
    """

    image: jax.Array | None
    text: jax.Array | None
    image_layers: int = flax.struct.field(pytree_node=False)
    text_layers: int = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class CLIPOutput:
    """What CLIP computes; the image's or the text's part is None where no image or no text was given.

    Attributes:
        image_features: ``[batch, projection]``, projected, not normalised.
        text_features: ``[batch, projection]``, projected, not normalised.
        image_pooled: ``[batch, width]``, the class token after the last LayerNorm.
        text_pooled: ``[batch, width]``, the end-of-text token after the last LayerNorm.
        image_tokens: ``[batch, 1 + patches, width]``, the last block's output.
        text_tokens: ``[batch, length, width]``, the last LayerNorm's output.
        image_hidden: ``[1 + depth, batch, 1 + patches, width]``, the embeddings and every block's output; None unless
            asked for.
        text_hidden: ``[1 + depth, batch, length, width]``; None unless asked for.
        scale: ``[]``, what cosines are multiplied with.
    """

    image_features: jax.Array | None
    text_features: jax.Array | None
    image_pooled: jax.Array | None
    text_pooled: jax.Array | None
    image_tokens: jax.Array | None
    text_tokens: jax.Array | None
    image_hidden: jax.Array | None
    text_hidden: jax.Array | None
    scale: jax.Array

    @property
    def logits(self) -> jax.Array:
        """``[images, texts]`` scaled cosines."""
        return self.scale * normalise(self.image_features) @ normalise(self.text_features).T

    @property
    def pair_logits(self) -> jax.Array:
        """``[batch]`` scaled cosine of each image with the text beside it."""
        return self.scale * jnp.sum(normalise(self.image_features) * normalise(self.text_features), -1)


def normalise(features: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
    """Features of length one, in float32 for the norm's sake."""
    features = features.astype(jnp.float32)
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)


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
        self.projection = nn.Dense(config.projection, use_bias=False, dtype=self.compute.dtype)

    def embed(self, image: Float[Given, "batch size size 3"]) -> Float[Array, "batch patches width"]:
        """The class token and the patches as they enter the first block."""
        dtype = self.compute.dtype
        patches = self.patch_embedding(image)
        first = jnp.broadcast_to(self.class_embedding.astype(dtype), (patches.shape[0], 1, patches.shape[-1]))
        stream = jnp.concatenate([first, patches], axis=1) + self.position_embedding.astype(dtype)
        return self.pre_norm(stream)

    def run(
        self, stream: Float[Array, "batch patches width"], segments: Sequence[Segment], hidden: bool
    ) -> tuple[Float[Array, "batch patches width"], list[Float[Array, "_ batch patches width"]]]:
        """Runs the blocks of ``segments``; see :func:`run_blocks`."""
        return run_blocks(self.config.vision, self.compute, self.blocks, stream, None, segments, hidden=hidden)

    def pool(
        self, stream: Float[Array, "batch patches width"]
    ) -> tuple[Float[Array, "batch width"], Float[Array, "batch projection"]]:
        """The class token after the last LayerNorm, and its projection."""
        pooled = self.post_norm(stream[:, 0])
        return pooled, self.projection(pooled)


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
        self.projection = nn.Dense(config.projection, use_bias=False, dtype=self.compute.dtype)

    def embed(self, tokens: Int[Given, "batch length"]) -> Float[Array, "batch length width"]:
        """The tokens as they enter the first block."""
        embedded = jnp.take(self.token_embedding, tokens, axis=0) + self.position_embedding[: tokens.shape[1]]
        return embedded.astype(self.compute.dtype)

    def run(
        self,
        stream: Float[Array, "batch length width"],
        text_mask: Shaped[Given, "batch length"] | None,
        segments: Sequence[Segment],
        hidden: bool,
    ) -> tuple[Float[Array, "batch length width"], list[Float[Array, "_ batch length width"]]]:
        """Runs the blocks of ``segments`` causally, padding unseen where a mask is given."""
        length = stream.shape[1]
        seen = jnp.tril(jnp.ones((length, length), bool))[None, None]  # [1, 1, length, length]
        if text_mask is not None:
            seen = seen & text_mask.astype(bool)[:, None, None, :]
        bias = jnp.where(seen, 0.0, jnp.finfo(jnp.float32).min)
        return run_blocks(self.config.text, self.compute, self.blocks, stream, bias, segments, hidden=hidden)

    def pool(
        self, stream: Float[Array, "batch length width"], tokens: Int[Given, "batch length"]
    ) -> tuple[Float[Array, "batch length width"], Float[Array, "batch width"], Float[Array, "batch projection"]]:
        """Every token after the last LayerNorm, the pooled one, and its projection."""
        stream = self.post_norm(stream)
        pooled = jnp.take_along_axis(stream, pool_position(self.config, tokens)[:, None, None], axis=1)[:, 0]
        return stream, pooled, self.projection(pooled)


def pool_position(config: CLIPConfig, tokens: Int[Given, "batch length"]) -> Int[Array, "batch"]:
    """Where each text's feature is read: its first end-of-text token or its largest token id."""
    if config.pooling == "largest_id":
        return jnp.argmax(tokens, axis=-1)
    return jnp.argmax(tokens == config.eos_token_id, axis=-1)


class CLIP(nn.Module):
    """CLIP with adapter slots.

    Attributes:
        config: the shape.
        compute: dtype, unrolling and rematerialisation.
    """

    config: CLIPConfig
    compute: Compute = Compute()

    def setup(self):
        self.vision = VisionTower(self.config, self.compute)
        self.text = TextTower(self.config, self.compute)
        # exp(2.6592) = 1 / 0.07, the value training starts from (Radford et al. 2021, section 2.5).
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(2.6592), ())

    def __call__(
        self,
        images: Float[Given, "images size size 3"] | None = None,
        tokens: Int[Given, "texts length"] | None = None,
        text_mask: Shaped[Given, "texts length"] | None = None,
        *,
        adapters: Adapters | None = None,
        route: Int[Given, "texts"] | None = None,
        key: jax.Array | None = None,
        after: Prefix | None = None,
        hidden_states: bool = False,
    ) -> CLIPOutput:
        """Encodes images, texts or both.

        Args:
            images: normalised pixels, or None.
            tokens: token ids, or None. As many texts as images where a joint stands.
            text_mask: false on padding; None where texts are not to be masked. Causal
                attention already hides what follows a text, so that the pooled feature does not depend on it.
            adapters: what sits in the slots; None for the plain backbone.
            route: each example's task for adapters stacked over tasks, -1 for the bare backbone.
            key: dropout key of this step; None for evaluation.
            after: streams to go on from instead of starting at ``images`` and the token embeddings; ``tokens`` are
                still needed for texts. Nothing may sit in the slots already passed.
            hidden_states: whether to return every block's output.

        Raises:
            UserError: where adapters that join the towers are given only one of them, or sit where ``after`` has
                passed.
        """
        depths = {"vision": self.config.vision.depth, "text": self.config.text.depth}
        occupancy = vacant(depths) if adapters is None else adapters.occupy(route, key)
        if after is None:
            after = self._start(images, tokens)
        image, text, hidden = self._run(after, depths, tokens, text_mask, occupancy, hidden_states)
        image_pooled = image_features = text_pooled = text_features = None
        if image is not None:
            image_pooled, image_features = self.vision.pool(image)
        if text is not None:
            text, text_pooled, text_features = self.text.pool(text, tokens)
        return CLIPOutput(
            image_features=image_features,
            text_features=text_features,
            image_pooled=image_pooled,
            text_pooled=text_pooled,
            image_tokens=image,
            text_tokens=text,
            image_hidden=hidden["vision"],
            text_hidden=hidden["text"],
            scale=jnp.exp(self.logit_scale),
        )

    def prefix(
        self,
        images: Float[Given, "images size size 3"] | None = None,
        tokens: Int[Given, "texts length"] | None = None,
        text_mask: Shaped[Given, "texts length"] | None = None,
        *,
        image_layers: int,
        text_layers: int,
    ) -> Prefix:
        """Both streams after the first blocks of the plain backbone, to be gone on from by ``__call__(after=...)``.

        Raises:
            UserError: for more blocks than a tower has.
        """
        asked = {"image_layers": (image_layers, self.config.vision), "text_layers": (text_layers, self.config.text)}
        for name, (layers, tower) in asked.items():
            if not 0 <= layers <= tower.depth:
                raise UserError(f"{name} {layers} is outside 0 to {tower.depth}, the blocks that tower has")
        depths = {"vision": image_layers, "text": text_layers}
        plain = vacant(depths)
        image, text, _ = self._run(self._start(images, tokens), depths, tokens, text_mask, plain, False)
        return Prefix(image, text, image_layers, text_layers)

    def _start(self, images: Given | None, tokens: Given | None) -> Prefix:
        """Both embeddings, as they come to the slot before the first block."""
        image = None if images is None else self.vision.embed(images)
        text = None if tokens is None else self.text.embed(tokens)
        return Prefix(image, text, 0, 0)

    def _run(
        self,
        start: Prefix,
        stop: dict[str, int],
        tokens: Given | None,
        text_mask: Given | None,
        occupancy: Occupancy,
        hidden_states: bool,
    ) -> tuple[jax.Array | None, jax.Array | None, dict[str, jax.Array | None]]:
        """Runs both towers in step: each to the next joint, the joint, and on from there."""
        image, text = start.image, start.text
        at = {"vision": start.image_layers, "text": start.text_layers}
        _check_passed(at, occupancy)
        if occupancy.joints and (image is None or text is None):
            raise UserError(
                "fusion adapters join the two towers and need images and tokens together; "
                f"got {'no images' if image is None else 'no tokens'}"
            )
        if image is not None and at["vision"] == 0:
            image = occupancy.embed["vision"]("embed", image, image)
        if text is not None and at["text"] == 0:
            text = occupancy.embed["text"]("embed", text, text)
        hidden = {"vision": [image[None]] if hidden_states and image is not None else [], "text": []}
        if hidden_states and text is not None:
            hidden["text"].append(text[None])
        for joint in (*occupancy.joints, None):
            to = stop if joint is None else {"vision": joint.vision_layer + 1, "text": joint.text_layer + 1}
            if image is not None:
                leg = between(occupancy.segments["vision"], at["vision"], to["vision"])
                image, outputs = self.vision.run(image, leg, hidden_states)
                hidden["vision"] += outputs
            if text is not None:
                leg = between(occupancy.segments["text"], at["text"], to["text"])
                text, outputs = self.text.run(text, text_mask, leg, hidden_states)
                hidden["text"] += outputs
            if joint is not None:
                image, text = joint.call(image, text, self._words(tokens, text_mask))
            at = to
        return image, text, {tower: jnp.concatenate(parts) if parts else None for tower, parts in hidden.items()}

    def _words(
        self, tokens: Int[Given, "batch length"], text_mask: Shaped[Given, "batch length"] | None
    ) -> Bool[Array, "batch length"]:
        """Which tokens belong to the text: without a mask, those up to the pooled one."""
        if text_mask is not None:
            return text_mask.astype(bool)
        return jnp.arange(tokens.shape[1]) <= pool_position(self.config, tokens)[:, None]


def _check_passed(at: dict[str, int], occupancy: Occupancy) -> None:
    """Refuses to leave out adapters that sit in blocks which a given prefix has passed already."""
    for tower, layers in at.items():
        passed = between(occupancy.segments[tower], 0, layers)
        embedded = layers > 0 and occupancy.embed[tower] is not empty_slot
        joined = [joint for joint in occupancy.joints if getattr(joint, f"{tower}_layer") + 1 < layers]
        if embedded or joined or any(jax.tree.leaves(segment.tree) for segment in passed):
            raise UserError(
                f"the given prefix passed {layers} blocks of the {tower} tower without the adapters that sit there; "
                "compute a prefix that ends before the first adapter"
            )
