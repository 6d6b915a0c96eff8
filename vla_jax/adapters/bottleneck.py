"""Bottleneck adapters: down, activation, up, added to a sublayer's output.

Sequential, ``y + s W_u f(W_d y)``: Houlsby et al. 2019 and Pfeiffer et al. 2021. Parallel, ``y + s W_u f(W_d x)``: He
et al. 2022. Both kernels drawn from N(0, 0.02): VL-Adapter (Sung et al. 2022). A learned factor per channel and
stochastic depth: Adapter+ (Steitz and Roth 2024). The published settings are the functions at the end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vla_jax.adapters.base import ACTIVATIONS, Activation, Linear, Method, Sized, check_activation, uniform_fan_in
from vla_jax.adapters.placement import Placement
from vla_jax.errors import UserError, unknown
from vla_jax.slots import Site

Init = Literal["zero_up", "normal", "truncated"]


def _cut_at_two_deviations(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """N(0, 0.01) without its tails, whose deviation is then a little smaller."""
    return 0.01 * jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype)


KERNELS: Mapping[str, tuple[Callable[..., jax.Array], Callable[..., jax.Array]]] = {
    "zero_up": (uniform_fan_in, nn.initializers.zeros),
    "normal": (nn.initializers.normal(0.02),) * 2,
    "truncated": (_cut_at_two_deviations,) * 2,
}
"""By init, what the down and the up kernel start from."""


@dataclasses.dataclass(frozen=True)
class Bottleneck(Sized, Method):
    """A bottleneck in one slot.

    Attributes:
        rank: the bottleneck's width.
        reduction: the slot's width over the bottleneck's, where ``rank`` is None.
        activation: between the two maps.
        parallel: reads the sublayer's input instead of its output.
        scale: factor on what is added.
        init: ``zero_up`` starts as the identity; ``normal`` draws both kernels from N(0, 0.02), as VL-Adapter does;
            ``truncated`` from N(0, 0.01) cut at two deviations, as Houlsby et al. and Adapter+ do.
        layer_norm: normalises what the bottleneck reads.
        channel_scale: learns the factor, one for each channel, starting at ``scale``.
        drop_path: share of the examples that do without the whole adapter in training; what the others get is divided
            by the share that has it, so that the mean stays.
    """

    kind: ClassVar[str] = "bottleneck"
    slots: ClassVar[tuple[str, ...]] = (
        "embed",
        "attn_in",
        "attn_out",
        "attn_sublayer",
        "mlp_in",
        "mlp_out",
        "block_out",
    )

    activation: Activation = "relu"
    parallel: bool = False
    scale: float = 1.0
    init: Init = "zero_up"
    layer_norm: bool = False
    channel_scale: bool = False
    drop_path: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_activation(self.activation)
        if self.init not in KERNELS:
            raise unknown("bottleneck init", self.init, KERNELS)
        if self.scale == 0:
            raise UserError("scale 0 switches the adapter off for good; leave the adapter out instead")
        if not 0 <= self.drop_path < 1:
            raise UserError(f"drop_path must be at least 0 and below 1, got {self.drop_path}")

    def module(self, site: Site) -> nn.Module:
        """The module for one example and one layer."""
        del site
        return BottleneckModule(self, parent=None)

    def parameter_counts(self, site: Site) -> dict[str, int]:
        """``read r + r + r out + out``, twice the read width for a LayerNorm and once ``out`` for learned factors."""
        in_width, out_width = site.widths
        read, rank = in_width if self.parallel else out_width, self.rank_for(out_width)
        counts = {"down/kernel": read * rank, "down/bias": rank, "up/kernel": rank * out_width, "up/bias": out_width}
        counts |= {"norm/scale": read, "norm/bias": read} if self.layer_norm else {}
        return counts | ({"scale": out_width} if self.channel_scale else {})

    @property
    def starts_as_identity(self) -> bool:
        """A zero up-projection adds an exact zero."""
        return self.init == "zero_up"

    @property
    def uses_dropout(self) -> bool:
        """Whether training needs a dropout key."""
        return self.drop_path > 0


class BottleneckModule(nn.Module):
    """One layer's bottleneck."""

    method: Bottleneck

    @nn.compact
    def __call__(self, x: Float[Array, "tokens in"], y: Float[Array, "tokens out"]) -> Float[Array, "tokens out"]:
        """Adds to y, the sublayer's output, what the bottleneck makes of y, or of the input x where it is parallel."""
        method, width = self.method, y.shape[-1]
        down, up = KERNELS[method.init]
        read = x if method.parallel else y
        if method.layer_norm:
            read = nn.LayerNorm(epsilon=1e-5, dtype=read.dtype, name="norm")(read)
        hidden = ACTIVATIONS[method.activation](Linear(method.rank_for(width), down, name="down")(read))
        added = Linear(width, up, name="up")(hidden)
        if method.uses_dropout:
            # One draw for all tokens and channels of the example.
            drop = nn.Dropout(method.drop_path, broadcast_dims=(0, 1), deterministic=not self.has_rng("dropout"))
            added = drop(added)
        if method.channel_scale:
            scale = self.param("scale", nn.initializers.constant(method.scale), (width,), jnp.float32)
            return y + scale.astype(added.dtype) * added
        return y + method.scale * added


def houlsby() -> Placement:
    """After both sublayers, a sixteenth of the width, swish (Houlsby et al. 2019)."""
    method = Bottleneck(reduction=16, activation="swish", init="truncated")
    return Placement(method, "houlsby", slots=("attn_sublayer", "mlp_out"))


def pfeiffer() -> Placement:
    """Once a block, on the MLP's output, a sixteenth of the width, relu (Pfeiffer et al. 2021)."""
    return Placement(Bottleneck(reduction=16), "pfeiffer", slots=("mlp_out",))


def parallel() -> Placement:
    """Beside the MLP, half the width, factor 4, starting as the identity (He et al. 2022)."""
    return Placement(Bottleneck(reduction=2, parallel=True, scale=4.0), "parallel", slots=("mlp_out",))


def adapter_plus() -> Placement:
    """After each block's last residual sum, eight units in a ViT-B (Steitz and Roth 2024).

    The authors also give the backbone itself stochastic depth in training; a frozen backbone here runs whole.
    """
    method = Bottleneck(reduction=96, activation="gelu", init="truncated", channel_scale=True, drop_path=0.1)
    return Placement(method, "adapter_plus", slots=("block_out",))


def vl_adapter() -> Placement:
    """After both sublayers, an eighth of the width (Sung et al. 2022); the authors train all LayerNorms beside it."""
    method = Bottleneck(reduction=8, activation="gelu_tanh", init="normal")
    return Placement(method, "vl_adapter", slots=("attn_sublayer", "mlp_out"))
