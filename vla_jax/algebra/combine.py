"""Several adapters into one: sums and weighted combinations, in terms of the change that each makes to the weights.

An adapter's *update* is what merging it adds to the backbone. A weight multiplies the update, scale included, so that
one adapter at weight one is itself however it is scaled; the combination is an adapter again. ``how`` says which:

    cat              the weighted sum of updates, exact: factors stand side by side, so that ranks add up. A rank
                     beyond the narrower side of a map is brought down to it, where nothing is lost either.
    svd              the nearest adapter to that sum of a given rank.
    linear           peft's approximation: the sums of sqrt(w) A and of sqrt(w) B. Same rank, no products to form, but
                     A of one adapter also meets B of the others. For equal ranks.
    ties             TIES (Yadav et al. 2023) on the updates: trimmed to ``density``, by kernel as in peft; a sign
                     elected by mass, the mean of those that have it; then brought to a rank by SVD.
    dare_linear      DARE (Yu et al. 2024) on the updates: all but ``density`` dropped at random, the rest rescaled,
                     summed; then brought to a rank by SVD.
    dare_ties        the same with TIES' election instead of the sum.
    magnitude_prune  updates trimmed to ``density`` and summed; then brought to a rank by SVD.
    parameters       the weighted mean of the parameters themselves, for adapters of one plan and any method (model
                     soups; Wortsman et al. 2022). Weights must add up to one. It says nothing of updates.

All but ``parameters`` need adapters that can be merged. Affine adapters have no rank: what is said of updates holds for
their factors' distance from one and for their shifts, and nothing is brought to a rank. DoRA's update rescales the
frozen columns; a sum of such updates is DoRA again, which ``cat`` and ``svd`` find with the backbone's help. The others
would act on its parts, of which none is its update, and are refused.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from vla_jax.adapters import Affine, LoRA, Placement, place
from vla_jax.adapters.plan import Group
from vla_jax.algebra.checks import check_alike, check_apart, check_meaning, check_recipe
from vla_jax.algebra.places import Adapter, Occupant, Place, assemble, occupants, tower_shapes
from vla_jax.algebra.sums import How, Recipe, combined
from vla_jax.algebra.updates import (
    Update,
    column_norms,
    is_decomposed,
    map_names,
    norms_of,
    read_map,
    update_of,
)
from vla_jax.errors import UserError
from vla_jax.names import Tree, flatten, unflatten


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    how: How = "cat",
    *,
    rank: int | None = None,
    density: float | None = None,
    key: jax.Array | None = None,
    backbone: Tree | None = None,
    name: str | None = None,
) -> Adapter:
    """One adapter from several.

    Args:
        adapters: what to combine. Their placements must serve the same places in the same order; ranks, scales and
            names may differ.
        weights: one for each adapter; any sign.
        how: see the module's text.
        rank: for ``svd`` and what is sparse, the rank of the result at every place, which is lower where a lower one
            holds all there is; None for the largest that any of the adapters has there.
        density: for what is sparse, the share of entries that are kept, above 0 and at most 1.
        key: for DARE, what is drawn from.
        backbone: the tree below ``backbone/``; needed for DoRA alone.
        name: the result's; None for the first adapter's.

    Returns:
        An adapter with the first one's settings, but for its ranks. PiSSA becomes LoRA of twice the rank, since what it
        started from is a part of its update.

    Raises:
        UserError: for settings that ``how`` does not use or lacks, adapters that differ in more than ranks and scales,
            or methods for which the combination has no meaning.
    """
    adapters = [Adapter(*adapter) for adapter in adapters]
    recipe = Recipe(how, tuple(map(float, weights)), rank, density, key)
    check_recipe(recipe, len(adapters))
    first = adapters[0].plan
    if not first.groups:
        raise UserError("the first adapter has no places; there is nothing to combine")
    if name is not None and len(first.placements) != 1:
        raise UserError(
            f"name {name!r} is for one adapter, and {len(first.placements)} are combined with their like: "
            f"{', '.join(placement.name for placement in first.placements)}; leave the name out"
        )
    if how == "parameters":
        return _mean_of_parameters(adapters, recipe.weights, name)
    held = [occupants(adapter) for adapter in adapters]
    check_alike(adapters, held)
    check_apart(held[0].values())
    flat = None if backbone is None else flatten(backbone)
    kernels = {at: _kernel(flat, occupant) for at, occupant in held[0].items() if is_decomposed(occupant)}
    updates = {}
    for at in held[0]:
        own = [places[at] for places in held]
        check_meaning(recipe, first.placements[at.placement], own)
        changes = [update_of(o, norms_of(o, kernels[at]) if at in kernels else None) for o in own]
        updates[at] = combined(recipe, own, changes)
    placements = [_placement(number, given, updates, name) for number, given in enumerate(first.placements)]

    def leaves_at(group: Group, at: Place) -> dict[str, np.ndarray]:
        return _leaves(group.method, updates[at], kernels.get(at))

    return assemble(placements, tower_shapes(first), leaves_at)


def add(*adapters: Adapter, rank: int | None = None, backbone: Tree | None = None, name: str | None = None) -> Adapter:
    """The adapter whose update is the sum of theirs; exact, unless a rank is given to bring it down to.

    The other arguments, and what is refused, are those of :func:`combine`; the same holds for the functions below.
    """
    return _weighted(adapters, [1.0] * len(adapters), rank, backbone, name)


def scale(adapter: Adapter, factor: float, *, backbone: Tree | None = None, name: str | None = None) -> Adapter:
    """The adapter whose update is ``factor`` times as large; of the same rank."""
    return combine([adapter], [factor], backbone=backbone, name=name)


def negate(adapter: Adapter, *, backbone: Tree | None = None, name: str | None = None) -> Adapter:
    """The adapter that takes away what the given one adds (task arithmetic; Ilharco et al. 2023)."""
    return scale(adapter, -1.0, backbone=backbone, name=name)


def average(
    *adapters: Adapter, rank: int | None = None, backbone: Tree | None = None, name: str | None = None
) -> Adapter:
    """The adapter whose update is the mean of theirs."""
    return _weighted(adapters, [1.0 / max(1, len(adapters))] * len(adapters), rank, backbone, name)


def interpolate(
    first: Adapter,
    second: Adapter,
    share: float,
    *,
    rank: int | None = None,
    backbone: Tree | None = None,
    name: str | None = None,
) -> Adapter:
    """The adapter a ``share`` of the way from the first to the second; beyond 0 and 1 it extrapolates."""
    return _weighted((first, second), [1.0 - share, share], rank, backbone, name)


def _weighted(
    adapters: Sequence[Adapter], weights: Sequence[float], rank: int | None, backbone: Tree | None, name: str | None
) -> Adapter:
    how = "cat" if rank is None else "svd"
    return combine(adapters, weights, how, rank=rank, backbone=backbone, name=name)


def _leaves(method: LoRA | Affine, update: Update, kernel: np.ndarray | None) -> dict[str, np.ndarray]:
    """The parameters with which a method makes an update."""
    if isinstance(method, Affine):
        return {name: getattr(update, part) for name, part in (("scale", "gain"), ("shift", "shift"))}
    if kernel is None:
        return {"a": update.a, "b": update.b / method.scale}
    gone = update.gain == 0
    if bool(np.any(gone & np.any(update.b != 0, axis=0))):
        raise UserError("the combination takes away all of a frozen column and adds another; no DoRA does that")
    b = update.b / np.where(gone, 1.0, update.gain)
    return {"a": update.a, "b": b / method.scale, "magnitude": update.gain * column_norms(kernel + update.a @ b)}


def _placement(number: int, given: Placement, updates: Mapping[Place, Update], name: str | None) -> Placement:
    """The first adapter's placement with the ranks that updates have come to."""
    name = given.name if name is None else name
    ranks = {at: update.a.shape[1] for at, update in updates.items() if at.placement == number and update.a is not None}
    if not ranks:
        return dataclasses.replace(given, name=name)
    if given.method.init == "default" and all(given.method_at(str(at)).rank == rank for at, rank in ranks.items()):
        return dataclasses.replace(given, name=name)
    usual = collections.Counter(ranks.values()).most_common(1)[0][0]
    table = tuple((re.escape(str(at)), rank) for at, rank in ranks.items() if rank != usual)
    method = dataclasses.replace(given.method, rank=usual, init="default")
    return dataclasses.replace(given, name=name, method=method, ranks=table)


def _mean_of_parameters(adapters: Sequence[Adapter], weights: Sequence[float], name: str | None) -> Adapter:
    first = adapters[0].plan
    for adapter in adapters[1:]:
        other, groups = adapter.plan, list(zip(first.groups, adapter.plan.groups, strict=False))
        renamed = tuple(
            dataclasses.replace(b, name=a.name) for a, b in zip(first.placements, other.placements, strict=False)
        )
        alike = len(other.placements) == len(first.placements) and renamed == first.placements
        if not alike or any((a.site, a.layers) != (b.site, b.layers) for a, b in groups):
            raise UserError(
                "the mean of parameters is for adapters of one plan: the same methods, settings and places, but for "
                "the name; combine other ones by their updates, with how='cat' or how='svd'"
            )
    flats = [flatten(adapter.params) for adapter in adapters]
    paths = [list(adapter.plan.leaves()) for adapter in adapters]
    mean = {
        path: sum(w * flat[own[number]] for w, flat, own in zip(weights, flats, paths, strict=True))
        for number, path in enumerate(paths[0])
    }
    if name is None:
        return Adapter(first, unflatten(mean))
    plan = place([dataclasses.replace(first.placements[0], name=name)], tower_shapes(first))
    return Adapter(plan, {name: next(iter(unflatten(mean).values()))})


def _kernel(flat: Mapping[str, jax.Array] | None, occupant: Occupant) -> np.ndarray:
    if flat is None:
        raise UserError(
            f"{occupant} is DoRA, whose update depends on the frozen weights; give the backbone's parameters too"
        )
    (name,) = map_names(occupant)
    return read_map(flat, name, occupant.place.layer, [occupant]).kernel
