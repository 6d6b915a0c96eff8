"""A pre-norm transformer: blocks stored stacked and scanned, with a slot wherever an adapter may sit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vla_jax.errors import UserError, unknown
from vla_jax.mesh import keep_batch_cut
from vla_jax.slots import Segment, Slot, TowerShape, empty_slot

Activation = Literal["quick_gelu", "gelu"]
Remat = Literal["none", "dots", "full"]

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}

REMAT_POLICIES: Mapping[str, Any] = {
    # Keeps the results of weight products and recomputes what lies between them: cheap to redo, most of the memory.
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
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
        remat: what the backward pass recomputes: nothing, all but the weight products (``dots``), or a whole block.
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


class Attention(nn.Module):
    """Multi-head attention in ``[batch, heads, tokens, head width]`` layout."""

    config: TowerConfig
    compute: Compute

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        bias: Float[Array, "#batch 1 tokens tokens"] | None,
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
            return slot(f"attn_{name}", x, nn.Dense(config.width, dtype=self.compute.dtype, name=name)(x))

        def to_heads(a: jax.Array) -> jax.Array:
            return a.reshape(*a.shape[:2], config.heads, head_width).swapaxes(
                1, 2
            )  # [batch, heads, tokens, head width]

        query, key, value = project("q"), project("k"), project("v")
        key, value = slot("attn_kv", x, (key, value))
        prefix = key.shape[1] - x.shape[1]
        if bias is not None and prefix:
            bias = jnp.pad(bias, [(0, 0)] * (bias.ndim - 1) + [(prefix, 0)])  # what an adapter prepends, all may see
        query = to_heads(query) * head_width**-0.5
        scores = query @ to_heads(key).swapaxes(2, 3)  # [batch, heads, tokens, tokens]
        scores = scores.astype(jnp.float32)
        if bias is not None:
            scores = scores + bias
        weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
        mixed = (weights @ to_heads(value)).swapaxes(1, 2).reshape(x.shape)
        return slot("attn_out", mixed, nn.Dense(config.width, dtype=self.compute.dtype, name="out")(mixed))


class Mlp(nn.Module):
    """Two linear maps with an activation between them."""

    config: TowerConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"], slot: Slot) -> Float[Array, "batch tokens width"]:
        """Maps each token for itself."""
        hidden = slot("mlp_fc1", x, nn.Dense(self.config.mlp_width, dtype=self.compute.dtype, name="fc1")(x))
        hidden = ACTIVATIONS[self.config.activation](hidden)
        return slot("mlp_fc2", hidden, nn.Dense(self.config.width, dtype=self.compute.dtype, name="fc2")(hidden))


class Block(nn.Module):
    """One pre-norm block: attention and MLP, each added to the residual stream."""

    config: TowerConfig
    compute: Compute

    @nn.compact
    def __call__(
        self,
        stream: Float[Array, "batch tokens width"],
        bias: Float[Array, "#batch 1 tokens tokens"] | None,
        slot: Slot,
    ) -> Float[Array, "batch tokens width"]:
        """Adds both sublayers to the residual stream; ``bias`` as in :class:`Attention`."""
        x = layer_norm(self.config, self.compute, "norm1")(stream)
        attended = Attention(self.config, self.compute, name="attn")(slot("attn_in", x, x), bias, slot)
        middle = stream + slot("attn_sublayer", x, attended)
        x = layer_norm(self.config, self.compute, "norm2")(middle)
        mapped = Mlp(self.config, self.compute, name="mlp")(slot("mlp_in", x, x), slot)
        return slot("block_out", stream, middle + slot("mlp_out", x, mapped))


def init_blocks(key: jax.Array, config: TowerConfig) -> dict[str, Any]:
    """Parameters of a tower's blocks, stacked ``[depth, ...]``."""
    stream = jnp.zeros((1, 1, config.width))
    init = jax.vmap(lambda k: Block(config, Compute()).init(k, stream, None, empty_slot)["params"])
    return init(jax.random.split(key, config.depth))


def run_blocks(
    config: TowerConfig,
    compute: Compute,
    params: Mapping[str, Any],
    stream: Float[Array, "batch tokens width"],
    bias: Float[Array, "#batch 1 tokens tokens"] | None,
    segments: Sequence[Segment],
    *,
    hidden: bool = False,
) -> tuple[Float[Array, "batch tokens width"], list[Float[Array, "_ batch tokens width"]]]:
    """Runs consecutive blocks, one scan a segment.

    Args:
        config: the tower's shape.
        compute: how to run it.
        params: stacked parameters of all blocks of the tower.
        stream: the residual stream.
        bias: added to attention scores; None lets everything be seen.
        segments: which blocks, and what sits in their slots; they need not cover the whole depth.
        hidden: whether to hand out every block's output, which keeps them all in memory.

    Returns:
        The stream after the last block, and the blocks' outputs, stacked, one array a segment; no arrays unless
        ``hidden``.
    """
    # Outside the module tree: its parameters are slices of the tower's.
    block = Block(config, compute, parent=None)
    outputs = []
    for segment in segments:
        whole = segment.start == 0 and segment.stop == config.depth
        # Slicing copies, so that the usual single segment must do without it.
        layers = params if whole else jax.tree.map(lambda a, s=segment: a[s.start : s.stop], params)

        def step(stream: jax.Array, layer: tuple[Any, Any], fill=segment.fill) -> tuple[jax.Array, jax.Array | None]:
            weights, occupants = layer
            stream = block.apply({"params": weights}, keep_batch_cut(stream), bias, fill(occupants))
            return stream, stream if hidden else None

        if compute.remat != "none":
            step = jax.checkpoint(step, policy=REMAT_POLICIES[compute.remat], prevent_cse=False)
        stream, every = jax.lax.scan(step, stream, (layers, segment.tree), unroll=compute.unroll)
        if hidden:
            outputs.append(every)
    return stream, outputs
