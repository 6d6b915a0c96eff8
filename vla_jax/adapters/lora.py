"""LoRA (Hu et al. 2022, equation 3): a low-rank update of a linear map, ``y + s (x A) B``.

The scale s is alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (Kalajdzievski 2023).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vla_jax.adapters.base import Method, uniform_fan_in
from vla_jax.errors import UserError
from vla_jax.slots import LINEAR_SLOTS


@dataclasses.dataclass(frozen=True)
class LoRA(Method):
    """A low-rank update of the linear map at a slot.

    Attributes:
        rank: r.
        alpha: numerator of the scale.
        dropout: share of the map's input that the update does not see, in training.
        rank_stabilised: divides by sqrt(r) instead of r.
    """

    kind: ClassVar[str] = "lora"
    slots: ClassVar[tuple[str, ...]] = LINEAR_SLOTS

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rank_stabilised: bool = False

    def __post_init__(self):
        if self.rank < 1:
            raise UserError(f"rank must be at least 1, got {self.rank}")
        if self.alpha <= 0:
            raise UserError(f"alpha must be positive, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be at least 0 and below 1, got {self.dropout}")

    @property
    def scale(self) -> float:
        """What the update is multiplied with."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)

    def module(self) -> nn.Module:
        """The module for one example and one layer."""
        return LoRAModule(self, parent=None)

    def parameter_count(self, in_width: int, out_width: int) -> int:
        """``r (in + out)``."""
        return self.rank * (in_width + out_width)

    @property
    def starts_as_identity(self) -> bool:
        """B starts at zero."""
        return True

    @property
    def uses_dropout(self) -> bool:
        """Whether training needs a dropout key."""
        return self.dropout > 0


class LoRAModule(nn.Module):
    """One layer's update."""

    method: LoRA

    @nn.compact
    def __call__(self, x: Float[Array, "tokens in"], y: Float[Array, "tokens out"]) -> Float[Array, "tokens out"]:
        """Adds the update of what the map made of x to y, which is what it made."""
        method = self.method
        a = self.param("a", uniform_fan_in, (x.shape[-1], method.rank), jnp.float32)
        b = self.param("b", nn.initializers.zeros, (method.rank, y.shape[-1]), jnp.float32)
        if method.uses_dropout:
            x = nn.Dropout(method.dropout, deterministic=not self.has_rng("dropout"))(x)
        return y + (method.scale * (x @ a.astype(x.dtype))) @ b.astype(x.dtype)
