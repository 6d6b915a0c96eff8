"""The combined update of one place, however it is combined."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from vla_jax.algebra.low_rank import compress, nearest_factors
from vla_jax.algebra.places import Occupant
from vla_jax.algebra.sparsify import drop, elect, trim
from vla_jax.algebra.updates import Update

How = Literal["cat", "svd", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune", "parameters"]

TRIMMED = ("ties", "magnitude_prune")
DROPPED = ("dare_linear", "dare_ties")
ELECTED = ("ties", "dare_ties")
SPARSE = (*TRIMMED, *DROPPED)
"""What acts on single entries of an update, and leaves a matrix that has no low rank of its own."""


class Recipe(NamedTuple):
    """How to combine.

    Attributes:
        how: see :mod:`vla_jax.algebra.combine`.
        weights: one for each adapter.
        rank: of the result, where ``how`` asks for one; None for the largest of the adapters'.
        density: the share of entries that are kept, for what is sparse.
        key: what DARE draws from.
    """

    how: How
    weights: tuple[float, ...]
    rank: int | None = None
    density: float | None = None
    key: PRNGKeyArray | None = None


def combined(recipe: Recipe, own: Sequence[Occupant], updates: Sequence[Update]) -> Update:
    """One place's combined update.

    Args:
        recipe: how.
        own: what each adapter has there; of methods alike.
        updates: the change that each makes.
    """
    factors = () if updates[0].a is None else _factors(recipe, own, updates)
    if recipe.how in SPARSE and not factors:
        gain, bias_gain = (
            1.0 + _sparse_sum(recipe, own, "scale", [getattr(update, part) - 1.0 for update in updates])
            for part in ("gain", "bias_gain")
        )
        return Update(gain, bias_gain, _sparse_sum(recipe, own, "shift", [update.shift for update in updates]))
    rest = 1.0 - sum(recipe.weights)  # gains count from one; in this order, one adapter at weight one is itself
    gain, bias_gain, shift = (
        sum(w * getattr(update, part) for w, update in zip(recipe.weights, updates, strict=True))
        for part in ("gain", "bias_gain", "shift")
    )
    return Update(gain + rest, bias_gain + rest, shift, *factors)


def _factors(
    recipe: Recipe, own: Sequence[Occupant], updates: Sequence[Update]
) -> tuple[Float[np.ndarray, "in rank"], Float[np.ndarray, "rank out"]]:
    if recipe.how == "linear":
        return _sum_of_factors(recipe.weights, own, updates)
    narrow, largest = min(own[0].site.widths), max(update.a.shape[1] for update in updates)
    if recipe.how in SPARSE:
        entries = _sparse_sum(recipe, own, "b", [update.a @ update.b for update in updates])
        return nearest_factors(entries, min(recipe.rank or largest, narrow))
    a = np.concatenate([update.a for update in updates], axis=1)
    b = np.concatenate([w * update.b for w, update in zip(recipe.weights, updates, strict=True)], axis=0)
    wanted = narrow if recipe.how == "cat" else recipe.rank or largest
    return compress(a, b, min(wanted, narrow)) if wanted < a.shape[1] else (a, b)


def _sum_of_factors(
    weights: Sequence[float], own: Sequence[Occupant], updates: Sequence[Update]
) -> tuple[Float[np.ndarray, "in rank"], Float[np.ndarray, "rank out"]]:
    """The products of square roots that peft's ``linear`` makes; the sign of a weight stands with A."""
    scales = [occupant.method.scale for occupant in own]
    a, b = 0.0, 0.0
    for weight, scale, update in zip(weights, scales, updates, strict=True):
        root = math.sqrt(abs(weight) * scale / scales[0])
        a = a + math.copysign(root, weight) * update.a
        b = b + root * scales[0] / scale * update.b
    return a, b


def _sparse_sum(recipe: Recipe, own: Sequence[Occupant], leaf: str, parts: Sequence[np.ndarray]) -> np.ndarray:
    """Weighted parts of updates, made sparse and put together."""
    parts = [weight * part for weight, part in zip(recipe.weights, parts, strict=True)]
    if recipe.how in TRIMMED:
        parts = [trim(part, recipe.density) for part in parts]
    else:
        here = jax.random.fold_in(recipe.key, zlib.crc32(f"{own[0].place}/{leaf}".encode()))
        keys = jax.random.split(here, len(parts))
        parts = [drop(part, recipe.density, key) for part, key in zip(parts, keys, strict=True)]
    return elect(parts) if recipe.how in ELECTED else sum(parts)
