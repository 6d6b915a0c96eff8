"""Between arrays by name, as they are kept, and adapters with a plan, as the rest of the package has them."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from vla_jax.adapters import Placement, Plan
from vla_jax.adapters.base import Method
from vla_jax.adapters.plan import Group, Leaf, leaf_shapes
from vla_jax.algebra.places import Adapter, Place
from vla_jax.algebra.places import assemble as assembled
from vla_jax.errors import UserError, unknown
from vla_jax.exchange.adapter_file import SavedAdapter
from vla_jax.exchange.described import planned
from vla_jax.names import Tree, flatten, unflatten
from vla_jax.slots import SINGLE_SLOTS, SLOTS, TowerShape

_PREFIX = "adapters/"
_TABLES = ("rank", "alpha")


class Occupied(NamedTuple):
    """What is to sit at a place: a method, and its parameters by their names within the module."""

    method: Method
    leaves: Mapping[str, np.ndarray]


def tower_shapes(saved: SavedAdapter) -> dict[str, TowerShape]:
    """The towers that an adapter belongs to."""
    return {name: TowerShape(**shape) for name, shape in saved.towers.items()}


def plan_of(saved: SavedAdapter) -> Plan:
    """The plan of a checkpoint's placements on the towers they were trained on.

    Raises:
        UserError: the configuration has no placements, or one that cannot be.
    """
    described = saved.adapters.get("placements")
    if described is None:
        raise UserError(
            "the checkpoint's configuration has no placements, so that it does not say where its leaves belong; it has "
            + (", ".join(saved.adapters) or "nothing")
        )
    return planned(described, tower_shapes(saved))


def lacks_start(saved: SavedAdapter) -> bool:
    """Whether the backbone has to make parameters that are not trained and no checkpoint keeps: PiSSA's start."""
    if not saved.adapters.get("placements"):
        return False
    leaves = plan_of(saved).leaves()
    return any(is_start(leaf) and f"{_PREFIX}{path}" not in saved.leaves for path, leaf in leaves.items())


def uses_weights(saved: SavedAdapter) -> bool:
    """Whether what an adapter does depends on the frozen weights (DoRA, PiSSA)."""
    return any(group.method.uses_weights for group in plan_of(saved).groups)


def is_start(leaf: Leaf) -> bool:
    """Whether a parameter is stored and not trained: what others of its place started from."""
    return "frozen" in leaf.name.split("/")[:-1]


def adapter_of(saved: SavedAdapter, backbone: Tree | None = None) -> Adapter:
    """The adapters in a checkpoint: their plan on the towers they were trained on, and their parameters.

    Args:
        saved: the checkpoint.
        backbone: the tree below ``backbone/``; needed where :func:`lacks_start` holds.

    Raises:
        UserError: the configuration has no placements, other leaves than they ask for, or the backbone is needed.
    """
    plan = plan_of(saved)
    known = plan.leaves()
    flat = {name.removeprefix(_PREFIX): leaf for name, leaf in saved.leaves.items() if name.startswith(_PREFIX)}
    missing, extra = sorted(known.keys() - flat.keys()), sorted(flat.keys() - known.keys())
    if missing and not extra and all(is_start(known[path]) for path in missing):
        if backbone is None:
            raise UserError(
                f"{missing[0]} is no trained parameter but comes from the backbone's weights; give the backbone"
            )
        start = flatten(plan.init(jax.random.key(0), backbone))
        flat |= {path: np.asarray(start[path]) for path in missing}
    elif missing or extra:
        raise UserError(
            "the checkpoint's placements and leaves do not fit together; missing: "
            f"{', '.join(missing) or 'none'}; extra: {', '.join(extra) or 'none'}"
        )
    shapes = _shapes(plan)
    for path, leaf in flat.items():
        if leaf.shape != shapes[path]:
            raise UserError(
                f"{_PREFIX}{path} has the shape {list(leaf.shape)}, and the checkpoint's placements ask for "
                f"{list(shapes[path])}; they do not belong together"
            )
    return Adapter(plan, unflatten(flat))


def _shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of a plan by its path."""
    found = {}
    for group in plan.groups:
        one = leaf_shapes(group.method, group.site)
        for leaf in group.leaves:
            stacked = ((group.depth,) if leaf.by_layer else ()) + ((group.tasks,) if leaf.by_task else ())
            found[leaf.path] = (*stacked, *one[leaf.name])
    return found


def saved_as(saved: SavedAdapter, adapter: Adapter) -> SavedAdapter:
    """The checkpoint with other adapters in it; heads and trained backbone leaves stay."""
    others = {name: leaf for name, leaf in saved.leaves.items() if not name.startswith(_PREFIX)}
    known = adapter.plan.leaves()
    own = {
        f"{_PREFIX}{path}": np.asarray(leaf)
        for path, leaf in flatten(adapter.params).items()
        if not is_start(known[path])
    }
    described = {**saved.adapters, "placements": adapter.plan.describe()}
    return dataclasses.replace(saved, leaves=own | others, adapters=described)


def chosen(saved: SavedAdapter, only: tuple[str, ...]) -> SavedAdapter:
    """The checkpoint with some of its adapters, by name; all of them if none is named.

    Raises:
        UserError: there is no adapter of a name.
    """
    placements = saved.adapters.get("placements", [])
    names = [placement["name"] for placement in placements]
    for name in only:
        if name not in names:
            raise unknown("adapter", name, names)
    left_out = [f"{_PREFIX}{name}/" for name in names if only and name not in only]
    leaves = {name: leaf for name, leaf in saved.leaves.items() if not name.startswith(tuple(left_out))}
    kept = [placement for placement in placements if not only or placement["name"] in only]
    return dataclasses.replace(saved, leaves=leaves, adapters={**saved.adapters, "placements": kept})


def assemble(places: Mapping[Place, Occupied], towers: Mapping[str, TowerShape], name: str) -> Adapter:
    """An adapter that occupies exactly these places.

    A placement is a product of towers, slots and layers, so places that are no such product become several placements,
    called ``name``, ``name_2``, ... Places that differ in rank or alpha alone share a placement with a table of them.

    Args:
        places: what sits where, all of them of placement 0; methods of one kind, alike but for rank and alpha.
        towers: the backbone's towers.
        name: the adapter's name.
    """
    placements = []
    for chosen_towers, slots, notation in _products(places, towers):
        own = {at: places[at].method for at in places if at.tower in chosen_towers and at.slot in slots}
        method, tables = _tables(own)
        label = name if not placements else f"{name}_{len(placements) + 1}"
        placements.append(Placement(method, label, towers=chosen_towers, slots=slots, layers=notation, **tables))

    def leaves_at(group: Group, at: Place) -> Mapping[str, np.ndarray]:
        del group
        return places[at._replace(placement=0)].leaves

    return assembled(placements, towers, leaves_at)


def _products(
    places: Mapping[Place, Any], towers: Mapping[str, TowerShape]
) -> list[tuple[tuple[str, ...], tuple[str, ...], str]]:
    """The (towers, slots, layers) whose products are the places, no place in two of them."""
    order = list(towers)
    layers = collections.defaultdict(list)
    for at in sorted(places, key=lambda at: (order.index(at.tower), SLOTS.index(at.slot), at.layer)):
        layers[at.tower, at.slot].append(at.layer)
    slots = collections.defaultdict(list)
    for (tower, slot), served in layers.items():
        every = slot in SINGLE_SLOTS or len(served) == towers[tower].depth
        slots[tower, None if every else tuple(served)].append(slot)
    blocks: list[tuple[list[str], tuple[str, ...], list[str]]] = []
    for (tower, served), own in slots.items():
        # Towers of different depths may have the same layers counted from the front or from the end.
        back = None if served is None else [layer - towers[tower].depth for layer in served]
        notations = ["all"] if served is None else [",".join(map(str, counted)) for counted in (served, back)]
        for chosen_towers, chosen_slots, known in blocks:
            if chosen_slots == tuple(own) and (common := [one for one in known if one in notations]):
                chosen_towers.append(tower)
                known[:] = common
                break
        else:
            blocks.append(([tower], tuple(own), notations))
    return [(tuple(chosen_towers), own, notations[0]) for chosen_towers, own, notations in blocks]


def _tables(methods: Mapping[Place, Method]) -> tuple[Method, dict[str, tuple[tuple[str, Any], ...]]]:
    """The method that most places have, and the tables that make those of the others of it."""
    method = collections.Counter(methods.values()).most_common(1)[0][0]
    tables = {}
    for field in _TABLES:
        usual = getattr(method, field, None)
        values = {at: getattr(own, field, None) for at, own in methods.items()}
        if rows := tuple((str(at), value) for at, value in values.items() if value != usual):
            tables[f"{field}s"] = rows
    return method, tables
