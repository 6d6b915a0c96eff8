"""Puts adapters that were trained each on its own into one composite, AdapterFusion first of all."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vla_jax.adapters.adapter_fusion import Fuse
from vla_jax.adapters.base import Method, Share
from vla_jax.adapters.composite import Children, Composite, below
from vla_jax.adapters.placement import Placement
from vla_jax.adapters.placing import place
from vla_jax.adapters.plan import Plan
from vla_jax.errors import UserError
from vla_jax.names import Tree, flatten, unflatten
from vla_jax.slots import TowerShape


class _Source(NamedTuple):
    """Where a child comes from: a placement of the trained plan, and which of its tasks; None without tasks."""

    placement: Placement
    task: int | None


def fuse(
    plan: Plan,
    params: Tree,
    towers: Mapping[str, TowerShape],
    key: jax.Array,
    *,
    name: str = "fusion",
    heads: int = 1,
    tasks: tuple[str, ...] = (),
    backbone: Tree | None = None,
) -> tuple[Plan, dict[str, Any]]:
    """Puts trained adapters into an AdapterFusion, the beginning of its second stage; see :func:`compose`."""
    build = functools.partial(Fuse, heads=heads)
    return compose(plan, params, towers, build, key, name=name, tasks=tasks, backbone=backbone)


def compose(
    plan: Plan,
    params: Tree,
    towers: Mapping[str, TowerShape],
    build: Callable[[Children], Composite],
    key: jax.Array,
    *,
    name: str,
    tasks: tuple[str, ...] = (),
    backbone: Tree | None = None,
) -> tuple[Plan, dict[str, Any]]:
    """Puts trained adapters into a composite in their place.

    Args:
        plan: the adapters: placements in the same slots of the same layers. One with tasks gives a child for each of
            them, named after the task (``<placement>.<task>`` where there are several placements); one without gives a
            child of its own name.
        params: their parameters, the tree below ``adapters/``. Of plans that were trained apart,
            ``place([*plan_a.placements, *plan_b.placements], towers)`` and ``merge(params_a, params_b)`` make one.
        towers: what the plan was placed on.
        build: makes the composite of its children, such as :class:`~vla_jax.adapters.composition.Average`.
        key: what parameters of the composite's own are drawn from.
        name: the composite's name as an adapter.
        tasks: names of tasks that each have parameters of the composite's own; the children are shared by them.
        backbone: the tree below ``backbone/``, for children that start from the frozen weights.

    Returns:
        The plan of the composite, and its parameters with the children's as they were trained.

    Raises:
        UserError: where the placements do not have the same places, or sites of one placement differ in rank.
    """
    sources = _sources(plan)
    first = plan.placements[0]
    for placement in plan.placements:
        places = ("towers", "slots", "layers", "pairs", "dropped")
        if differing := [field for field in places if getattr(placement, field) != getattr(first, field)]:
            raise UserError(
                f"adapters {first.name!r} and {placement.name!r} differ in {', '.join(differing)}; only adapters "
                "in the same places can be put into one composite"
            )
        if placement.ranks or placement.alphas:
            raise UserError(
                f"adapter {placement.name!r} has a table of ranks or alphas, and a composite has the same children at "
                "all of its sites; place it without one"
            )
    composite = build(tuple((child, source.placement.method) for child, source in sources.items()))
    composed = place(_placement(composite, name, first, sources, tasks), towers)
    trained, given = {}, flatten(params)
    leaves = {(g.path[0], g.site.tower, g.site.slot, leaf.name): leaf for g in plan.groups for leaf in g.leaves}
    for group in composed.groups:
        for leaf in group.leaves:
            child, _, own = leaf.name.partition("/")
            if child in sources:
                placement, task = sources[child]
                source = leaves[placement.name, group.site.tower, group.site.slot, own]
                value = given[source.path]
                trained[leaf.path] = value if source.task_axis is None else jnp.take(value, task, source.task_axis)

    @jax.jit  # compiled, the children's own beginnings are not computed
    def begun(key: jax.Array, backbone: Tree | None) -> dict[str, jax.Array]:
        return {path: value for path, value in flatten(composed.init(key, backbone)).items() if path not in trained}

    return composed, unflatten(trained | begun(key, backbone))


def _sources(plan: Plan) -> dict[str, _Source]:
    """Where each child comes from, by its name."""
    if not plan.placements:
        raise UserError("the plan has no adapters to put together")
    sources: dict[str, _Source] = {}
    for placement in plan.placements:
        prefix = f"{placement.name}." if len(plan.placements) > 1 else ""
        own = {f"{prefix}{task}": k for k, task in enumerate(placement.tasks)} or {placement.name: None}
        sources |= {name: _Source(placement, task) for name, task in own.items()}
    return sources


def _placement(
    composite: Method, name: str, first: Placement, sources: Mapping[str, _Source], tasks: tuple[str, ...]
) -> Placement:
    """Where the composite goes; its children share what they shared before, over tasks apart."""
    over_tasks = ("tasks",) if tasks else ()
    sharing = []
    for child, source in sources.items():
        tied = {"towers"} if source.placement.tied else set()
        for share in source.placement.shares:
            over = {axis for axis in share.over if axis != "tasks"} | tied
            sharing.append(Share(below(child, share.pattern), (*sorted(over), *over_tasks)))
        if tasks or tied:
            sharing.append(Share(below(child, ".*"), (*sorted(tied), *over_tasks)))
    return Placement(
        composite,
        name,
        first.towers,
        first.slots,
        first.layers,
        first.pairs,
        sharing=tuple(sharing),
        tasks=tasks,
        dropped=first.dropped,
    )
