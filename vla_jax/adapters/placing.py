"""Placements resolved against a backbone's towers to a plan; everything that does not fit is refused here."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from vla_jax import patterns
from vla_jax.adapters.base import Method, Sized
from vla_jax.adapters.layers import layers
from vla_jax.adapters.placement import Placement
from vla_jax.adapters.plan import Group, Leaf, Plan, leaf_shapes
from vla_jax.errors import UserError, unknown
from vla_jax.slots import SINGLE_SLOTS, Site, TowerShape


def place(placements: Placement | Sequence[Placement], towers: Mapping[str, TowerShape]) -> Plan:
    """Resolves placements against a backbone's towers.

    Args:
        placements: one or several; where several occupy one slot, they act in this order.
        towers: by name, each tower's depth and widths (``CLIPConfig.towers``).

    Raises:
        UserError: for a tower or a layer that does not exist, two adapters of one name, parameters shared by places
            that need them of different shapes, pairs of blocks that cross, or a pattern that matches no site.
    """
    placements = (placements,) if isinstance(placements, Placement) else tuple(placements)
    names = [placement.name for placement in placements]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two adapters are named {name!r}; give each placement a name of its own")
    groups = tuple(
        kept
        for placement in placements
        for group in _groups(placement, towers)
        if (kept := group.above(checked_dropped(placement.dropped, towers)))
    )
    _check_order([pair for g in groups if g.method.joint for pair in zip(*g.layers, strict=True)])
    check_shared(groups)
    _check_prompts(groups)
    return Plan(placements, groups, tuple((name, shape.depth) for name, shape in towers.items()))


def _check_order(pairs: Sequence[tuple[int, int]]) -> None:
    """Refuses pairs of several placements of which each would have to be reached before the other."""
    for before, after in itertools.pairwise(sorted(pairs)):
        if after[1] < before[1]:
            raise UserError(
                f"the pairs of blocks (vision, text) {before} and {after} cross, so that neither can be reached first; "
                "choose pairs that ascend in both towers"
            )


def checked_dropped(
    dropped: Sequence[tuple[str, int]], towers: Mapping[str, TowerShape] | Mapping[str, int]
) -> dict[str, int]:
    """By tower, of how many of its first blocks adapters are left out.

    Raises:
        UserError: for a tower that does not exist, or more blocks than it has.
    """
    for tower, count in dropped:
        if tower not in towers:
            raise unknown("tower", tower, towers)
        depth = getattr(towers[tower], "depth", towers[tower])
        if not 0 <= count <= depth:
            raise UserError(f"adapters of {count} layers of the {tower} tower cannot be dropped; it has {depth}")
    return dict(dropped)


def check_shared(groups: Sequence[Group]) -> None:
    """Refuses parameters that are shared by places which need them of different shapes."""
    owners: dict[str, tuple[Group, Leaf]] = {}
    for group in groups:
        for leaf in group.leaves:
            first, known = owners.setdefault(leaf.path, (group, leaf))
            sites = [f"{owner.site.tower}/{owner.site.slot}" for owner in (first, group)]
            shapes = [leaf_shapes(owner.method, owner.site)[own.name] for owner, own in ((first, known), (group, leaf))]
            shared = f"{leaf.path!r} is shared by {sites[0]} and {sites[1]}, which"
            if leaf.by_layer and first.depth != group.depth:
                raise UserError(
                    f"{shared} have {first.depth} and {group.depth} layers with adapters; choose equally many, such as "
                    "'last 4'"
                )
            if shapes[0] != shapes[1]:
                raise UserError(
                    f"{shared} need it as {shapes[0]} and {shapes[1]}; share between places of one width and one rank, "
                    "or give each place weights of its own"
                )


def _check_prompts(groups: Sequence[Group]) -> None:
    """Refuses deep prompts without tokens whose place they take, or with tokens of several adapters."""
    for group in groups:
        if group.site.slot == "prompts":
            tower = group.site.tower
            inserting = [other for other in groups if other.site.slot == "tokens" and other.site.tower == tower]
            if [other.path[0] for other in inserting] != [group.path[0]]:
                names = ", ".join(other.path[0] for other in inserting) or "none"
                raise UserError(
                    f"deep prompts of adapter {group.path[0]!r} replace the tokens that it alone inserts into the "
                    f"{tower} tower; give it the slots tokens and prompts, and no other adapter there the slot tokens "
                    f"(tokens are inserted by: {names})"
                )


def _groups(placement: Placement, towers: Mapping[str, TowerShape]) -> list[Group]:
    for tower in placement.towers:
        if tower not in towers:
            raise unknown("tower", tower, towers)
    if placement.method.joint:
        served = [("joint", _pairs(placement, towers))]
    else:
        served = [
            (tower, (layers(placement.layers, towers[tower].depth, f"the {tower} tower"),))
            for tower in placement.towers
        ]
    groups, unused = [], {pattern for pattern, _ in (*placement.ranks, *placement.alphas)}
    sites = []
    for tower, chosen in served:
        for slot in placement.slots:
            by_method: dict[Method, list[tuple[int, ...]]] = {}
            for column in zip(*_at_slot(slot, chosen), strict=True):
                sites.append(f"{tower}/{slot}/{column[0]}")
                unused -= {pattern for pattern in unused if patterns.fullmatch(pattern, sites[-1])}
                by_method.setdefault(placement.method_at(sites[-1]), []).append(column)
            for method, members in by_method.items():
                site = _site(placement, tower, slot, towers)
                method.parameter_counts(site)  # refuses what does not fit, before anything is computed
                # One stack holds one shape; where methods differ, each has a stack, named by its rank.
                part = () if len(by_method) == 1 else (_part(placement, method, site.widths),)
                path = (placement.name, tower, slot, *part)
                leaves = tuple(leaf_at(placement, path, name) for name in leaf_shapes(method, site))
                columns = tuple(zip(*members, strict=True))
                groups.append(Group(path, method, site, columns, len(placement.tasks), leaves))
    if unused:
        raise unknown(
            "pattern of ranks or alphas", sorted(unused)[0], sites, "It must match the whole of a site's name."
        )
    return groups


def leaf_at(placement: Placement, path: tuple[str, ...], name: str) -> Leaf:
    """A parameter of a group: what it is called and stacked over, given what it is shared over."""
    over = placement.shared_over(name)
    adapter, tower, slot, *part = path
    parts = [adapter, "shared" if "towers" in over else tower, *([] if "slots" in over else [slot]), *part, name]
    return Leaf(name, "/".join(parts), "layers" not in over, bool(placement.tasks) and "tasks" not in over)


def _at_slot(slot: str, chosen: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    """The layers of the chosen ones that a slot has."""
    if slot in SINGLE_SLOTS:
        return tuple((0,) for _ in chosen)
    if slot == "prompts":  # the first block meets the tokens as they were inserted
        return tuple(tuple(layer for layer in own if layer > 0) for own in chosen)
    return chosen


def _site(placement: Placement, tower: str, slot: str, towers: Mapping[str, TowerShape]) -> Site:
    streams = tuple((name, shape.width) for name, shape in towers.items())
    features = next((shape.features for shape in towers.values()), None)
    if placement.method.joint:
        depth = min(shape.depth for shape in towers.values())
        return Site(tower, slot, depth, (towers["vision"].width, towers["text"].width), streams, features)
    if placement.method.conditioned and (tower, slot) != ("text", "tokens"):
        raise UserError(
            f"{placement.method.kind} makes text prompts from the image; give towers=('text',) and slots=('tokens',), "
            f"not {tower}/{slot}"
        )
    if slot == "projection" and towers[tower].features is None:
        raise UserError(f"the {tower} tower has no projection for adapter {placement.name!r} to sit at")
    return Site(tower, slot, towers[tower].depth, towers[tower].widths(slot), streams, features)


def _part(placement: Placement, method: Method, widths: tuple[int, int]) -> str:
    """What names a stack where the sites of one slot differ in rank or alpha."""
    rank = method.rank
    if isinstance(method, Sized):
        rank = method.rank_for(min(widths) if method.joint else widths[1])
    return f"rank_{rank}" + (f"_alpha_{method.alpha}" if placement.alphas else "")


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
