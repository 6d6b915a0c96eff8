"""Bottlenecks whose maps are sums of Kronecker products: PHM and Compacter.

Parametrised hypercomplex multiplication (Zhang et al. 2021): ``W = sum_i A_i (x) B_i`` of a rule, n matrices
``A_i [n, n]``, and n blocks ``B_i [in / n, out / n]``, with an n-th of a full map's numbers. Compacter (Karimi Mahabadi
et al. 2021): ``B_i = s_i t_i`` of a low rank, and one rule for all layers.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vla_jax.adapters.base import ACTIVATIONS, Activation, Method, Share, Sized, check_activation
from vla_jax.adapters.placement import Placement
from vla_jax.errors import UserError, unknown
from vla_jax.slots import Site

Init = Literal["zero_up", "glorot"]

# Uniform, gain sqrt(2), for each of the n slices by itself.
glorot_slices = nn.initializers.variance_scaling(2.0, "fan_avg", "uniform", batch_axis=0)


@dataclasses.dataclass(frozen=True)
class PHM(Sized, Method):
    """A bottleneck, ``y + W_u f(W_d y)``, of two such maps.

    Attributes:
        rank: the bottleneck's width.
        reduction: the slot's width over the bottleneck's, where ``rank`` is None.
        n: how many products are summed; must divide the slot's width and the bottleneck's.
        factorised: the blocks are products of two factors (Compacter) instead of full.
        factor_rank: the rank of those products.
        shared_rule: one rule for both maps, all layers, slots and towers (Compacter: the authors' code hands one
            parameter to every map of the model); otherwise each map has its own. Tasks have rules of their own either
            way, so that training one leaves the others as they are.
        activation: between the two maps.
        init: ``zero_up`` starts as the identity; ``glorot`` draws all blocks or factors, as published. Rules are drawn
            from N(0, 0.01).
    """

    kind: ClassVar[str] = "phm"
    slots: ClassVar[tuple[str, ...]] = ("attn_in", "attn_out", "attn_sublayer", "mlp_in", "mlp_out", "block_out")

    reduction: int | None = 32
    n: int = 4
    factorised: bool = True
    factor_rank: int = 1
    shared_rule: bool = True
    activation: Activation = "gelu_tanh"
    init: Init = "zero_up"

    def __post_init__(self):
        super().__post_init__()
        check_activation(self.activation)
        if self.init not in ("zero_up", "glorot"):
            raise unknown("phm init", self.init, ("zero_up", "glorot"))
        for name in ("n", "factor_rank"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def sharing(self) -> tuple[Share, ...]:
        """A shared rule is one for every place of the placement."""
        return (Share("rule", ("layers", "slots", "towers")),)

    def module(self, site: Site) -> nn.Module:
        """The module for one example and one layer."""
        del site
        return PHMModule(self, parent=None)

    def parameter_counts(self, site: Site) -> dict[str, int]:
        """Of a map ``in out / n`` in blocks or ``k (in + out)`` in factors of rank k, and its bias; of a rule n^3."""
        width = site.widths[1]
        rank, where = self.rank_for(width), f"{site.tower}/{site.slot}"
        for what, size in ((f"the width {width} of {where}", width), (f"the bottleneck's width {rank} there", rank)):
            if size % self.n:
                common = math.gcd(width, rank)
                divisors = ", ".join(str(d) for d in range(1, common + 1) if common % d == 0)
                raise UserError(f"n = {self.n} does not divide {what}; both can be divided by {divisors}")
        if self.factorised and self.factor_rank > min(width, rank) // self.n:
            raise UserError(
                f"factor_rank {self.factor_rank} exceeds the blocks at {where}, {width // self.n} by {rank // self.n}; "
                f"give at most {min(width, rank) // self.n}, or factorised=False"
            )
        counts = {"rule": self.n**3} if self.shared_rule else {}
        for name, size_in, size_out in (("down", width, rank), ("up", rank, width)):
            own = {"left": size_in * self.factor_rank, "right": self.factor_rank * size_out}
            own = own if self.factorised else {"blocks": size_in * size_out // self.n}
            own |= {"bias": size_out} | ({} if self.shared_rule else {"rule": self.n**3})
            counts |= {f"{name}/{leaf}": count for leaf, count in own.items()}
        return counts

    @property
    def starts_as_identity(self) -> bool:
        """Blocks or right factors of zero make an up-projection of zero."""
        return self.init == "zero_up"


class PHMModule(nn.Module):
    """One layer's bottleneck."""

    method: PHM

    @nn.compact
    def __call__(self, x: Float[Array, "tokens in"], y: Float[Array, "tokens out"]) -> Float[Array, "tokens out"]:
        """Adds to y, the sublayer's output, what the bottleneck makes of it."""
        del x
        method, width = self.method, y.shape[-1]
        rule = _rule(self, method.n) if method.shared_rule else None
        hidden = KroneckerLinear(method, method.rank_for(width), name="down")(y, rule)
        hidden = ACTIVATIONS[method.activation](hidden)
        return y + KroneckerLinear(method, width, method.init == "zero_up", name="up")(hidden, rule)


class KroneckerLinear(nn.Module):
    """``x W + b`` with ``W = sum_i A_i (x) B_i``, in the dtype of x."""

    method: PHM
    features: int
    zero: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "tokens in"], rule: Float[Array, "n n n"] | None
    ) -> Float[Array, "tokens features"]:
        """Maps each token; ``rule`` is None where the map has its own."""
        n, rank = self.method.n, self.method.factor_rank
        tokens, rows, columns = x.shape[0], x.shape[1] // n, self.features // n
        zeros_or_drawn = nn.initializers.zeros if self.zero else glorot_slices
        rule = (_rule(self, n) if rule is None else rule).astype(x.dtype)
        if self.method.factorised:
            left = self.param("left", glorot_slices, (n, rows, rank), jnp.float32).astype(x.dtype)
            right = self.param("right", zeros_or_drawn, (n, rank, columns), jnp.float32).astype(x.dtype)
            # One factor after the other: W, which would cost a product as large as a full map's, is never made.
            hidden = jnp.einsum("tar,irk->tiak", x.reshape(tokens, n, rows), left)
            hidden = jnp.einsum("tiak,iab->tibk", hidden, rule)
            y = jnp.einsum("tibk,ikc->tbc", hidden, right).reshape(tokens, self.features)
        else:
            blocks = self.param("blocks", zeros_or_drawn, (n, rows, columns), jnp.float32).astype(x.dtype)
            y = x @ jnp.einsum("iab,irc->arbc", rule, blocks).reshape(x.shape[1], self.features)
        return y + self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32).astype(x.dtype)


def _rule(module: nn.Module, n: int) -> Float[Array, "n n n"]:
    return module.param("rule", nn.initializers.normal(0.01), (n, n, n), jnp.float32)


def compacter() -> Placement:
    """After both sublayers, a thirty-second of the width, n = 4, factors of rank one (Karimi Mahabadi et al. 2021).

    The authors train all LayerNorms beside it, and draw the shared rule from N(0, 0.0001).
    """
    return Placement(PHM(init="glorot"), "compacter", slots=("attn_sublayer", "mlp_out"))


def vl_adapter_compacter() -> Placement:
    """What VL-Adapter (Sung et al. 2022) trains as Compacter: n = 2, full blocks, a rule for each map."""
    method = PHM(reduction=8, n=2, factorised=False, shared_rule=False, init="glorot")
    return Placement(method, "vl_adapter_compacter", slots=("attn_sublayer", "mlp_out"))
