"""CLIP-Adapter (Gao et al. 2021): a bottleneck on the feature in which the towers meet.

With f the feature, not normalised, and the second relu that the authors' code has and their paper's equation lacks::

    f' = ratio relu(relu(f W_1) W_2) + (1 - ratio) f

Nothing in the towers changes, so that features can be computed once and kept.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from vla_jax.adapters.base import Linear, Method
from vla_jax.adapters.placement import Placement
from vla_jax.errors import UserError
from vla_jax.slots import Site


@dataclasses.dataclass(frozen=True)
class CLIPAdapter(Method):
    """A bottleneck on a tower's feature.

    Attributes:
        reduction: the feature's width over the bottleneck's.
        ratio: how much of the new feature is the bottleneck's.
    """

    kind: ClassVar[str] = "clip_adapter"
    slots: ClassVar[tuple[str, ...]] = ("projection",)

    reduction: int = 4
    ratio: float = 0.2

    def __post_init__(self):
        if self.reduction < 1:
            raise UserError(f"reduction must be at least 1, got {self.reduction}")
        if not 0 < self.ratio <= 1:
            raise UserError(f"ratio must be above 0 and at most 1, got {self.ratio}")

    def module(self, site: Site) -> nn.Module:
        """The module for one example."""
        del site
        return CLIPAdapterModule(self, parent=None)

    def parameter_counts(self, site: Site) -> dict[str, int]:
        """Twice ``F F / reduction``."""
        width = site.widths[1]
        if self.reduction > width:
            raise UserError(f"reduction {self.reduction} leaves nothing of features {width} wide; give at most that")
        hidden = width // self.reduction
        return {"down/kernel": width * hidden, "up/kernel": hidden * width}

    @property
    def starts_as_identity(self) -> bool:
        """The bottleneck is part of the feature from the start."""
        return False


class CLIPAdapterModule(nn.Module):
    """One tower's bottleneck."""

    method: CLIPAdapter

    @nn.compact
    def __call__(
        self, x: Float[Array, "tokens width"], y: Float[Array, "tokens features"]
    ) -> Float[Array, "tokens features"]:
        """Mixes the feature y, a stream of one token, with what the bottleneck makes of it."""
        method, width = self.method, y.shape[-1]
        hidden = jax.nn.relu(Linear(width // method.reduction, use_bias=False, name="down")(y))
        adapted = jax.nn.relu(Linear(width, use_bias=False, name="up")(hidden))
        return method.ratio * adapted + (1 - method.ratio) * y


def clip_adapter() -> Placement:
    """CLIP-Adapter as published: on the image's feature, a quarter of its width, a fifth of the new one."""
    return Placement(CLIPAdapter(), "clip_adapter", towers=("vision",))
