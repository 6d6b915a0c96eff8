"""AdapterFusion (Pfeiffer et al. 2021, section 3.2): attention decides, for each token, whose change to make.

With ``z_n = c_n(x, y) - y`` what the n-th child changes, for each token::

    q = W_Q y + b_q        k_n = W_K z_n + b_k        v_n = W_V z_n
    y' = y + sum_n softmax_n(q . k_n) v_n

There is no 1/sqrt(width). W_V starts as the identity with 1e-6 off its diagonal, so that n copies of one adapter are
that adapter at first: ``W_V z - z = 1e-6 (sum(z) - z)``, which is at most 1e-6 (width - 1) of z. The bias b_k has no
effect, since it adds the same to all scores of a token; it is kept for the published count of parameters.

Training has two stages. First every child learns a task of its own; :func:`vla_jax.adapters.composing.fuse` puts them
into one fusion. Then queries, keys and values learn on the task that is to profit, children and backbone frozen: the
rules ``adapter_fusion`` of :mod:`vla_jax.training.presets`.
"""

from __future__ import annotations

import dataclasses
import re
from types import MappingProxyType
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vla_jax.adapters.base import Linear
from vla_jax.adapters.composite import REPLACED, Composite, bound
from vla_jax.errors import UserError
from vla_jax.names import Tree, flatten
from vla_jax.slots import Site

OWN = "fuse"
"""What a fusion's own parameters lie below, beside the children's."""

_TOKENS = "methods put tokens of their own there instead of adding to those that there are"


@dataclasses.dataclass(frozen=True)
class Fuse(Composite):
    """Children whose changes are weighed by attention.

    With ``plan.bind(params, inspect=True)`` a backbone hands out the weights as ``<adapter>/<tower>/<slot>/attention``:
    float32 ``[layers, batch, tokens, children]``, with several heads ``[layers, batch, heads, tokens, children]``.
    Those of an example that is routed to -1 mean nothing, since nothing of what they weigh is used.

    Attributes:
        heads: 1 as published; with more, each part of the width has attention of its own.
    """

    kind: ClassVar[str] = "fuse"
    refused = MappingProxyType(
        {
            "tokens": _TOKENS,
            "prompts": REPLACED,
            "attn_kv": _TOKENS,
        }
    )
    refused_joint = "a query belongs to one stream, and it changes two"
    reserved = (OWN,)

    heads: int = 1

    def __post_init__(self):
        super().__post_init__()
        if self.heads < 1:
            raise UserError(f"heads must be at least 1, got {self.heads}")

    def module(self, site: Site) -> nn.Module:
        """The module for one example and one layer."""
        return FuseModule(self, site, parent=None)

    def parameter_counts(self, site: Site) -> dict[str, int]:
        """Those of the children, and ``3 w^2 + 2 w``."""
        width = site.widths[1]
        if width % self.heads:
            raise UserError(
                f"the width {width} at {site.tower}/{site.slot} does not divide into {self.heads} heads; change heads"
            )
        own = {f"{OWN}/{part}/kernel": width**2 for part in ("query", "key", "value")}
        own |= {f"{OWN}/{part}/bias": width for part in ("query", "key")}
        return super().parameter_counts(site) | own


class FuseModule(nn.Module):
    """One layer's children and the attention over what they change."""

    method: Fuse
    site: Site

    @nn.compact
    def __call__(self, *arrays: Any) -> jax.Array:
        """Adds to y what the attention makes of the children's changes."""
        y, calls = bound(self, self.method, self.site, arrays)
        changes = jnp.stack([call(y) - y for call in calls], axis=-2)  # [tokens, children, width]
        mixed, attention = Attention(self.method.heads, name=OWN)(y, changes)
        self.sow("intermediates", "attention", attention)
        return y + mixed


class Attention(nn.Module):
    """Attention of each token over what children change in it."""

    heads: int

    @nn.compact
    def __call__(
        self, y: Float[Array, "tokens width"], changes: Float[Array, "tokens children width"]
    ) -> tuple[Float[Array, "tokens width"], Float[Array, "*heads tokens children"]]:
        """The mixture of the changes, and the weights in it; those have an axis of heads if there are several."""
        width, normal = y.shape[-1], nn.initializers.normal(0.02)
        to_heads = lambda a: a.reshape(*a.shape[:-1], self.heads, width // self.heads)  # noqa: E731
        query = to_heads(Linear(width, normal, name="query")(y))  # [tokens, heads, head width]
        key = to_heads(Linear(width, normal, name="key")(changes))  # [tokens, children, heads, head width]
        value = to_heads(Linear(width, near_identity, use_bias=False, name="value")(changes))
        scores = jnp.einsum("thw,tnhw->htn", query, key, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores, axis=-1)
        mixed = jnp.einsum("htn,tnhw->thw", weights.astype(value.dtype), value).reshape(y.shape)
        return mixed, weights[0] if self.heads == 1 else weights


def near_identity(key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> Float[Array, "width width"]:
    """The identity with 1e-6 off its diagonal."""
    del key
    return jnp.where(jnp.eye(*shape, dtype=bool), 1.0, 1e-6).astype(dtype)


def value_penalty(params: Tree, weight: float = 0.01) -> Float[Array, ""]:
    """What keeps the values of every AdapterFusion near the identity: ``weight ||I - W_V||_F^2``, added up.

    Args:
        params: any tree with adapters in it.
        weight: 0.01 as published.

    Returns:
        float32 []; zero where there is no AdapterFusion.
    """
    pattern = rf"(.*/)?{OWN}/value/kernel"
    kernels = [leaf for name, leaf in flatten(params).items() if re.fullmatch(pattern, name)]
    penalties = [jnp.sum((jnp.eye(kernel.shape[-1]) - kernel) ** 2) for kernel in kernels]
    return weight * sum(penalties, jnp.zeros(()))
