"""Ladder side tuning (Sung, Cho and Bansal 2022, section 3): a small transformer beside a frozen tower, fed by it.

With h_0 the tower's embeddings, h_i the output of its i-th block that has a rung, and a side stream w / r wide::

    s_0 = Down_0(h_0)
    s_i = Block_i(mu_i s_{i-1} + (1 - mu_i) Down_i(h_i)),    mu_i = sigmoid(alpha_i / 0.1),  alpha_i = 0 at first

The tower's states are read behind a stopped gradient, so that training computes and keeps nothing of the tower's
backward pass. The paper hands the side stream alone to the task's head; here it is added to the tower's last stream,
``h + Up(LayerNorm(s))`` with Up starting at zero, so that a new ladder changes nothing and the tower's own projection
still fits what it gets.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vla_jax.adapters.base import ACTIVATIONS, Activation, Linear, Method, Sized, check_activation
from vla_jax.adapters.layers import layers
from vla_jax.errors import UserError
from vla_jax.slots import Site

TEMPERATURE = 0.1
"""What the gates' parameters are divided by; from the authors' code."""


@dataclasses.dataclass(frozen=True)
class Ladder(Sized, Method):
    """A side network of one tower.

    Attributes:
        rank: width of the side stream.
        reduction: the tower's width over it, where ``rank`` is None; the paper's 4 for vision and language.
        rungs: the blocks of the tower that have one, in the notation of :mod:`vla_jax.adapters.layers`.
        heads: attention heads of the side blocks; must divide the side stream's width.
        mlp_ratio: width of the side blocks' MLP over that of the side stream.
        activation: of the MLP.
    """

    kind: ClassVar[str] = "ladder"
    slots: ClassVar[tuple[str, ...]] = ("side",)

    reduction: int | None = 4
    rungs: str = "all"
    heads: int = 4
    mlp_ratio: int = 4
    activation: Activation = "quick_gelu"

    def __post_init__(self):
        super().__post_init__()
        check_activation(self.activation)
        if min(self.heads, self.mlp_ratio) < 1:
            raise UserError(f"heads and mlp_ratio must be at least 1, got {self.heads} and {self.mlp_ratio}")

    def side_width(self, site: Site) -> int:
        """The width of the side stream beside a tower."""
        width = self.rank_for(site.widths[1])
        if width % self.heads:
            raise UserError(
                f"the side stream's width {width} beside the {site.tower} tower does not divide into {self.heads} "
                "heads; change rank, reduction or heads"
            )
        return width

    def states(self, site: Site) -> tuple[int, ...]:
        """The states that rungs read, counted from the embeddings as 0."""
        return tuple(1 + layer for layer in layers(self.rungs, site.depth, f"the {site.tower} tower"))

    def module(self, site: Site) -> nn.Module:
        """The module for one example: ``module(states, y, seen)``."""
        return LadderModule(self, self.side_width(site), self.states(site), parent=None)

    def parameter_counts(self, site: Site) -> dict[str, int]:
        """With side width s and k rungs: ``(1 + k)(w s + s)``, k gates and blocks, a LayerNorm and ``s w + w``."""
        width, side, rungs = site.widths[1], self.side_width(site), len(self.states(site))
        hidden = self.mlp_ratio * side
        rung = {"gate": 1, "down/kernel": width * side, "down/bias": side}
        rung |= {f"norm{k}/{leaf}": side for k in (1, 2) for leaf in ("scale", "bias")}
        rung |= {f"attention/{part}/kernel": side**2 for part in ("query", "key", "value", "out")}
        rung |= {f"attention/{part}/bias": side for part in ("query", "key", "value", "out")}
        rung |= {"fc1/kernel": side * hidden, "fc1/bias": hidden, "fc2/kernel": hidden * side, "fc2/bias": side}
        counts = {"embed/kernel": width * side, "embed/bias": side, "norm/scale": side, "norm/bias": side}
        counts |= {"up/kernel": side * width, "up/bias": width}
        return counts | {f"rungs/{name}": rungs * count for name, count in rung.items()}

    @property
    def starts_as_identity(self) -> bool:
        """Up starts at zero."""
        return True


class LadderModule(nn.Module):
    """One tower's side network."""

    method: Ladder
    width: int
    states: tuple[int, ...]

    @nn.compact
    def __call__(
        self,
        states: Float[Array, "states tokens width"],
        y: Float[Array, "tokens width"],
        seen: Bool[Array, "tokens tokens"],
    ) -> Float[Array, "tokens width"]:
        """Adds to the tower's last stream what the side network makes of its states.

        Args:
            states: the embeddings and every block's output.
            y: the last stream.
            seen: which token (column) each token (row) may attend to.
        """
        side = Linear(self.width, name="embed")(states[0])  # [tokens, side width]
        climb = nn.scan(
            Rung, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=(0, nn.broadcast), out_axes=0
        )
        side, _ = climb(self.method, self.width, name="rungs")(side, states[jnp.array(self.states)], seen)
        side = nn.LayerNorm(epsilon=1e-5, dtype=side.dtype, name="norm")(side)
        return y + Linear(y.shape[-1], nn.initializers.zeros, name="up")(side)


class Rung(nn.Module):
    """One step of the ladder: the side stream, a share of one state of the tower, and a pre-norm block."""

    method: Ladder
    width: int

    @nn.compact
    def __call__(
        self, side: Float[Array, "tokens side"], state: Float[Array, "tokens width"], seen: Bool[Array, "tokens tokens"]
    ) -> tuple[Float[Array, "tokens side"], None]:
        """The next side stream; the second value is what a scan collects."""
        alpha = self.param("gate", nn.initializers.zeros, (), jnp.float32)
        mu = jax.nn.sigmoid(alpha / TEMPERATURE).astype(side.dtype)
        side = mu * side + (1 - mu) * Linear(self.width, name="down")(state)
        x = nn.LayerNorm(epsilon=1e-5, dtype=side.dtype, name="norm1")(side)
        attention = nn.MultiHeadDotProductAttention(
            self.method.heads, qkv_features=self.width, dtype=side.dtype, name="attention"
        )
        side = side + attention(x, mask=seen[None])
        x = nn.LayerNorm(epsilon=1e-5, dtype=side.dtype, name="norm2")(side)
        hidden = ACTIVATIONS[self.method.activation](Linear(self.method.mlp_ratio * self.width, name="fc1")(x))
        return side + Linear(self.width, name="fc2")(hidden), None
