"""Adapters place by place: what each layer of each slot has, taken out of the stacks and put back into them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.adapters import Placement, Plan, place
from vla_jax.adapters.base import Method
from vla_jax.adapters.plan import Group
from vla_jax.errors import UserError, unknown
from vla_jax.names import Tree, flatten, unflatten
from vla_jax.slots import Site, TowerShape


class Adapter(NamedTuple):
    """Trained adapters and where they belong; what every function of this package takes and gives.

    ``adapter.plan.bind(adapter.params)`` is what a backbone takes.

    Attributes:
        plan: the places.
        params: the tree below ``adapters/``.
    """

    plan: Plan
    params: Tree


class Place(NamedTuple):
    """One layer of one slot, as one placement of a plan serves it; ``layer`` is 0 where a slot exists once a tower."""

    placement: int
    tower: str
    slot: str
    layer: int

    def __str__(self) -> str:
        return f"{self.tower}/{self.slot}/{self.layer}"


class Occupant(NamedTuple):
    """What one placement has at one place.

    Attributes:
        adapter: the placement's name.
        place: where.
        site: the same, as the method knows it.
        method: what sits there.
        leaves: its parameters by their names within the module, in float64.
    """

    adapter: str
    place: Place
    site: Site
    method: Method
    leaves: dict[str, np.ndarray]

    def __str__(self) -> str:
        return f"adapter {self.adapter!r} ({self.method.kind}) at {self.place}"


def occupants(adapter: Adapter) -> dict[Place, Occupant]:
    """Every place with what sits there, in the order in which the occupants of one slot act.

    Raises:
        UserError: if the parameters are not the plan's, or are stacked over tasks.
    """
    flat = {path: np.asarray(leaf, np.float64) for path, leaf in _checked(adapter).items()}
    numbers = {placement.name: number for number, placement in enumerate(adapter.plan.placements)}
    found = {}
    for group in adapter.plan.groups:
        if group.tasks:
            tasks = adapter.plan.placements[numbers[group.path[0]]].tasks
            raise UserError(
                f"adapter {group.path[0]!r} has weights for {len(tasks)} tasks; name the one that is meant, of "
                f"{', '.join(tasks)}"
            )
        for column, layers in enumerate(zip(*group.layers, strict=True)):
            at = Place(numbers[group.path[0]], group.site.tower, group.site.slot, layers[0])
            leaves = {leaf.name: flat[leaf.path][column if leaf.by_layer else ()] for leaf in group.leaves}
            found[at] = Occupant(group.path[0], at, group.site, group.method, leaves)
    return found


def select_task(adapter: Adapter, task: str) -> Adapter:
    """One task's adapter: its weights out of those stacked over tasks, and what the tasks share.

    Raises:
        UserError: if nothing is stacked over tasks, an adapter that is has no task of this name, or the parameters are
            not the plan's.
    """
    index = {}
    for placement in adapter.plan.placements:
        if placement.tasks and task not in placement.tasks:
            raise unknown(f"task of adapter {placement.name!r}", task, placement.tasks)
        if placement.tasks:
            index[placement.name] = placement.tasks.index(task)
    if not index:
        raise UserError(f"no adapter has weights of its own for task {task!r}; leave the task out")
    leaves = adapter.plan.leaves()
    chosen = {
        path: value if (axis := leaves[path].task_axis) is None else jnp.take(value, index[path.split("/")[0]], axis)
        for path, value in _checked(adapter).items()
    }
    return Adapter(adapter.plan.single(), unflatten(chosen))


def _checked(adapter: Adapter) -> dict[str, jax.Array]:
    """The parameters by name, once it is sure that they are the plan's."""
    flat, known = flatten(adapter.params), adapter.plan.leaves()
    for path in (*flat, *known):
        if path not in flat or path not in known:
            raise UserError(f"plan and parameters of an adapter differ in {path!r}; give those of one checkpoint")
    return flat


def of_one_task(adapter: Adapter, task: str | None) -> Adapter:
    """The adapter of a task, or the adapter itself for no task."""
    adapter = Adapter(*adapter)
    return adapter if task is None else select_task(adapter, task)


def assemble(
    placements: Sequence[Placement],
    towers: Mapping[str, TowerShape],
    leaves_at: Callable[[Group, Place], Mapping[str, np.ndarray]],
) -> Adapter:
    """An adapter of these placements whose parameters are made place by place.

    Args:
        placements: where it belongs.
        towers: the backbone's.
        leaves_at: one layer's parameters by their names within the module. Of a parameter that places share, the
            first place's is taken.
    """
    plan = place(placements, towers)
    numbers = {placement.name: number for number, placement in enumerate(placements)}
    flat: dict[str, jax.Array] = {}
    for group in plan.groups:
        number = numbers[group.path[0]]
        made = [leaves_at(group, Place(number, group.site.tower, group.site.slot, k)) for k in group.layers[0]]
        for leaf in group.leaves:
            if leaf.path not in flat:
                value = np.stack([own[leaf.name] for own in made]) if leaf.by_layer else made[0][leaf.name]
                flat[leaf.path] = jnp.asarray(value, jnp.float32)
    return Adapter(plan, unflatten(flat))


def tower_shapes(plan: Plan) -> dict[str, TowerShape]:
    """The towers that a plan was made for, as far as its placements meet them.

    The MLP's width is the stream's where no adapter sits in an MLP; no placement of the plan then depends on it.
    """
    shapes = {}
    for tower, depth in plan.depths:
        streams = [dict(group.site.streams)[tower] for group in plan.groups]
        hidden = [
            max(group.site.widths)
            for group in plan.groups
            if group.site.tower == tower and group.site.slot in ("mlp_fc1", "mlp_hidden", "mlp_fc2")
        ]
        features = next((group.site.features for group in plan.groups), None)
        shapes[tower] = TowerShape(depth, streams[0], hidden[0] if hidden else streams[0], features)
    return shapes
