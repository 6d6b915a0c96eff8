"""Cross-Modal Adapter (Jiang et al. 2022): bottlenecks of which both towers make some channels with the same weights.

``y + [W_u^m ; W_u^shared] f(W_d^m y)`` in tower m, each map with a bias: the last channels of the up-projection are one
parameter of both towers, layer by layer. Nothing passes between the streams; the gradients of both meet in it.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vla_jax.adapters.base import ACTIVATIONS, Activation, Linear, Method, Share, check_activation
from vla_jax.adapters.placement import Placement
from vla_jax.errors import UserError
from vla_jax.slots import Site


@dataclasses.dataclass(frozen=True)
class CrossModal(Method):
    """A bottleneck with channels that the towers share.

    Attributes:
        rank: the bottleneck's width.
        shared: channels whose up-projection the towers share; the towers need equally many layers with adapters, but
            not one width.
        activation: between the two maps.
    """

    kind: ClassVar[str] = "cross_modal"
    slots: ClassVar[tuple[str, ...]] = ("attn_sublayer", "mlp_out")

    rank: int = 8
    shared: int = 16
    activation: Activation = "quick_gelu"

    def __post_init__(self):
        check_activation(self.activation)
        for name in ("rank", "shared"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def sharing(self) -> tuple[Share, ...]:
        """The shared channels are the towers' in common."""
        return (Share("shared/.*", ("towers",)),)

    def module(self, site: Site) -> nn.Module:
        """The module for one example and one layer."""
        del site
        return CrossModalModule(self, parent=None)

    def parameter_counts(self, site: Site) -> dict[str, int]:
        """``w r + r`` down, ``(r + 1) (w - c)`` up for the tower alone and ``(r + 1) c`` for the c shared channels."""
        width = site.widths[1]
        own = width - self.shared
        if own < 1:
            raise UserError(
                f"{self.shared} shared channels leave none of the {width} at {site.tower}/{site.slot} to the tower; "
                f"give at most {width - 1}, or tie whole bottlenecks with tied=True"
            )
        counts = {"down/kernel": width * self.rank, "down/bias": self.rank}
        counts |= {"up/kernel": self.rank * own, "up/bias": own}
        return counts | {"shared/kernel": self.rank * self.shared, "shared/bias": self.shared}

    @property
    def starts_as_identity(self) -> bool:
        """Both kernels are drawn from N(0, 0.01)."""
        return False


class CrossModalModule(nn.Module):
    """One layer's bottleneck in one tower."""

    method: CrossModal

    @nn.compact
    def __call__(self, x: Float[Array, "tokens in"], y: Float[Array, "tokens out"]) -> Float[Array, "tokens out"]:
        """Adds to y, the sublayer's output, what the bottleneck makes of it."""
        del x
        method, normal = self.method, nn.initializers.normal(0.01)
        hidden = ACTIVATIONS[method.activation](Linear(method.rank, normal, name="down")(y))
        own = Linear(y.shape[-1] - method.shared, normal, name="up")(hidden)
        return y + jnp.concatenate([own, Linear(method.shared, normal, name="shared")(hidden)], axis=-1)


def cross_modal_adapter() -> Placement:
    """After both sublayers of all layers, as the authors train it; 519,168 parameters on B/16 and B/32."""
    return Placement(CrossModal(), "cross_modal_adapter", slots=("attn_sublayer", "mlp_out"))
