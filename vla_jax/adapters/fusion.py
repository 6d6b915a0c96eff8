"""Cross-modal fusion: image and text streams meet inside their bottlenecks.

For the image, and with the roles exchanged for the text, at a pair of blocks (one of each tower)::

    h_v = W_d^v v                       down-projections into one common width
    c_v = Attention(q = h_v, kv = h_t)  what the other stream has to say to each token, or its mean over tokens
    g_v = sigmoid(W_g^v [h_v ; c_v])    how much of it to let in
    v'  = v + s W_u^v f(h_v + g_v * c_v)

``mix`` leaves parts of this out: ``none`` is two independent bottlenecks, ``gate`` takes the other stream's mean for c,
``attention`` sets the gate to one, ``gate_attention`` has both. Padded text is neither attended to nor averaged over.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vla_jax.adapters.base import ACTIVATIONS, Activation, Linear, Method, Sized, check_activation
from vla_jax.errors import UserError, unknown
from vla_jax.slots import Site

Mix = Literal["none", "gate", "attention", "gate_attention"]
Direction = Literal["both", "to_vision", "to_text"]

MIXES = ("none", "gate", "attention", "gate_attention")
DIRECTIONS = ("both", "to_vision", "to_text")


@dataclasses.dataclass(frozen=True)
class Fusion(Sized, Method):
    """A fusion adapter at a pair of blocks.

    Attributes:
        rank: the common width of both bottlenecks.
        reduction: the narrower tower's width over the common width, where ``rank`` is None.
        mix: how the streams meet.
        direction: which stream hears the other; the one that does not keeps its plain bottleneck.
        heads: attention heads; must divide the common width.
        activation: f.
        scale: factor on what is added.
        layer_norm: normalises what the bottlenecks read.
        shared: both streams use the same down, up, attention and gate weights; the towers must be equally wide.
    """

    kind: ClassVar[str] = "fusion"
    slots: ClassVar[tuple[str, ...]] = ("block_out",)
    joint: ClassVar[bool] = True

    mix: Mix = "gate_attention"
    direction: Direction = "both"
    heads: int = 4
    activation: Activation = "gelu"
    scale: float = 1.0
    layer_norm: bool = True
    shared: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_activation(self.activation)
        if self.mix not in MIXES:
            raise unknown("fusion mix", self.mix, MIXES)
        if self.direction not in DIRECTIONS:
            raise unknown("fusion direction", self.direction, DIRECTIONS)
        if self.heads < 1:
            raise UserError(f"heads must be at least 1, got {self.heads}")

    @property
    def attends(self) -> bool:
        """Whether the streams meet by attention."""
        return self.mix in ("attention", "gate_attention")

    @property
    def gates(self) -> bool:
        """Whether a gate decides how much is let in."""
        return self.mix in ("gate", "gate_attention")

    def common_width(self, vision_width: int, text_width: int) -> int:
        """The width in which both streams meet."""
        rank = self.rank_for(min(vision_width, text_width))
        if self.attends and rank % self.heads:
            raise UserError(f"the common width {rank} does not divide into {self.heads} heads; change rank or heads")
        if self.shared and vision_width != text_width:
            raise UserError(f"shared fusion weights need towers of one width, got {vision_width} and {text_width}")
        return rank

    def module(self, site: Site) -> nn.Module:
        """The module for one example and one pair of layers."""
        del site
        return FusionModule(self, parent=None)

    def parameter_counts(self, site: Site) -> dict[str, int]:
        """Two bottlenecks; for each stream that hears, ``3 r^2`` for attention and ``2 r^2 + r`` for a gate."""
        rank = self.common_width(*site.widths)
        hears_image, hears_text = self.direction != "to_vision", self.direction != "to_text"
        sides = [("vision", site.widths[0], hears_text), ("text", site.widths[1], hears_image)]
        if self.shared:
            sides = [("shared", site.widths[0], True)]
        counts = {}
        for side, width, hears in sides:
            own = {"reduce/kernel": width * rank, "reduce/bias": rank}
            own |= {"expand/kernel": rank * width, "expand/bias": width}
            own |= {"norm/scale": width, "norm/bias": width} if self.layer_norm else {}
            if hears and self.attends:
                own |= {f"{map_name}/kernel": rank**2 for map_name in ("query", "key", "value")}
            if hears and self.gates:
                own |= {"gate/kernel": 2 * rank**2, "gate/bias": rank}
            counts |= {f"{side}/{name}": count for name, count in own.items()}
        return counts

    @property
    def starts_as_identity(self) -> bool:
        """The up-projections start at zero."""
        return True


class FusionModule(nn.Module):
    """One pair of layers."""

    method: Fusion

    @nn.compact
    def __call__(
        self,
        image: Float[Array, "patches vision_width"],
        text: Float[Array, "words text_width"],
        words: Bool[Array, "words"],
    ) -> tuple[Float[Array, "patches vision_width"], Float[Array, "words text_width"]]:
        """Joins the streams of one example.

        Args:
            image: the image stream, class token included.
            text: the text stream.
            words: false on padding.

        Returns:
            Both streams, in the same shapes.
        """
        method = self.method
        rank = method.common_width(image.shape[-1], text.shape[-1])
        hears_text = method.mix != "none" and method.direction != "to_text"
        hears_image = method.mix != "none" and method.direction != "to_vision"
        if method.shared:
            vision_side = text_side = Side(method, rank, image.shape[-1], method.mix != "none", name="shared")
        else:
            vision_side = Side(method, rank, image.shape[-1], hears_text, name="vision")
            text_side = Side(method, rank, text.shape[-1], hears_image, name="text")
        hidden_image, hidden_text = vision_side.down(image), text_side.down(text)  # [tokens, rank]
        mixed_image, mixed_text = hidden_image, hidden_text
        if hears_text:
            mixed_image = vision_side.listen(hidden_image, hidden_text, words)
        if hears_image:
            mixed_text = text_side.listen(hidden_text, hidden_image, jnp.ones(image.shape[:1], bool))
        return vision_side.up(image, mixed_image), text_side.up(text, mixed_text)


class Side(nn.Module):
    """One stream's share of a fusion adapter: its bottleneck and what it hears the other stream with."""

    method: Fusion
    rank: int
    width: int
    hears: bool

    def setup(self):
        method = self.method
        if method.layer_norm:
            self.norm = nn.LayerNorm(epsilon=1e-5)
        self.reduce = Linear(self.rank)
        self.expand = Linear(self.width, nn.initializers.zeros)
        if self.hears and method.attends:
            self.query = Linear(self.rank, use_bias=False)
            self.key = Linear(self.rank, use_bias=False)
            self.value = Linear(self.rank, use_bias=False)
        if self.hears and method.gates:
            self.gate = Linear(self.rank)

    def down(self, stream: Float[Array, "tokens width"]) -> Float[Array, "tokens rank"]:
        """Into the common width."""
        if self.method.layer_norm:
            stream = self.norm(stream).astype(stream.dtype)
        return self.reduce(stream)

    def listen(
        self, hidden: Float[Array, "tokens rank"], other: Float[Array, "others rank"], seen: Bool[Array, "others"]
    ) -> Float[Array, "tokens rank"]:
        """Lets in what the other stream says.

        Args:
            hidden: this stream in the common width.
            other: the other one.
            seen: false on padding of the other one.
        """
        heard = self._attend(hidden, other, seen) if self.method.attends else _mean(other, seen)
        heard = jnp.broadcast_to(heard, hidden.shape)
        if self.method.gates:
            heard = jax.nn.sigmoid(self.gate(jnp.concatenate([hidden, heard], -1))) * heard
        return hidden + heard

    def up(
        self, stream: Float[Array, "tokens width"], hidden: Float[Array, "tokens rank"]
    ) -> Float[Array, "tokens width"]:
        """Adds the bottleneck's output to the stream."""
        return stream + self.method.scale * self.expand(ACTIVATIONS[self.method.activation](hidden))

    def _attend(
        self, hidden: Float[Array, "tokens rank"], other: Float[Array, "others rank"], seen: Bool[Array, "others"]
    ) -> Float[Array, "tokens rank"]:
        heads = self.method.heads

        def to_heads(a: jax.Array) -> jax.Array:
            return a.reshape(a.shape[0], heads, -1).swapaxes(0, 1)  # [heads, tokens, rank / heads]

        query, key, value = to_heads(self.query(hidden)), to_heads(self.key(other)), to_heads(self.value(other))
        scores = (query @ key.swapaxes(1, 2)).astype(jnp.float32) * (self.rank // heads) ** -0.5
        scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)  # [heads, tokens, other tokens]
        weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
        return (weights @ value).swapaxes(0, 1).reshape(hidden.shape)


def _mean(tokens: Float[Array, "tokens rank"], seen: Bool[Array, "tokens"]) -> Float[Array, "rank"]:
    """The mean of the tokens that are seen."""
    weights = seen.astype(jnp.float32)
    return ((weights @ tokens.astype(jnp.float32)) / weights.sum()).astype(tokens.dtype)
