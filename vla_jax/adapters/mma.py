"""MMA (Yang et al. 2024): bottlenecks beside the MLP that meet in a map both towers share.

``y + s W_u^m relu(W_sh relu(W_d^m x))`` in tower m, each map with a bias, x the MLP's normalised input, ``W_sh`` one
parameter of both towers, layer by layer. The adapter has no LayerNorm of its own: it reads through the backbone's, and
with one the published count would not come out. The authors' code reads the block's input through its first LayerNorm
instead, with the sum at the same place, and takes the factor s out of the gradients, for which an optimiser that
normalises them, such as AdamW, largely makes up.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from vla_jax.adapters.base import Linear, Method, Share
from vla_jax.adapters.placement import Placement
from vla_jax.errors import UserError
from vla_jax.slots import Site

# kaiming_normal_(mode="fan_out", nonlinearity="relu")
kaiming_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


@dataclasses.dataclass(frozen=True)
class MMA(Method):
    """A bottleneck through a common space.

    Attributes:
        rank: width of the common space.
        scale: factor on what is added.
    """

    kind: ClassVar[str] = "mma"
    slots: ClassVar[tuple[str, ...]] = ("mlp_out",)

    rank: int = 32
    scale: float = 0.001

    def __post_init__(self):
        if self.rank < 1:
            raise UserError(f"rank must be at least 1, got {self.rank}")
        if self.scale == 0:
            raise UserError("scale 0 switches the adapter off for good; leave the adapter out instead")

    @property
    def sharing(self) -> tuple[Share, ...]:
        """The map in the common space is the towers' in common."""
        return (Share("shared/.*", ("towers",)),)

    def module(self, site: Site) -> nn.Module:
        """The module for one example and one layer."""
        del site
        return MMAModule(self, parent=None)

    def parameter_counts(self, site: Site) -> dict[str, int]:
        """``w r + r`` down, ``r^2 + r`` in the common space, ``r w + w`` up."""
        (width, out), rank = site.widths, self.rank
        counts = {"down/kernel": width * rank, "down/bias": rank, "shared/kernel": rank**2, "shared/bias": rank}
        return counts | {"up/kernel": rank * out, "up/bias": out}

    @property
    def starts_as_identity(self) -> bool:
        """All kernels are drawn; only the factor keeps a new adapter small."""
        return False


class MMAModule(nn.Module):
    """One layer's bottleneck in one tower."""

    method: MMA

    @nn.compact
    def __call__(self, x: Float[Array, "tokens in"], y: Float[Array, "tokens out"]) -> Float[Array, "tokens out"]:
        """Adds to y, the MLP's output, what the bottleneck makes of x, the MLP's input."""
        rank = self.method.rank
        hidden = jax.nn.relu(Linear(rank, kaiming_fan_out, name="down")(x))
        hidden = jax.nn.relu(Linear(rank, kaiming_fan_out, name="shared")(hidden))
        return y + self.method.scale * Linear(y.shape[-1], kaiming_fan_out, name="up")(hidden)


def mma() -> Placement:
    """In the last eight layers, 5 to 12 of a ViT-B, as the authors train it; 674,560 parameters on B/16."""
    return Placement(MMA(), "mma", layers="last 8")
