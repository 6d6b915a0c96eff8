"""CoCoOp (Zhou et al. 2022b): a text prompt that follows the image.

With f the image's feature, of length one as the authors' code has it, v_m the m-th context token, and a network from
the features' width F through F / 16 to the text stream's width (section 3.2)::

    v_m(f) = v_m + relu(f W_d + b_d) W_u + b_u

A text is thus read anew for every image. It works on pairs, image i beside text i: to classify one image among C
classes, the image stands C times in the batch, beside each class's text.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vla_jax.adapters.base import Linear, Method
from vla_jax.adapters.learned_tokens import check_tokens
from vla_jax.adapters.placement import Placement
from vla_jax.errors import UserError
from vla_jax.slots import Site


@dataclasses.dataclass(frozen=True)
class CoCoOp(Method):
    """Context tokens in front of a text, moved by what its image looks like.

    Attributes:
        length: how many tokens.
        std: standard deviation that they are drawn with.
        reduction: the features' width over the network's.
    """

    kind: ClassVar[str] = "cocoop"
    slots: ClassVar[tuple[str, ...]] = ("tokens",)
    conditioned: ClassVar[bool] = True

    length: int = 4
    std: float = 0.02
    reduction: int = 16

    def __post_init__(self):
        check_tokens(self.length, self.std)
        if self.reduction < 1:
            raise UserError(f"reduction must be at least 1, got {self.reduction}")

    def module(self, site: Site) -> nn.Module:
        """The module for one example."""
        del site
        return CoCoOpModule(self, parent=None)

    def parameter_counts(self, site: Site) -> dict[str, int]:
        """``length width + F h + h + h width + width`` with ``h = F / reduction``."""
        width, hidden = site.widths[1], site.features // self.reduction
        if not hidden:
            raise UserError(
                f"reduction {self.reduction} leaves nothing of features {site.features} wide; give at most that"
            )
        return {
            "prompt": self.length * width,
            "down/kernel": site.features * hidden,
            "down/bias": hidden,
            "up/kernel": hidden * width,
            "up/bias": width,
        }

    @property
    def starts_as_identity(self) -> bool:
        """New tokens are seen from the start."""
        return False


class CoCoOpModule(nn.Module):
    """The tokens of one text, given its image."""

    method: CoCoOp

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "tokens width"],
        y: Float[Array, "inserted width"],
        image: Float[Array, "features"],
    ) -> Float[Array, "more_inserted width"]:
        """The context, all of it moved alike by the image's feature, behind the tokens inserted so far."""
        method, width = self.method, y.shape[-1]
        prompt = self.param("prompt", nn.initializers.normal(method.std), (method.length, width), jnp.float32)
        image = image.astype(jnp.float32)
        # A feature of nothing but zeros stays one.
        image = image * jax.lax.rsqrt(jnp.maximum(jnp.sum(image**2), jnp.finfo(jnp.float32).tiny))
        hidden = jax.nn.relu(Linear(image.shape[-1] // method.reduction, name="down")(image))
        return jnp.concatenate([y, (prompt + Linear(width, name="up")(hidden)).astype(y.dtype)])


def cocoop(context: int = 4) -> Placement:
    """CoCoOp as published: four context tokens, to be started from "a photo of a".

    35,360 parameters on B/16.
    """
    return Placement(CoCoOp(context), "cocoop", towers=("text",))
