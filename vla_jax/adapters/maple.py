"""MaPLe (Khattak et al. 2023): deep prompts of both towers, the image's made from the text's.

At the input of each of the first blocks, P the learned tokens of the text there (sections 3.2.1 to 3.2.3)::

    text    P
    image   P W + b

P is one parameter for both towers, shared as any parameter may be; W and b are the image tower's own, layer by layer.
In the blocks behind the last of these, the tokens go on as what the blocks make of them.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vla_jax.adapters.base import Linear, Method, Share
from vla_jax.adapters.learned_tokens import check_tokens
from vla_jax.adapters.placement import Placement
from vla_jax.slots import Site


@dataclasses.dataclass(frozen=True)
class MaPLe(Method):
    """Tokens of both towers, coupled.

    Attributes:
        length: how many tokens.
        std: standard deviation that the text's are drawn with.
    """

    kind: ClassVar[str] = "maple"
    slots: ClassVar[tuple[str, ...]] = ("tokens", "prompts")

    length: int = 2
    std: float = 0.02

    def __post_init__(self):
        check_tokens(self.length, self.std)

    def module(self, site: Site) -> nn.Module:
        """The module for one example and one layer."""
        return MaPLeModule(
            self, dict(site.streams)["text"], coupled=site.tower == "vision", deep=site.slot == "prompts", parent=None
        )

    def parameter_counts(self, site: Site) -> dict[str, int]:
        """``length w_t`` with the text stream's width, and ``w_t w_v + w_v`` for the image tower."""
        text, width = dict(site.streams)["text"], site.widths[1]
        counts = {"prompt": self.length * text}
        if site.tower == "vision":
            counts |= {"coupling/kernel": text * width, "coupling/bias": width}
        return counts

    @property
    def sharing(self) -> tuple[Share, ...]:
        """Both towers' tokens come from the same."""
        return (Share("prompt", ("towers",)),)

    @property
    def starts_as_identity(self) -> bool:
        """New tokens are seen from the start."""
        return False


class MaPLeModule(nn.Module):
    """The tokens of one layer of one tower."""

    method: MaPLe
    text_width: int
    coupled: bool
    deep: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "tokens width"], y: Float[Array, "inserted width"]
    ) -> Float[Array, "inserted_or_length width"]:
        """Tokens behind those that are inserted already, or in their place where they are deep."""
        shape = (self.method.length, self.text_width)
        prompt = self.param("prompt", nn.initializers.normal(self.method.std), shape, jnp.float32)
        if self.coupled:
            prompt = Linear(y.shape[-1], name="coupling")(prompt)
        prompt = jnp.asarray(prompt, y.dtype)
        return prompt if self.deep else jnp.concatenate([y, prompt])


def maple(length: int = 2, depth: int = 9) -> Placement:
    """MaPLe as published: two tokens in the first nine blocks, those of the input to be started from "a photo".

    3,555,072 parameters on B/16. The authors train for 5 epochs on 16 shots with SGD, batches of 4 and a learning rate
    of .0035 that follows a cosine.
    """
    return Placement(MaPLe(length), "maple", slots=("tokens", "prompts"), layers=f"first {depth}")
