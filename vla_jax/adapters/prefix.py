"""Prefix tuning (Li and Liang 2021): learned keys and values in front of every block's own.

Every token of an example sees them, in a causal tower too, and they take no positions. With P_k and P_v learned, as He
et al. 2022 (section 2.2) write it::

    Attention(Q, [P_k ; K], [P_v ; V])

While they are trained, a network may make them of embeddings. Its first layer and the embeddings serve all blocks, as
in the authors' code, where one matrix makes the keys and values of all of them;
:func:`~vla_jax.adapters.learned_tokens.fold` leaves it out afterwards.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vla_jax.adapters.base import Share
from vla_jax.adapters.learned_tokens import LearnedModule, LearnedTokens
from vla_jax.adapters.placement import Placement
from vla_jax.slots import Site


@dataclasses.dataclass(frozen=True)
class Prefix(LearnedTokens):
    """Learned keys and values in a block's attention.

    Attributes:
        length: how many of each.
        std: standard deviation that those learned directly are drawn with.
        hidden: width of the network that makes them; None learns them directly.
    """

    kind: ClassVar[str] = "prefix"
    slots: ClassVar[tuple[str, ...]] = ("attn_kv",)
    vectors: ClassVar[tuple[str, ...]] = ("key", "value")

    length: int = 10

    def module(self, site: Site) -> nn.Module:
        """The module for one example and one layer."""
        del site
        return PrefixModule(self, parent=None)

    @property
    def sharing(self) -> tuple[Share, ...]:
        """The network's embeddings and first layer serve all blocks."""
        return () if self.hidden is None else (Share("embedding|down/.*", ("layers",)),)


class PrefixModule(LearnedModule):
    """The keys and values of one layer."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "tokens width"],
        y: tuple[Float[Array, "keys width"], Float[Array, "keys width"]],
    ) -> tuple[Float[Array, "more_keys width"], Float[Array, "more_keys width"]]:
        """Learned keys and values in front of those of a block, y."""
        key, value = self.vectors(x)
        return jnp.concatenate([key.astype(y[0].dtype), y[0]]), jnp.concatenate([value.astype(y[1].dtype), y[1]])


def prefix_tuning(length: int = 10, hidden: int | None = 512) -> Placement:
    """Prefix tuning as published for table-to-text: ten keys and values a block, made by a network 512 wide."""
    return Placement(Prefix(length, hidden=hidden), "prefix_tuning")
