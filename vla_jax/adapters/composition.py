"""Methods made of named methods: one after the other, side by side, averaged, or each for tokens of its own.

With ``c_n`` the n-th child, all of which sit at the composite's own slot and get the x of that slot::

    Stack     y' = c_N(x, ... c_2(x, c_1(x, y)))         order matters (MAD-X; Pfeiffer et al. 2020)
    Parallel  y' = y + sum_n (c_n(x, y) - y)
    Average   y' = y + sum_n w_n (c_n(x, y) - y)
    Split     y'[own_n] = c_n(x[own_n], y[own_n])        other tokens stay as they are

and ``Fuse``, which weighs the changes by attention, in :mod:`vla_jax.adapters.adapter_fusion`. What a child changes,
``c(x, y) - y``, is all that a composite knows of it: any method can be a child, another composite too, wherever that
has a meaning; where it has none the composite says why. In bfloat16 this difference is as coarse as y is, so that each
child adds one rounding of y.

Parameters of a child lie below its name: ``<adapter>/<tower>/<slot>/<child>/down/kernel``.
"""

from __future__ import annotations

import dataclasses
import math
from types import MappingProxyType
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from vla_jax.adapters.composite import REPLACED, Composite, bound
from vla_jax.errors import UserError
from vla_jax.slots import Site

_SUMMED = "methods put tokens of their own there, which cannot be added up; Stack puts them one after the other"
_EXTENDED = "methods put tokens of their own there, which belong to no range of those that there were"


@dataclasses.dataclass(frozen=True)
class Stack(Composite):
    """Children one after the other: each gets what the one before it made of y, and all the same x."""

    kind: ClassVar[str] = "stack"
    refused = MappingProxyType({"prompts": f"{REPLACED}, and the last child's would be all that is left"})

    def module(self, site: Site) -> nn.Module:
        """The module for one example and one layer."""
        return StackModule(self, site, parent=None)


class StackModule(nn.Module):
    """One layer's children, one after the other."""

    method: Stack
    site: Site

    @nn.compact
    def __call__(self, *arrays: Any) -> Any:
        """Applies the children in their order."""
        state, calls = bound(self, self.method, self.site, arrays)
        for call in calls:
            state = call(state)
        return state


@dataclasses.dataclass(frozen=True)
class Parallel(Composite):
    """Children side by side: all get the same x and y, and what they change is added up."""

    kind: ClassVar[str] = "parallel"
    refused = MappingProxyType({"tokens": _SUMMED, "prompts": REPLACED, "attn_kv": _SUMMED})

    def module(self, site: Site) -> nn.Module:
        """The module for one example and one layer."""
        return WeightedModule(self, site, (1.0,) * len(self.children), parent=None)


@dataclasses.dataclass(frozen=True)
class Average(Composite):
    """The weighted mean of what children change, all of which get the same x and y.

    Where methods put tokens of their own (the slots ``tokens``, ``prompts`` and ``attn_kv``) the mean of these tokens
    is taken, so that every child must make equally many.

    Attributes:
        weights: one for each child; none for equal ones.
        normalised: whether the weights are divided by their sum, which makes it a mean. Otherwise they are taken as
            given: a weight of one for each child adds up what they change, as Parallel does.
    """

    kind: ClassVar[str] = "average"

    weights: tuple[float, ...] = ()
    normalised: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.weights and len(self.weights) != len(self.children):
            raise UserError(f"{len(self.weights)} weights were given for {len(self.children)} children; give one each")
        if not all(math.isfinite(weight) for weight in self.weights):
            raise UserError(f"weights must be finite, got {', '.join(map(str, self.weights))}")
        if self.normalised and self.weights and math.isclose(sum(self.weights), 0, abs_tol=1e-12):
            raise UserError("weights that add up to 0 have no mean; give others, or normalised=False")

    @property
    def factors(self) -> tuple[float, ...]:
        """What each child's change is multiplied with."""
        weights = self.weights or (1.0,) * len(self.children)
        return tuple(weight / sum(weights) for weight in weights) if self.normalised else weights

    def module(self, site: Site) -> nn.Module:
        """The module for one example and one layer."""
        return WeightedModule(self, site, self.factors, parent=None)


class WeightedModule(nn.Module):
    """One layer's children side by side, what they change added up with fixed weights."""

    method: Parallel | Average
    site: Site
    weights: tuple[float, ...]

    @nn.compact
    def __call__(self, *arrays: Any) -> Any:
        """Adds the weighted changes to y.

        Raises:
            UserError: where children make different numbers of tokens.
        """
        state, calls = bound(self, self.method, self.site, arrays)
        results = [call(state) for call in calls]
        counts = {name: _tokens(result) for (name, _), result in zip(self.method.children, results, strict=True)}
        if len(set(counts.values())) > 1:
            shown = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise UserError(
                f"the children of {self.method.kind} at {self.site.tower}/{self.site.slot} make different numbers of "
                f"tokens, which have no mean ({shown} for one); give them equally many"
            )

        def combine(y: jax.Array, *changed: jax.Array) -> jax.Array:
            y = _without_own(y, changed[0], self.site.slot)
            return y + sum(weight * (new - y) for weight, new in zip(self.weights, changed, strict=True))

        return jax.tree.map(combine, state, *results)


def _tokens(result: Any) -> int:
    return jax.tree.leaves(result)[0].shape[-2]


def _without_own(y: jax.Array, new: jax.Array, slot: str) -> jax.Array:
    """What children change in y is counted from: y with zeros for tokens that are all the children's own."""
    if slot == "prompts":
        return jnp.zeros_like(new)
    if slot in ("tokens", "attn_kv"):
        own = (new.shape[0] - y.shape[0], 0)
        return jnp.pad(y, [own if slot == "attn_kv" else own[::-1], (0, 0)])
    return y


@dataclasses.dataclass(frozen=True)
class Split(Composite):
    """Each child sees and changes tokens of its own.

    Tokens are counted as they come to the slot, those included that other adapters put there: a vision tower has its
    class token first, then the patches, then what is inserted.

    Attributes:
        ranges: for each child its first token and one past its last; None for the end. They ascend without overlap.
    """

    kind: ClassVar[str] = "split"
    refused = MappingProxyType(
        {
            "tokens": _EXTENDED,
            "prompts": REPLACED,
            "attn_kv": _EXTENDED,
            "projection": "a tower has a single token there",
            "side": "what a side network reads and what it changes are not the same tokens",
        }
    )
    refused_joint = "one range cannot name tokens of two streams"

    ranges: tuple[tuple[int, int | None], ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if len(self.ranges) != len(self.children):
            raise UserError(f"{len(self.ranges)} ranges were given for {len(self.children)} children; give one each")
        end: int | None = 0
        for start, stop in self.ranges:
            if end is None or start < end or (stop is not None and stop <= start):
                shown = ", ".join(_shown(*own) for own in self.ranges)
                raise UserError(f"ranges must ascend from 0, without overlap, none empty; got {shown}")
            end = stop

    def module(self, site: Site) -> nn.Module:
        """The module for one example and one layer."""
        return SplitModule(self, site, parent=None)


class SplitModule(nn.Module):
    """One layer's children, each for its own tokens."""

    method: Split
    site: Site

    @nn.compact
    def __call__(self, *arrays: Any) -> jax.Array:
        """Applies each child to its range.

        Raises:
            UserError: where a range reaches beyond the tokens that there are.
        """
        y, calls = bound(self, self.method, self.site, arrays)
        x = arrays[0]
        if self.is_initializing():
            # Parameters do not depend on how many tokens there are, and a new module is made for as few as can be.
            return next(iter([call(y) for call in calls]))
        parts, end = [], 0
        for (name, _), call, (start, stop) in zip(self.method.children, calls, self.method.ranges, strict=True):
            if max(start + 1, stop or 0) > y.shape[0]:
                raise UserError(
                    f"tokens {_shown(start, stop)} of {name!r} reach beyond the {y.shape[0]} at "
                    f"{self.site.tower}/{self.site.slot}; change the ranges, or place the adapter elsewhere"
                )
            parts += [y[end:start], call(y[start:stop], x[start:stop])]
            end = y.shape[0] if stop is None else stop
        return jnp.concatenate([*parts, y[end:]])


def _shown(start: int, stop: int | None) -> str:
    return f"{start}:{'' if stop is None else stop}"
