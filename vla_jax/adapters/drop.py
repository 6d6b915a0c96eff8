"""AdapterDrop (Rücklé et al. 2021): the adapters in the first blocks of every tower are left out.

At inference :func:`drop_layers` takes them out of a plan and its parameters; they are not computed, and a tower runs
bare up to its first adapter. For a plan to bear that, training is made robust: for each batch the number of blocks to
go without is drawn from 0 to a largest one, both included, by
:class:`vla_jax.model.AdaptedModel` with ``robust_drop``. It is an argument of the compiled step, so that one program
serves every number; what is dropped in training is computed all the same and not used.

What sits in a block is dropped with it, an adapter that joins two blocks with either. What a tower has once
(``tokens``, ``embed``, ``side``, ``projection``) belongs to no block and stays.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array, Int

from vla_jax.adapters.placement import Placement
from vla_jax.adapters.placing import check_shared, checked_dropped
from vla_jax.adapters.plan import Plan
from vla_jax.errors import UserError
from vla_jax.names import Tree, flatten, unflatten
from vla_jax.slots import SINGLE_SLOTS


def drop_layers(plan: Plan, params: Tree, count: int | Mapping[str, int]) -> tuple[Plan, dict[str, Any]]:
    """A plan and its parameters without the adapters in the first blocks.

    Args:
        plan: the plan.
        params: the tree below ``adapters/``.
        count: how many blocks of every tower go without, or how many of each; counted from a tower's first block,
            whatever was dropped before.

    Returns:
        The plan, whose placements say what is left out, and the parameters that are left, with the names that they had.

    Raises:
        UserError: for a tower that does not exist, for more blocks than a tower has, or where towers that share
            parameters would keep different numbers of layers.
    """
    depths = dict(plan.depths)
    counts = dict.fromkeys(depths, count) if isinstance(count, int) else dict(count)
    counts = checked_dropped(tuple(counts.items()), depths)
    placements = tuple(_without(placement, counts) for placement in plan.placements)
    groups = tuple(kept for group in plan.groups if (kept := group.above(counts)))
    check_shared(groups)
    given, left = flatten(params), {}
    for group in groups:
        for leaf in group.leaves:
            # Layers ascend, so that those left are the last ones.
            value = given[leaf.path]
            left[leaf.path] = value[len(value) - group.depth :] if leaf.by_layer else value
    return plan._replace(placements=placements, groups=groups), unflatten(left)


def _without(placement: Placement, counts: Mapping[str, int]) -> Placement:
    before = dict(placement.dropped)
    together = {tower: max(before.get(tower, 0), counts.get(tower, 0)) for tower in (*before, *counts)}
    return dataclasses.replace(placement, dropped=tuple((tower, n) for tower, n in together.items() if n))


def check_robust(plan: Plan, most: int) -> None:
    """Refuses a largest number of blocks to drop in training that would leave no adapter to train.

    Args:
        plan: the plan.
        most: how many blocks go without adapters at most.

    Raises:
        UserError: if it is negative, or in batches with that many dropped no adapter is left in any block.
    """
    in_blocks = [group for group in plan.groups if group.site.slot not in SINGLE_SLOTS]
    last = max((layer for group in in_blocks for layer in map(min, zip(*group.layers, strict=True))), default=0)
    if not 0 <= most <= last:
        raise UserError(
            f"robust_drop {most} must be at least 0 and at most {last}, the block of the last adapter counted from 0, "
            "so that one is left to train"
        )


def draw(key: jax.Array, most: int) -> Int[Array, ""]:
    """How many blocks go without adapters in one batch: uniform from 0 to ``most``, both included.

    Args:
        key: the step's key, which may be used for other draws too.
        most: the largest number.
    """
    return jax.random.randint(jax.random.fold_in(key, zlib.crc32(b"AdapterDrop")), (), 0, most + 1)
