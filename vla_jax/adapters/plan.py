"""Placements resolved against a backbone's towers: which parameters there are, how they are stacked and begin."""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vla_jax.adapters.base import Method, Sized
from vla_jax.adapters.binding import BoundAdapters
from vla_jax.adapters.layers import layers
from vla_jax.adapters.placement import Placement
from vla_jax.errors import UserError, unknown
from vla_jax.names import Tree, flatten, unflatten
from vla_jax.slots import TowerShape


class Group(NamedTuple):
    """Parameters of one shape, stacked over the layers they serve.

    Attributes:
        path: the first parts of the parameters' names.
        method: what sits in these layers.
        towers: the towers served; more than one where they share weights, and both for a joint method.
        slot: the slot served.
        layers: by tower, the layers served, ascending; for a joint method the k-th of both towers make a pair.
        widths: of x and y at the slot; for a joint method of the two towers.
        tasks: how many tasks have weights of their own, 0 for weights without a task axis.
    """

    path: tuple[str, ...]
    method: Method
    towers: tuple[str, ...]
    slot: str
    layers: tuple[tuple[int, ...], ...]
    widths: tuple[int, int]
    tasks: int

    @property
    def depth(self) -> int:
        """How many layers the parameters are stacked over."""
        return len(self.layers[0])

    def init(self, key: jax.Array) -> dict[str, Any]:
        """New parameters ``[layers, (tasks,) ...]``."""
        module = self.method.module()
        first, second = (jnp.zeros((1, width)) for width in self.widths)
        example = (first, second, jnp.ones((1,), bool)) if self.method.joint else (first, second)
        if self.slot == "attn_kv":
            example = (first, (second, second))
        lead = (self.depth, self.tasks) if self.tasks else (self.depth,)
        init = lambda k: module.init(k, *example)["params"]  # noqa: E731
        for _ in lead:
            init = jax.vmap(init)
        return init(jax.random.split(jax.random.fold_in(key, zlib.crc32("/".join(self.path).encode())), lead))

    def parameter_count(self) -> int:
        """Parameters of all layers and tasks, from the method's closed formula."""
        return self.method.parameter_count(*self.widths) * self.depth * max(1, self.tasks)


class Plan(NamedTuple):
    """Every group of every placement on one backbone; hashable, so that it is a static part of a compiled program.

    Attributes:
        placements: what was asked for.
        groups: what it comes to, in the order in which adapters of one slot act.
        depths: by tower, how many blocks it has.
    """

    placements: tuple[Placement, ...]
    groups: tuple[Group, ...]
    depths: tuple[tuple[str, int], ...]

    def init(self, key: jax.Array) -> dict[str, Any]:
        """New parameters, the tree that stands below ``adapters/``."""
        flat = {}
        for group in self.groups:
            flat |= flatten(group.init(key), "/".join(group.path))
        return unflatten(flat)

    def bind(self, params: Tree) -> BoundAdapters:
        """Parameters and plan together: what a backbone takes as its ``adapters`` argument."""
        return BoundAdapters(params, self)

    def parameter_count(self) -> int:
        """Parameters of all groups, from the methods' closed formulas."""
        return sum(group.parameter_count() for group in self.groups)

    def first_layers(self) -> dict[str, int]:
        """By tower, how many blocks a forward pass goes through before it meets the first adapter."""
        first = dict(self.depths)
        for group in self.groups:
            for tower, served in zip(group.towers, group.layers, strict=True):
                # A joint meets the stream after its block, every other adapter within it.
                first[tower] = min(first[tower], served[0] + group.method.joint)
        return first

    def describe(self) -> list[dict[str, Any]]:
        """The placements as JSON-able values, for a checkpoint's metadata."""
        return [placement.describe() for placement in self.placements]


def place(placements: Placement | Sequence[Placement], towers: Mapping[str, TowerShape]) -> Plan:
    """Resolves placements against a backbone's towers.

    Args:
        placements: one or several; where several occupy one slot, they act in this order.
        towers: by name, each tower's depth and widths (``CLIPConfig.towers``).

    Raises:
        UserError: for a tower or a layer that does not exist, two adapters of one name, weights tied over towers that
            differ, pairs of blocks that cross, or a rank pattern that matches no site.
    """
    placements = (placements,) if isinstance(placements, Placement) else tuple(placements)
    names = [placement.name for placement in placements]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two adapters are named {name!r}; give each placement a name of its own")
    groups = tuple(group for placement in placements for group in _groups(placement, towers))
    _check_order([pair for g in groups if g.method.joint for pair in zip(*g.layers, strict=True)])
    return Plan(placements, groups, tuple((name, shape.depth) for name, shape in towers.items()))


def _check_order(pairs: Sequence[tuple[int, int]]) -> None:
    """Refuses pairs of several placements of which each would have to be reached before the other."""
    for before, after in itertools.pairwise(sorted(pairs)):
        if after[1] < before[1]:
            raise UserError(
                f"the pairs of blocks (vision, text) {before} and {after} cross, so that neither can be reached first; "
                "choose pairs that ascend in both towers"
            )


def _groups(placement: Placement, towers: Mapping[str, TowerShape]) -> list[Group]:
    for tower in placement.towers:
        if tower not in towers:
            raise unknown("tower", tower, towers)
    if placement.method.joint:
        served = [(("vision", "text"), "joint", _pairs(placement, towers))]
    else:
        own = {tower: layers(placement.layers, towers[tower].depth, f"the {tower} tower") for tower in placement.towers}
        if placement.tied:
            served = [(placement.towers, "shared", tuple(own[tower] for tower in placement.towers))]
        else:
            served = [((tower,), tower, (own[tower],)) for tower in placement.towers]
    groups, unused = [], {pattern for pattern, _ in placement.ranks}
    for names, branch, chosen in served:
        for slot in placement.slots:
            columns = tuple(zip(*_served_by_slot(slot, names, chosen), strict=True))
            by_method: dict[Method, list[tuple[int, ...]]] = {}
            for column in columns:
                site = f"{branch}/{slot}/{column[0]}"
                method = placement.method_at(site)
                unused -= {pattern for pattern in unused if re.fullmatch(pattern, site)}
                by_method.setdefault(method, []).append(column)
            for method, members in by_method.items():
                # One stack holds one shape; where ranks differ, each has a stack, named by its rank.
                widths = _widths(placement, names, slot, towers)
                part = () if len(by_method) == 1 else (f"rank_{_rank(method, widths)}",)
                method.parameter_count(*widths)  # refuses a rank that does not fit, before anything is computed
                path = (placement.name, branch, slot, *part)
                groups.append(
                    Group(path, method, names, slot, tuple(zip(*members, strict=True)), widths, len(placement.tasks))
                )
    if unused:
        sites = [f"{branch}/{slot}/{k}" for _, branch, chosen in served for slot in placement.slots for k in chosen[0]]
        raise unknown("rank pattern", sorted(unused)[0], sites, "A pattern must match the whole of a site's name.")
    return groups


def _served_by_slot(
    slot: str, towers: tuple[str, ...], chosen: tuple[tuple[int, ...], ...]
) -> tuple[tuple[int, ...], ...]:
    if slot == "embed":
        return tuple((0,) for _ in towers)  # one place a tower, before the first block
    lengths = {len(own) for own in chosen}
    if len(lengths) > 1:
        counts = ", ".join(f"{tower}: {len(own)}" for tower, own in zip(towers, chosen, strict=True))
        raise UserError(
            f"tied towers need equally many layers with adapters, got {counts}; try layers such as 'last 4'"
        )
    return chosen


def _pairs(placement: Placement, towers: Mapping[str, TowerShape]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The vision and the text layers of each pair of blocks."""
    if set(placement.towers) != {"vision", "text"}:
        raise UserError(f"{placement.method.kind} joins the vision and the text tower; towers must name both")
    vision, text = towers["vision"].depth, towers["text"].depth
    if placement.pairs:
        for tower, depth, column in zip(
            ("vision", "text"), (vision, text), zip(*placement.pairs, strict=True), strict=True
        ):
            for layer in column:
                if not 0 <= layer < depth:
                    raise UserError(f"pair names {tower} layer {layer}; the {tower} tower has layers 0 to {depth - 1}")
            if list(column) != sorted(set(column)):
                raise UserError(
                    f"pairs must ascend in both towers; the {tower} layers are {', '.join(map(str, column))}"
                )
        pairs = placement.pairs
    else:
        count = min(vision, text)
        # Evenly spread, with the last blocks of both towers paired.
        spread = [(-(-(k + 1) * vision // count) - 1, -(-(k + 1) * text // count) - 1) for k in range(count)]
        pairs = [spread[k] for k in layers(placement.layers, count, "the joined towers")]
    columns = dict(zip(("vision", "text"), zip(*pairs, strict=True), strict=True))
    return tuple(columns[tower] for tower in ("vision", "text"))


def _rank(method: Method, widths: tuple[int, int]) -> int:
    """The rank that a method has at a slot of these widths."""
    return method.rank_for(min(widths) if method.joint else widths[1]) if isinstance(method, Sized) else method.rank


def _widths(
    placement: Placement, names: tuple[str, ...], slot: str, towers: Mapping[str, TowerShape]
) -> tuple[int, int]:
    if placement.method.joint:
        return towers["vision"].width, towers["text"].width
    widths = {tower: towers[tower].widths(slot) for tower in names}
    if len(set(widths.values())) > 1:
        shown = ", ".join(f"{tower} {x} -> {y}" for tower, (x, y) in widths.items())
        raise UserError(f"tied towers must be equally wide at slot {slot!r}, got {shown}; use weights of their own")
    return widths[names[0]]
