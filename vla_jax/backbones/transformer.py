"""A pre-norm transformer: blocks stored stacked and scanned, with a slot wherever an adapter may sit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vla_jax.errors import UserError, unknown
from vla_jax.mesh import keep_batch_cut
from vla_jax.slots import Inserted, KeysValues, LinearWeights, Segment, Slot, TowerShape, empty_slot

Activation = Literal["quick_gelu", "gelu"]
Remat = Literal["none", "dots", "full"]

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


def worth_keeping(primitive: Any, *arguments: Any, **parameters: Any) -> bool:
    """Whether a result is that of a weight product, and took much to compute for its size.

    What comes out of a narrow adapter did not: it is as wide as what the frozen map beside it gives, for a fraction of
    the products, and both have to be kept for a sum of them that the backward pass needs. A policy of
    :func:`jax.checkpoint`.
    """
    if not jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *arguments, **parameters):
        return False
    left, right = arguments
    taken = math.prod(left.shape[axis] for axis in parameters["dimension_numbers"][0][0])
    given = min(left.size, right.size) // taken
    return given <= 4 * taken  # the map of a backbone that widens most is the first of an MLP, fourfold


REMAT_POLICIES: Mapping[str, Any] = {
    # Keeps the results of large products and recomputes what lies between them: cheap to redo, most of the memory.
    "dots": worth_keeping,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """The shape of one tower.

    Attributes:
        width: width of the residual stream.
        depth: number of blocks.
        heads: attention heads; must divide ``width``.
        mlp_width: width of the MLP's hidden layer.
        activation: ``quick_gelu`` (OpenAI's checkpoints) or ``gelu`` (exact; OpenCLIP's).
        norm_epsilon: added to the variance in every LayerNorm.
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    activation: Activation = "quick_gelu"
    norm_epsilon: float = 1e-5

    def __post_init__(self):
        if min(self.width, self.depth, self.heads, self.mlp_width) < 1:
            raise UserError(f"width, depth, heads and mlp_width must be positive, got {self}")
        if self.width % self.heads:
            raise UserError(f"width {self.width} does not divide into {self.heads} heads; choose a divisor of it")
        if self.activation not in ACTIVATIONS:
            raise unknown("activation", self.activation, ACTIVATIONS)

    @property
    def shape(self) -> TowerShape:
        """What adapters need to know of this tower."""
        return TowerShape(self.depth, self.width, self.mlp_width)


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a backbone is run; nothing here changes its parameters.

    Attributes:
        dtype: of activations and products; LayerNorm statistics and softmax are float32 throughout.
        unroll: blocks per iteration of the scan; the depth unrolls it whole.
        remat: what the backward pass recomputes: nothing, all but the weight products (``dots``; those of narrow
            adapters, which cost little, are recomputed too), or a whole block.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    unroll: int = 1
    remat: Remat = "none"

    def __post_init__(self):
        if self.dtype not in ("float32", "bfloat16"):
            raise unknown("compute dtype", self.dtype, ("float32", "bfloat16"))
        if self.unroll < 1:
            raise UserError(f"unroll must be at least 1, got {self.unroll}")
        if self.remat != "none" and self.remat not in REMAT_POLICIES:
            raise unknown("remat policy", self.remat, ("none", *REMAT_POLICIES))


def layer_norm(config: TowerConfig, compute: Compute, name: str | None = None) -> nn.LayerNorm:
    """A LayerNorm with two-pass statistics: the one-pass variance loses the digits that parity with PyTorch needs."""
    return nn.LayerNorm(epsilon=config.norm_epsilon, dtype=compute.dtype, use_fast_variance=False, name=name)


class Linear(nn.Module):
    """A linear map that also hands out its weights, which adapters at its slot may need."""

    features: int
    compute: Compute
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*batch in"]) -> tuple[Float[Array, "*batch out"], LinearWeights]:
        """The map's output and its weights, in the dtype they are stored in."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        y = x.astype(self.compute.dtype) @ kernel.astype(self.compute.dtype)
        if bias is not None:
            y = y + bias.astype(self.compute.dtype)
        return y, LinearWeights(kernel, bias)


class Attention(nn.Module):
    """Multi-head attention in ``[batch, heads, tokens, head width]`` layout."""

    config: TowerConfig
    compute: Compute

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        bias: Float[Array, "#batch 1 #queries tokens"] | None,
        slot: Slot,
    ) -> Float[Array, "batch tokens width"]:
        """Mixes tokens.

        Args:
            x: the normalised residual stream.
            bias: added to the scores; None lets everything be seen.
            slot: what sits in the attention's slots.
        """
        config = self.config
        head_width = config.width // config.heads

        def project(name: str) -> jax.Array:
            return slot(f"attn_{name}", x, *Linear(config.width, self.compute, name=name)(x))

        def to_heads(a: jax.Array) -> jax.Array:
            return a.reshape(*a.shape[:2], config.heads, head_width).swapaxes(
                1, 2
            )  # [batch, heads, tokens, head width]

        query, key, value = project("q"), project("k"), project("v")
        key, value, seen = slot("attn_kv", x, KeysValues(key, value))
        if key.shape[1] > x.shape[1]:
            bias = _prefixed(bias, x.shape[1], key.shape[1] - x.shape[1], seen)
        query = to_heads(query) * head_width**-0.5
        scores = query @ to_heads(key).swapaxes(2, 3)  # [batch, heads, tokens, tokens]
        scores = scores.astype(jnp.float32)
        if bias is not None:
            scores = scores + bias
        weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
        mixed = (weights @ to_heads(value)).swapaxes(1, 2).reshape(x.shape)
        return slot("attn_out", mixed, *Linear(config.width, self.compute, name="out")(mixed))


def _prefixed(
    bias: Float[Array, "#batch 1 #queries tokens"] | None,
    tokens: int,
    added: int,
    seen: Bool[Array, "batch added"] | None,
) -> Float[Array, "#batch 1 #queries added_tokens"] | None:
    """The bias over keys with ``added`` more in front of the tokens' own: a query sees those that its example sees."""
    if seen is None:
        return None if bias is None else jnp.pad(bias, [(0, 0)] * 3 + [(added, 0)])
    front = as_bias(seen)[:, None, None]  # [batch, 1, 1, added]
    if bias is None:
        bias = jnp.zeros((1, 1, 1, tokens))
    batch, queries = seen.shape[0], bias.shape[2]
    front, bias = (jnp.broadcast_to(a, (batch, 1, queries, a.shape[3])) for a in (front, bias))
    return jnp.concatenate([front, bias], axis=-1)


class Mlp(nn.Module):
    """Two linear maps with an activation between them."""

    config: TowerConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"], slot: Slot) -> Float[Array, "batch tokens width"]:
        """Maps each token for itself."""
        hidden = slot("mlp_fc1", x, *Linear(self.config.mlp_width, self.compute, name="fc1")(x))
        hidden = ACTIVATIONS[self.config.activation](hidden)
        hidden = slot("mlp_hidden", hidden, hidden)
        return slot("mlp_fc2", hidden, *Linear(self.config.width, self.compute, name="fc2")(hidden))


class Block(nn.Module):
    """One pre-norm block: attention and MLP, each added to the residual stream."""

    config: TowerConfig
    compute: Compute

    @nn.compact
    def __call__(
        self,
        stream: Float[Array, "batch tokens width"],
        bias: Float[Array, "#batch 1 #queries tokens"] | None,
        slot: Slot,
        inserted: Inserted | None = None,
    ) -> Float[Array, "batch tokens width"]:
        """Adds both sublayers to the residual stream; ``bias`` as in :class:`Attention`."""
        if inserted is not None:
            stream = _with_prompts(stream, slot, inserted)
        x = layer_norm(self.config, self.compute, "norm1")(stream)
        attended = Attention(self.config, self.compute, name="attn")(slot("attn_in", x, x), bias, slot)
        middle = stream + slot("attn_sublayer", x, attended)
        x = layer_norm(self.config, self.compute, "norm2")(middle)
        mapped = Mlp(self.config, self.compute, name="mlp")(slot("mlp_in", x, x), slot)
        return slot("block_out", stream, middle + slot("mlp_out", x, mapped))


def _with_prompts(
    stream: Float[Array, "batch tokens width"], slot: Slot, inserted: Inserted
) -> Float[Array, "batch tokens width"]:
    """The stream with what the slot makes of the inserted tokens in it."""
    start, stop = inserted.start, inserted.start + inserted.count
    prompts = stream[:, start:stop]
    changed = slot("prompts", stream, prompts)
    if changed is prompts:
        return stream
    return jnp.concatenate([stream[:, :start], changed, stream[:, stop:]], axis=1)


def as_bias(seen: Bool[Array, "*shape"]) -> Float[Array, "*shape"]:
    """What is added to attention scores so that what is not seen has no weight."""
    return jnp.where(seen, 0.0, jnp.finfo(jnp.float32).min)


def init_blocks(key: jax.Array, config: TowerConfig) -> dict[str, Any]:
    """Parameters of a tower's blocks, stacked ``[depth, ...]``."""
    stream = jnp.zeros((1, 1, config.width))
    init = jax.vmap(lambda k: Block(config, Compute()).init(k, stream, None, empty_slot)["params"])
    return init(jax.random.split(key, config.depth))


class BlockOutputs(NamedTuple):
    """What blocks hand out beside their stream.

    Attributes:
        hidden: the blocks' outputs ``[blocks, batch, tokens, width]``; None unless asked for.
        readings: what the occupants of their slots hand out, each ``[blocks, batch, ...]``.
    """

    hidden: Float[Array, "_ batch tokens width"] | None
    readings: Mapping[str, Any]


def run_blocks(
    config: TowerConfig,
    compute: Compute,
    params: Mapping[str, Any],
    stream: Float[Array, "batch tokens width"],
    bias: Float[Array, "#batch 1 #queries tokens"] | None,
    segments: Sequence[Segment],
    *,
    hidden: bool = False,
    inserted: Inserted | None = None,
) -> tuple[Float[Array, "batch tokens width"], list[BlockOutputs]]:
    """Runs consecutive blocks, one scan a segment.

    Args:
        config: the tower's shape.
        compute: how to run it.
        params: stacked parameters of all blocks of the tower.
        stream: the residual stream.
        bias: added to attention scores; None lets everything be seen.
        segments: which blocks, and what sits in their slots; they need not cover the whole depth.
        hidden: whether to hand out every block's output, which keeps them all in memory.
        inserted: the tokens of the stream that adapters put there.

    Returns:
        The stream after the last block, and what the blocks hand out, one entry a segment.
    """
    # Outside the module tree: its parameters are slices of the tower's.
    block = Block(config, compute, parent=None)
    outputs = []
    for segment in segments:
        whole = segment.start == 0 and segment.stop == config.depth
        # Slicing copies, so that the usual single segment must do without it.
        layers = params if whole else jax.tree.map(lambda a, s=segment: a[s.start : s.stop], params)

        def step(stream: jax.Array, layer: tuple[Any, Any], fill=segment.fill) -> tuple[jax.Array, BlockOutputs]:
            weights, occupants = layer
            slot = fill(occupants)
            stream = block.apply({"params": weights}, keep_batch_cut(stream), bias, slot, inserted)
            return stream, BlockOutputs(stream if hidden else None, dict(slot.readings))

        if compute.remat != "none":
            step = jax.checkpoint(step, policy=REMAT_POLICIES[compute.remat], prevent_cse=False)
        stream, every = jax.lax.scan(step, stream, (layers, segment.tree), unroll=compute.unroll)
        outputs.append(every)
    return stream, outputs
