"""LoRA (Hu et al. 2022, equation 3) and its kin: a low-rank update of a linear map, ``y + s (x A) B``.

The scale s is alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (Kalajdzievski 2023).

DoRA (Liu et al. 2024, equation 5) parts the updated kernel ``W' = W + s A B`` into magnitude and direction: column j of
``[in, out]``, the j-th output's weights, becomes ``m_j W'_j / ||W'_j||``. m starts as the norms of W; the norm of W' is
held constant in the gradient (section 4.3); the map's bias is left as it is.

PiSSA (Meng et al. 2024, equations 2 and 3) starts A and B from the r largest singular values of W and their vectors, so
that ``s A B`` is the best approximation of W of that rank, and leaves the map with the rest. Here the map is frozen and
serves other adapters and tasks beside this one, so the rest does not take its place. What A and B started from is kept
beside them, ``frozen/a`` and ``frozen/b``, and taken off: ``y + s (x A B - x A_0 B_0)``. Both halves are stored in
memory, ``2 r (in + out)``; A and B alone are trained, saved and counted as such. A run takes A_0 and B_0 from the
backbone again when it starts: singular vectors may come out with other signs on another machine, but their product,
which is all that is used, does not depend on them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vla_jax.adapters.base import Method, Share, uniform_fan_in
from vla_jax.adapters.placement import Placement
from vla_jax.errors import UserError, unknown
from vla_jax.slots import LINEAR_SLOTS, LinearWeights, Site

Init = Literal["default", "pissa"]
INITS = ("default", "pissa")


@dataclasses.dataclass(frozen=True)
class LoRA(Method):
    """A low-rank update of the linear map at a slot.

    Attributes:
        rank: r.
        alpha: numerator of the scale.
        dropout: share of the map's input that the update does not see, in training. With ``decomposed`` what DoRA adds
            of the map itself does not see it either, as in peft.
        rank_stabilised: divides by sqrt(r) instead of r.
        decomposed: whether magnitudes are trained apart from directions (DoRA).
        init: ``default`` draws A and starts B at zero; ``pissa`` starts both from the singular vectors of the map.
    """

    kind: ClassVar[str] = "lora"
    slots: ClassVar[tuple[str, ...]] = LINEAR_SLOTS

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rank_stabilised: bool = False
    decomposed: bool = False
    init: Init = "default"

    def __post_init__(self):
        if self.rank < 1:
            raise UserError(f"rank must be at least 1, got {self.rank}")
        if self.alpha <= 0:
            raise UserError(f"alpha must be positive, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        if self.init not in INITS:
            raise unknown("lora init", self.init, INITS)

    @property
    def scale(self) -> float:
        """What the update is multiplied with."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)

    @property
    def from_singular_vectors(self) -> bool:
        """Whether A and B start as a part of the map, which is then taken off."""
        return self.init == "pissa"

    @property
    def uses_weights(self) -> bool:
        """Norms and singular vectors are those of the frozen map."""
        return self.decomposed or self.from_singular_vectors

    def module(self, site: Site) -> nn.Module:
        """The module for one example and one layer."""
        del site
        return LoRAModule(self, parent=None)

    def parameter_counts(self, site: Site) -> dict[str, int]:
        """``r (in + out)``, with magnitudes ``out`` more; what PiSSA keeps is as large again and not trained."""
        in_width, out_width = site.widths
        if self.rank > min(site.widths):
            raise UserError(
                f"rank {self.rank} exceeds the map at {site.tower}/{site.slot}, {in_width} to {out_width}; "
                f"give at most {min(site.widths)}"
            )
        counts = {"a": in_width * self.rank, "b": self.rank * out_width}
        if self.from_singular_vectors:
            counts |= {f"frozen/{name}": count for name, count in counts.items()}
        return counts | ({"magnitude": out_width} if self.decomposed else {})

    @property
    def sharing(self) -> tuple[Share, ...]:
        """Every task starts from the same singular vectors."""
        return (Share("frozen/.*", ("tasks",)),) if self.from_singular_vectors else ()

    @property
    def starts_as_identity(self) -> bool:
        """B starts at zero, or as what is taken off; magnitudes start as the norms."""
        return True

    @property
    def uses_dropout(self) -> bool:
        """Whether training needs a dropout key."""
        return self.dropout > 0


class LoRAModule(nn.Module):
    """One layer's update."""

    method: LoRA

    @nn.compact
    def __call__(
        self, x: Float[Array, "tokens in"], y: Float[Array, "tokens out"], weights: LinearWeights | None = None
    ) -> Float[Array, "tokens out"]:
        """Adds the update of what the map made of x to y, which is what it made.

        Args:
            x: the map's input.
            y: its output.
            weights: the map itself, for a method that uses it.
        """
        method, scale = self.method, self.method.scale
        shapes = {"a": (x.shape[-1], method.rank), "b": (method.rank, y.shape[-1])}
        inits = {"a": uniform_fan_in, "b": nn.initializers.zeros}
        start = None
        if method.from_singular_vectors:
            start = self.param("frozen", lambda _: principal_factors(weights.kernel, method.rank, scale))
            inits = {name: lambda _, *shape, value=value: value for name, value in start.items()}
        own = {name: self.param(name, inits[name], shapes[name], jnp.float32) for name in shapes}

        seen = x
        if method.uses_dropout:
            seen = nn.Dropout(method.dropout, deterministic=not self.has_rng("dropout"))(x)
        update = _update(own, seen, scale)
        change = update if start is None else update - _update(start, x, scale)
        if not method.decomposed:
            return y + change

        # By column, (m / n - 1) times all of the new map but its bias is what rescaling it adds.
        magnitude = self.param("magnitude", lambda _: jnp.linalg.norm(weights.kernel.astype(jnp.float32), axis=0))
        norms = column_norms(weights.kernel, own, start, scale)
        factor = (magnitude / jax.lax.stop_gradient(norms) - 1).astype(y.dtype)  # [out]
        if method.uses_dropout and self.has_rng("dropout"):
            mapped = seen @ weights.kernel.astype(x.dtype) + update
            mapped = mapped if start is None else mapped - _update(start, seen, scale)
        else:
            mapped = (y if weights.bias is None else y - weights.bias.astype(y.dtype)) + change
        return y + change + factor * mapped


Factors = Mapping[str, jax.typing.ArrayLike]


def _update(factors: Factors, x: Float[Array, "tokens in"], scale: float) -> Float[Array, "tokens out"]:
    return (scale * (x @ factors["a"].astype(x.dtype))) @ factors["b"].astype(x.dtype)


def principal_factors(kernel: Float[Array, "in out"], rank: int, scale: float) -> Factors:
    """What PiSSA starts from: ``scale a @ b`` is the kernel's part of its ``rank`` largest singular values."""
    left, values, right = jnp.linalg.svd(kernel.astype(jnp.float32), full_matrices=False)
    root = jnp.sqrt(values[:rank] / scale)
    return {"a": left[:, :rank] * root, "b": root[:, None] * right[:rank]}


def column_norms(
    kernel: Float[Array, "in out"], factors: Factors, start: Factors | None, scale: float
) -> Float[Array, "out"]:
    """The norms of the columns of ``W + s A B - s A_0 B_0``, float32, without forming it.

    Where tasks have weights of their own there would be one such kernel for each example; here there are the thin
    factors alone: ``||w + A b||^2 = ||w||^2 + 2 (A^T w) b + b (A^T A) b`` for every column.
    """
    a, b = factors["a"], scale * factors["b"]
    if start is not None:
        a, b = jnp.concatenate([a, start["a"]], 1), jnp.concatenate([b, -scale * start["b"]], 0)
    kernel = kernel.astype(jnp.float32)
    with jax.default_matmul_precision("highest"):  # every output is divided by these
        across, within = a.T @ kernel, (a.T @ a) @ b  # [rank, out] both
    squares = jnp.sum(kernel**2, 0) + jnp.sum(b * (2 * across + within), 0)
    # A column of zeros has no direction; its output stays zero instead of becoming 0 / 0.
    return jnp.sqrt(jnp.maximum(squares, jnp.finfo(jnp.float32).tiny))


def clip_lora() -> Placement:
    """CLIP-LoRA (Zanella and Ben Ayed 2024): queries, keys and values of every layer of both towers; 184,320 on B/16.

    The authors' code divides alpha by sqrt(r). Their recipe: AdamW at 2e-4, weight decay 1e-2, batches of 32, 500 steps
    a shot, cosine to 1e-6.
    """
    method = LoRA(rank=2, alpha=1.0, dropout=0.25, rank_stabilised=True)
    return Placement(method, "clip_lora", slots=("attn_q", "attn_k", "attn_v"))


def vl_adapter_lora() -> Placement:
    """LoRA as VL-Adapter compares with it (Sung et al. 2022): queries and values; the rules are those of ``bitfit``."""
    return Placement(LoRA(rank=128, alpha=32.0, dropout=0.1), "vl_adapter_lora", slots=("attn_q", "attn_v"))
