"""What a combination is refused for, before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import get_args

from vla_jax.adapters import Affine, LoRA, Placement
from vla_jax.algebra.places import Adapter, Occupant, Place
from vla_jax.algebra.sums import DROPPED, SPARSE, How, Recipe
from vla_jax.algebra.updates import check_linear, is_decomposed, map_names
from vla_jax.errors import UserError, unknown

HOWS: tuple[str, ...] = get_args(How)


def check_recipe(recipe: Recipe, count: int) -> None:
    """Refuses settings that do not go together, for so many adapters."""
    how = recipe.how
    if how not in HOWS:
        raise unknown("way to combine", how, HOWS)
    if not count or count != len(recipe.weights):
        raise UserError(f"give one weight for each adapter, and at least one; got {count} and {len(recipe.weights)}")
    if not all(map(math.isfinite, recipe.weights)):
        raise UserError(f"weights must be finite, got {', '.join(map(str, recipe.weights))}")
    uses = {"rank": how == "svd" or how in SPARSE, "density": how in SPARSE, "key": how in DROPPED}
    for setting, used in uses.items():
        given = getattr(recipe, setting) is not None
        if given and not used:
            raise UserError(f"{how} does not use {setting}; leave it out")
        if used and not given and setting != "rank":
            raise UserError(f"{how} needs {setting}")
    if recipe.rank is not None and recipe.rank < 1:
        raise UserError(f"rank must be at least 1, got {recipe.rank}")
    if recipe.density is not None and not 0 < recipe.density <= 1:
        raise UserError(f"density is the share of entries kept, above 0 and at most 1; got {recipe.density}")
    if how == "parameters" and not math.isclose(sum(recipe.weights), 1.0, abs_tol=1e-6):
        raise UserError(f"a mean of parameters needs weights that add up to one; these add up to {sum(recipe.weights)}")


def check_alike(adapters: Sequence[Adapter], held: Sequence[Mapping[Place, Occupant]]) -> None:
    """Refuses adapters that do not have the same places, or have there what cannot be added."""
    for adapter, places in zip(adapters[1:], held[1:], strict=True):
        for at in (*held[0], *places):
            if at not in places or at not in held[0]:
                raise UserError(f"one adapter sits at {at} and another does not; combine adapters of one plan")
            one, other = held[0][at], places[at]
            same = (one.site, _nature(one)) == (other.site, _nature(other))
            if not same or adapters[0].plan.depths != adapter.plan.depths:
                raise UserError(f"{one} and {other} differ in more than rank and scale; combine adapters of one plan")
        for one, other in zip(adapters[0].plan.placements, adapter.plan.placements, strict=False):
            if (one.sharing, one.tied) != (other.sharing, other.tied):
                raise UserError(f"adapters {one.name!r} and {other.name!r} share their parameters differently")


def _nature(occupant: Occupant) -> object:
    """What adapters must have in common."""
    method = occupant.method
    return ("lora", method.decomposed) if isinstance(method, LoRA) else method


def check_apart(own: Sequence[Occupant]) -> None:
    """Refuses adapters that change what another one of the plan makes of a map, so that their updates do not add up."""
    by_map: dict[tuple[str, int], list[Occupant]] = {}
    for occupant in own:
        check_linear(occupant)
        for name in map_names(occupant):
            by_map.setdefault((name, occupant.place.layer), []).append(occupant)
    for together in by_map.values():
        rescaling = [o for o in together if is_decomposed(o) or isinstance(o.method, Affine)]
        if rescaling and len(together) > 1:
            other = next(occupant for occupant in together if occupant is not rescaling[0])
            raise UserError(
                f"{rescaling[0]} rescales the map that {other} changes too, so that their updates are not a sum of one "
                "each; merge them instead, or combine them one by one"
            )


def check_meaning(recipe: Recipe, placement: Placement, own: Sequence[Occupant]) -> None:
    """Refuses what a combination has no meaning for at one place."""
    first, how = own[0], recipe.how
    if isinstance(first.method, Affine):
        return
    if first.method.decomposed and how not in ("cat", "svd"):
        raise UserError(
            f"{first} is DoRA, whose update is none of its parts, and a sparse update or a sum of parts is no DoRA of "
            f"low rank; {how} has no meaning for it, cat and svd have"
        )
    ranks = [occupant.method.rank for occupant in own]
    pissa = any(occupant.method.from_singular_vectors for occupant in own)
    if how == "linear" and (pissa or len(set(ranks)) > 1):
        what = "start from singular vectors" if pissa else f"have ranks {', '.join(map(str, ranks))}"
        raise UserError(f"linear adds factors one by one, and those of {first} {what}; use cat or svd")
    exact = how == "linear" or (how == "cat" and sum(ranks) <= min(first.site.widths))
    if placement.shared_over("a") != placement.shared_over("b") and not exact:
        raise UserError(
            f"{first} shares some of its factors between places; {how} would find factors of its own for each place. "
            "Use cat, or share all or none"
        )
