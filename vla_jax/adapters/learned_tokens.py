"""What prompts and prefixes have in common: learned vectors, which a small network may make while they are trained.

Reparametrised (Li and Liang 2021, section 4.3), vectors are made of learned embeddings E, one row a token::

    tanh(E W_d + b_d) W_name + b_name

Nothing that comes in changes them, so that :func:`fold` computes them once after training and leaves the network out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vla_jax.adapters.base import Linear, Method, Share
from vla_jax.adapters.placing import leaf_at
from vla_jax.adapters.plan import Group, Plan, example
from vla_jax.errors import UserError
from vla_jax.names import Tree, flatten, unflatten
from vla_jax.slots import Site


def check_tokens(length: int, std: float) -> None:
    """Raises a :class:`UserError` for no tokens, or for tokens drawn without deviation."""
    if length < 1:
        raise UserError(f"length must be at least 1, got {length}")
    if std <= 0:
        raise UserError(f"std must be positive, got {std}; tokens that start equal stay equal")


@dataclasses.dataclass(frozen=True)
class LearnedTokens(Method):
    """A method whose parameters are vectors as wide as the stream.

    Attributes:
        length: how many of each.
        std: standard deviation that vectors learned directly are drawn with.
        hidden: width of the network that makes them; None learns them directly. The network's embeddings are as wide
            as the vectors and drawn from N(0, 1).
    """

    vectors: ClassVar[tuple[str, ...]]
    """What they are called, and their parameters where they are learned directly."""

    length: int
    std: float = 0.02
    hidden: int | None = None

    def __post_init__(self):
        check_tokens(self.length, self.std)
        if self.hidden is not None and self.hidden < 1:
            raise UserError(f"hidden must be at least 1, or None for tokens learned directly; got {self.hidden}")

    def parameter_counts(self, site: Site) -> dict[str, int]:
        """``length width`` a vector, or ``length width + (width + 1) hidden`` and ``(hidden + 1) width`` a vector."""
        width = site.widths[1]
        if self.hidden is None:
            return dict.fromkeys(self.vectors, self.length * width)
        counts = {"embedding": self.length * width, "down/kernel": width * self.hidden, "down/bias": self.hidden}
        for name in self.vectors:
            counts |= {f"to_{name}/kernel": self.hidden * width, f"to_{name}/bias": width}
        return counts

    @property
    def starts_as_identity(self) -> bool:
        """New tokens are seen from the start."""
        return False


class LearnedModule(nn.Module):
    """A module that holds the vectors of one layer."""

    method: LearnedTokens

    def vectors(self, like: Float[Array, "tokens width"]) -> list[Float[Array, "length width"]]:
        """The vectors in the order of their names, as wide as ``like`` and in its dtype.

        The network runs in float32 whatever the dtype, so that folding it away changes nothing.
        """
        method, shape = self.method, (self.method.length, like.shape[-1])
        if method.hidden is None:
            initial = nn.initializers.normal(method.std)
            made = [self.param(name, initial, shape, jnp.float32) for name in method.vectors]
        else:
            embedding = self.param("embedding", nn.initializers.normal(1.0), shape, jnp.float32)
            hidden = jnp.tanh(Linear(method.hidden, name="down")(embedding))
            made = [Linear(shape[1], name=f"to_{name}")(hidden) for name in method.vectors]
        return [jnp.asarray(vector, like.dtype) for vector in made]


def fold(plan: Plan, params: Tree) -> tuple[Plan, dict[str, Any]]:
    """The same adapters with all their tokens learned directly: the same outputs of fewer parameters.

    Args:
        plan: where the adapters sit; those that nothing makes stay as they are.
        params: the tree below ``adapters/``.

    Returns:
        The plan without networks, and its parameters.
    """
    flat, folded, groups = flatten(params), {}, []
    placements = {placement.name: placement for placement in plan.placements}
    for group in plan.groups:
        name = group.path[0]
        if not isinstance(group.method, LearnedTokens) or group.method.hidden is None:
            groups.append(group)
            folded |= {leaf.path: flat[leaf.path] for leaf in group.leaves}
            continue
        given = next(placement for placement in plan.placements if placement.name == name)
        # What all parts of the network are shared over, the vectors are shared over too.
        over = set.intersection(*(set(given.shared_over(leaf.name)) for leaf in group.leaves))
        sharing = (Share(".*", tuple(sorted(over))),) if over else ()
        method = dataclasses.replace(group.method, hidden=None)
        placements[name] = dataclasses.replace(given, method=method, sharing=sharing, tied=False)
        leaves = tuple(leaf_at(placements[name], group.path, vector) for vector in method.vectors)
        groups.append(group._replace(method=method, leaves=leaves))
        for leaf, value in zip(leaves, _vectors(group, flat), strict=True):
            value = value[:, 0] if group.tasks and not leaf.by_task else value
            folded[leaf.path] = value if leaf.by_layer else value[0]
    return plan._replace(placements=tuple(placements.values()), groups=tuple(groups)), unflatten(folded)


def _vectors(group: Group, flat: Mapping[str, jax.Array]) -> tuple[jax.Array, ...]:
    """What a group's networks make: ``[layers, (tasks,) length, width]`` each."""
    module = group.method.module(group.site)
    nothing = example(group.method, group.site, tokens=0)

    def vectors(params: Mapping[str, jax.Array]) -> tuple[jax.Array, ...]:
        return tuple(jax.tree.leaves(module.apply({"params": unflatten(params)}, *nothing)))

    if group.tasks:
        over_tasks = {leaf.name: 0 if leaf.by_task else None for leaf in group.leaves}
        vectors = jax.vmap(vectors, in_axes=(over_tasks,), axis_size=group.tasks)
    over_layers = {leaf.name: 0 if leaf.by_layer else None for leaf in group.leaves}
    vectors = jax.vmap(vectors, in_axes=(over_layers,), axis_size=group.depth)
    return vectors({leaf.name: flat[leaf.path] for leaf in group.leaves})
