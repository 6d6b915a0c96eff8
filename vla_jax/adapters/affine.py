"""Scaling and shifting by channel: (IA)^3, a BitFit that can be routed, SSF.

``y' = scale * y + shift``, each a vector as wide as y. (IA)^3 (Liu et al. 2022, section 3.3) scales keys, values and
the MLP's hidden units. A shift at a linear slot is a change of the map's bias (BitFit; Ben Zaken, Goldberg and Ravfogel
2022) that lies beside the backbone, so that every task may have its own. Both together are SSF (Lian et al. 2022,
equation 2).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vla_jax.adapters.base import Method
from vla_jax.adapters.placement import Placement
from vla_jax.errors import UserError
from vla_jax.slots import Site


@dataclasses.dataclass(frozen=True)
class Affine(Method):
    """A factor and an offset for each channel of a slot's output.

    Attributes:
        scale: whether there is a factor; it starts at one.
        shift: whether there is an offset; it starts at zero.
    """

    kind: ClassVar[str] = "affine"
    slots: ClassVar[tuple[str, ...]] = (
        "embed",
        "attn_in",
        "attn_q",
        "attn_k",
        "attn_v",
        "attn_out",
        "attn_sublayer",
        "mlp_in",
        "mlp_fc1",
        "mlp_hidden",
        "mlp_fc2",
        "mlp_out",
        "block_out",
        "projection",
    )

    scale: bool = True
    shift: bool = False

    def __post_init__(self):
        if not (self.scale or self.shift):
            raise UserError("affine with neither scale nor shift does nothing; set one of them")

    def module(self, site: Site) -> nn.Module:
        """The module for one example and one layer."""
        del site
        return AffineModule(self, parent=None)

    def parameter_counts(self, site: Site) -> dict[str, int]:
        """As many as y is wide, for each of the two vectors."""
        return {name: site.widths[1] for name in ("scale", "shift") if getattr(self, name)}

    @property
    def starts_as_identity(self) -> bool:
        """Times one, plus zero."""
        return True


class AffineModule(nn.Module):
    """One layer's vectors."""

    method: Affine

    @nn.compact
    def __call__(self, x: Float[Array, "tokens in"], y: Float[Array, "tokens out"]) -> Float[Array, "tokens out"]:
        """Scales and shifts y; x is not looked at."""
        del x
        # In float32, since bfloat16 has no number between 1 and 1.0078.
        result, width = y.astype(jnp.float32), y.shape[-1:]
        if self.method.scale:
            result = result * self.param("scale", nn.initializers.ones, width, jnp.float32)
        if self.method.shift:
            result = result + self.param("shift", nn.initializers.zeros, width, jnp.float32)
        return result.astype(y.dtype)


def ia3() -> Placement:
    """(IA)^3 (Liu et al. 2022): keys, values and hidden units of every block; 92,160 parameters on B/16."""
    return Placement(Affine(), "ia3", slots=("attn_k", "attn_v", "mlp_hidden"))
