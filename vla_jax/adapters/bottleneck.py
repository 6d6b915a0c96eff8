"""Bottleneck adapters: down, activation, up, added to a sublayer's output.

Sequential, ``y + s W_u f(W_d y)``: Houlsby et al. 2019 and Pfeiffer et al. 2021. Parallel, ``y + s W_u f(W_d x)``: He
et al. 2022. Both kernels drawn from N(0, 0.02): VL-Adapter (Sung et al. 2022).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import flax.linen as nn
from jaxtyping import Array, Float

from vla_jax.adapters.base import ACTIVATIONS, Activation, Linear, Method, Sized, check_activation, uniform_fan_in
from vla_jax.errors import UserError, unknown

Init = Literal["zero_up", "normal"]


@dataclasses.dataclass(frozen=True)
class Bottleneck(Sized, Method):
    """A bottleneck in one slot.

    Attributes:
        rank: the bottleneck's width.
        reduction: the slot's width over the bottleneck's, where ``rank`` is None.
        activation: between the two maps.
        parallel: reads the sublayer's input instead of its output.
        scale: factor on what is added.
        init: ``zero_up`` starts as the identity; ``normal`` draws both kernels from N(0, 0.02), as VL-Adapter does.
        layer_norm: normalises what the bottleneck reads.
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

    def __post_init__(self):
        super().__post_init__()
        check_activation(self.activation)
        if self.init not in ("zero_up", "normal"):
            raise unknown("bottleneck init", self.init, ("zero_up", "normal"))
        if self.scale == 0:
            raise UserError("scale 0 switches the adapter off for good; leave the adapter out instead")

    def module(self) -> nn.Module:
        """The module for one example and one layer."""
        return BottleneckModule(self, parent=None)

    def parameter_count(self, in_width: int, out_width: int) -> int:
        """``read r + r + r out + out`` and twice the read width for a LayerNorm."""
        read = in_width if self.parallel else out_width
        rank = self.rank_for(out_width)
        return read * rank + rank + rank * out_width + out_width + (2 * read if self.layer_norm else 0)

    @property
    def starts_as_identity(self) -> bool:
        """A zero up-projection adds an exact zero."""
        return self.init == "zero_up"


class BottleneckModule(nn.Module):
    """One layer's bottleneck."""

    method: Bottleneck

    @nn.compact
    def __call__(self, x: Float[Array, "tokens in"], y: Float[Array, "tokens out"]) -> Float[Array, "tokens out"]:
        """Adds to y, the sublayer's output, what the bottleneck makes of y, or of the input x where it is parallel."""
        method, width = self.method, y.shape[-1]
        normal = nn.initializers.normal(0.02)
        zero_up = method.init == "zero_up"
        read = x if method.parallel else y
        if method.layer_norm:
            read = nn.LayerNorm(epsilon=1e-5, dtype=read.dtype, name="norm")(read)
        hidden = Linear(method.rank_for(width), uniform_fan_in if zero_up else normal, name="down")(read)
        hidden = ACTIVATIONS[method.activation](hidden)
        return y + method.scale * Linear(width, nn.initializers.zeros if zero_up else normal, name="up")(hidden)
