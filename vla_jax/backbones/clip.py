"""CLIP (Radford et al. 2021): an image and a text transformer that meet in one feature space.

Parameter names are listed in ``docs/architecture.md``; :mod:`vla_jax.backbones.convert` maps them to the hub's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from vla_jax.backbones.clip_config import CLIPConfig
from vla_jax.backbones.clip_towers import (
    Given,
    TextTower,
    VisionTower,
    pool_position,
    seen_by_words,
    with_inserted,
    without_inserted,
)
from vla_jax.backbones.transformer import BlockOutputs, Compute
from vla_jax.errors import UserError
from vla_jax.slots import Adapters, Inserted, Occupancy, between, empty_slot, vacant


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

    Tokens that adapters inserted are left out everywhere.

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
        readings: by tower, what adapters hand out for inspection, each ``[places, batch, ...]``.
        patch_features: ``[batch, patches, projection]``, each patch after the last LayerNorm and the bare projection,
            not normalised, so that patches can be compared with texts.
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
    readings: Mapping[str, Mapping[str, jax.Array]]
    patch_features: jax.Array | None = None

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
        route: Int[Given, "texts"] | Float[Given, "texts tasks"] | None = None,
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
            route: each example's task for adapters stacked over tasks, -1 for the bare backbone; or the weights, none
                negative, with which the tasks' adapters are mixed, all of them 0 for the bare backbone.
            key: dropout key of this step; None for evaluation.
            after: streams to go on from instead of starting at ``images`` and the token embeddings; ``tokens`` are
                still needed for texts. Nothing may sit in the slots already passed.
            hidden_states: whether to return every block's output.

        Raises:
            UserError: where adapters that join the towers are given only one of them, or sit where ``after`` has
                passed; where the insertion of tokens leaves the context too short.
        """
        depths = {"vision": self.config.vision.depth, "text": self.config.text.depth}
        occupancy = vacant(depths) if adapters is None else adapters.occupy(route, key)
        _check_given(after, images, tokens, occupancy)
        image = self._begin_image(images, after, occupancy)
        image_pooled = image_features = text_pooled = text_features = None
        image_tokens = text_tokens = patch_features = None
        if occupancy.conditioned and tokens is not None:
            self._advance(image, occupancy, depths["vision"], hidden_states or "vision" in occupancy.side)
            image_features = self.vision.pool(image.beside(occupancy), occupancy.projection["vision"])[1]
        text = self._begin_text(tokens, text_mask, after, occupancy, image_features)
        self._run(image, text, depths, occupancy, hidden_states)
        if image is not None:
            image_tokens = image.beside(occupancy)
            image_pooled, image_features = self.vision.pool(image_tokens, occupancy.projection["vision"])
            patch_features = self.vision.patch_features(image_tokens)
        if text is not None:
            beside, slot = text.beside(occupancy), occupancy.projection["text"]
            text_tokens, text_pooled, text_features = self.text.pool(beside, tokens, slot)
        return CLIPOutput(
            image_features=image_features,
            text_features=text_features,
            image_pooled=image_pooled,
            text_pooled=text_pooled,
            image_tokens=image_tokens,
            text_tokens=text_tokens,
            image_hidden=image.hidden() if hidden_states and image is not None else None,
            text_hidden=text.hidden() if hidden_states and text is not None else None,
            scale=jnp.exp(self.logit_scale),
            readings={
                name: stream.readings() | _once(occupancy, name)
                for name, stream in (("vision", image), ("text", text))
                if stream is not None
            },
            patch_features=patch_features,
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
        image = self._begin_image(images, None, plain)
        text = self._begin_text(tokens, text_mask, None, plain, None)
        self._run(image, text, depths, plain, False)
        return Prefix(image and image.tokens, text and text.tokens, image_layers, text_layers)

    def _begin_image(self, images: Given | None, after: Prefix | None, occupancy: Occupancy) -> _Stream | None:
        """The image stream where it starts: at the embeddings, or where it is given."""
        if after is not None:
            if after.image is None:
                return None
            stream = _Stream("vision", after.image, after.image_layers)
        elif images is None:
            return None
        else:
            stream = _Stream("vision", *_at_start(self.vision.embed(images, occupancy.insert.get("vision"))))
        return stream.embedded(occupancy)

    def _begin_text(
        self,
        tokens: Given | None,
        text_mask: Given | None,
        after: Prefix | None,
        occupancy: Occupancy,
        image_features: jax.Array | None,
    ) -> _Stream | None:
        """The text stream where it starts, with what else a text's stream needs."""
        if after is not None:
            if after.text is None:
                return None
            stream = _Stream("text", after.text, after.text_layers)
        elif tokens is None:
            return None
        else:
            embedded = self.text.embed(tokens, occupancy.insert.get("text"), image_features)
            stream = _Stream("text", *_at_start(embedded))
        stream.mask = text_mask
        if occupancy.joints:
            stream.words = self._words(tokens, text_mask)
        return stream.embedded(occupancy)

    def _run(
        self,
        image: _Stream | None,
        text: _Stream | None,
        stop: dict[str, int],
        occupancy: Occupancy,
        hidden: bool,
    ) -> None:
        """Runs both towers in step: each to the next joint, the joint, and on from there."""
        hidden = {tower: hidden or tower in occupancy.side for tower in stop}
        for joint in (*occupancy.joints, None):
            to = stop if joint is None else {"vision": joint.vision_layer + 1, "text": joint.text_layer + 1}
            for stream in (image, text):
                if stream is not None:
                    self._advance(stream, occupancy, to[stream.tower], hidden[stream.tower])
            if joint is not None:
                words = with_inserted(text.words, text.tokens, text.inserted)
                image.tokens, text.tokens = joint.call(image.tokens, text.tokens, words)

    def _advance(self, stream: _Stream, occupancy: Occupancy, to: int, hidden: bool) -> None:
        """Runs a tower's blocks up to block ``to``."""
        leg = between(occupancy.segments[stream.tower], stream.at, to)
        if stream.tower == "vision":
            stream.tokens, outputs = self.vision.run(stream.tokens, leg, hidden, stream.inserted)
        else:
            stream.tokens, outputs = self.text.run(stream.tokens, stream.mask, leg, hidden, stream.inserted)
        stream.outputs += outputs
        stream.at = to

    def _words(
        self, tokens: Int[Given, "batch length"], text_mask: Shaped[Given, "batch length"] | None
    ) -> Bool[Array, "batch length"]:
        """Which tokens belong to the text: without a mask, those up to the pooled one."""
        if text_mask is not None:
            return jnp.asarray(text_mask, bool)
        return jnp.arange(tokens.shape[1]) <= pool_position(self.config, tokens)[:, None]


@dataclasses.dataclass
class _Stream:
    """One tower's stream on its way.

    Attributes:
        tower: the tower.
        tokens: ``[batch, tokens, width]``.
        at: blocks it has passed.
        inserted: the tokens in it that adapters put there.
        start: the stream before the first block that was run.
        mask: of a text, ``[batch, length]`` as given, or None.
        words: of a text that is joined, ``bool [batch, length]``, which tokens belong to it.
        outputs: what its blocks handed out.
    """

    tower: str
    tokens: jax.Array
    at: int
    inserted: Inserted | None = None
    start: jax.Array | None = None
    mask: Given | None = None
    words: jax.Array | None = None
    outputs: list[BlockOutputs] = dataclasses.field(default_factory=list)

    def embedded(self, occupancy: Occupancy) -> _Stream:
        """This stream after the slot that follows the embeddings."""
        if self.at == 0:
            self.tokens = occupancy.embed[self.tower]("embed", self.tokens, self.tokens)
        self.start = self.tokens
        return self

    def beside(self, occupancy: Occupancy) -> Float[Array, "batch tokens width"]:
        """The last stream without inserted tokens, and with what runs beside the tower."""
        tokens = without_inserted(self.tokens, self.inserted)
        if self.tower not in occupancy.side:
            return tokens
        length = tokens.shape[1]
        if self.tower == "vision":
            seen = jnp.ones((1, length, length), bool)
        else:
            seen = seen_by_words(length, None if self.mask is None else jnp.asarray(self.mask, bool))
        return occupancy.side[self.tower](self.hidden(), tokens, seen)

    def hidden(self) -> Float[Array, "states batch tokens width"]:
        """The stream before the first and after every block that was run."""
        states = [self.start[None], *(output.hidden for output in self.outputs)]
        return without_inserted(jnp.concatenate(states), self.inserted)

    def readings(self) -> dict[str, jax.Array]:
        """What the slots of all blocks handed out."""
        by_name: dict[str, list[Any]] = {}
        for output in self.outputs:
            for name, reading in output.readings.items():
                by_name.setdefault(name, []).append(reading)
        return {name: jnp.concatenate(parts) for name, parts in by_name.items()}


def _at_start(embedded: tuple[jax.Array, Inserted | None]) -> tuple[jax.Array, int, Inserted | None]:
    tokens, inserted = embedded
    return tokens, 0, inserted


def _once(occupancy: Occupancy, tower: str) -> dict[str, jax.Array]:
    """What the slots that a tower has once handed out."""
    slots = [occupancy.embed[tower], occupancy.projection[tower]]
    slots += [occupancy.side[tower]] if tower in occupancy.side else []
    return {name: reading[None] for slot in slots for name, reading in slot.readings.items()}


def _check_given(after: Prefix | None, images: Given | None, tokens: Given | None, occupancy: Occupancy) -> None:
    """Refuses inputs that adapters cannot work on, and a prefix that has passed some of them already."""
    image = images if after is None else after.image
    if occupancy.joints and (image is None or tokens is None):
        raise UserError(
            "fusion adapters join the two towers and need images and tokens together; "
            f"got {'no images' if image is None else 'no tokens'}"
        )
    if occupancy.conditioned and tokens is not None and image is None:
        raise UserError("prompts that follow the image need the image beside each text; got no images")
    if occupancy.conditioned and occupancy.joints:
        raise UserError(
            "prompts that follow the image need the image tower's feature before a text is begun, and fusion adapters "
            "run both towers in step; use one of the two"
        )
    beside = occupancy.joints or occupancy.conditioned
    if beside and image is not None and tokens is not None and len(image) != len(tokens):
        raise UserError(
            f"these adapters read image i beside text i, and got {len(image)} images and {len(tokens)} texts; repeat "
            "what stands beside several"
        )
    if after is None:
        return
    for tower, layers in (("vision", after.image_layers), ("text", after.text_layers)):
        passed = between(occupancy.segments[tower], 0, layers)
        embedded = layers > 0 and occupancy.embed[tower] is not empty_slot
        joined = [joint for joint in occupancy.joints if getattr(joint, f"{tower}_layer") + 1 < layers]
        filled = any(jax.tree.leaves(segment.tree) for segment in passed)
        beside = layers > 0 and tower in occupancy.side
        if embedded or joined or filled or beside or tower in occupancy.insert:
            raise UserError(
                f"the given prefix passed {layers} blocks of the {tower} tower without the adapters that sit there; "
                "compute a prefix that ends before the first adapter"
            )
