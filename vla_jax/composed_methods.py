"""Methods of the catalogue put together, by a name that says how.

    lora+pfeiffer                 both, each in slots of its own
    stack:houlsby:compacter       one after the other in the same places
    parallel:pfeiffer:parallel    side by side in the same places, what they change added up
    average:pfeiffer:parallel     the same, with the mean of what they change
    lora+stack:houlsby:phm        both

See :mod:`vla_jax.adapters.composition`. ``Split`` needs ranges of tokens, and ``Fuse`` has two stages of training
(``--experiment=multitask``); both are to be had in Python.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from vla_jax.adapters import Average, Parallel, Placement, Stack
from vla_jax.adapters.composite import Composite
from vla_jax.backbones.clip_config import CLIPConfig
from vla_jax.errors import UserError, unknown

if TYPE_CHECKING:
    from vla_jax.catalogue import Entry

COMPOSITIONS: Mapping[str, type[Composite]] = MappingProxyType(
    {"stack": Stack, "parallel": Parallel, "average": Average}
)


def is_composed(name: str) -> bool:
    """Whether a name puts several methods together."""
    return "+" in name or ":" in name


def composed(name: str, entry: Callable[[str], Entry]) -> Entry:
    """Several methods as one.

    Args:
        name: as the module's docstring shows.
        entry: finds a method by its name.

    Raises:
        UserError: for an unknown method or composition, or methods that cannot be put together.
    """
    parts = name.split("+")
    if len(parts) > 1:
        entries = {part: entry(part) for part in parts}
        if len(entries) < len(parts):
            raise UserError(f"{name!r} names a method twice; leave one of them out")
        return _joined(
            entries, " + ".join(part.title for part in entries.values()), lambda config: _together(entries, config)
        )
    kind, *members = name.split(":")
    if kind not in COMPOSITIONS:
        raise unknown("composition", kind, COMPOSITIONS, "Write COMPOSITION:METHOD:METHOD, or METHOD+METHOD.")
    if len(members) < 2 or len(set(members)) < len(members):
        raise UserError(f"{name!r} needs at least two different methods, as in {kind}:pfeiffer:parallel")
    entries = {member: entry(member) for member in members}
    title = f"{kind} of {', '.join(member.title for member in entries.values())}"
    return _joined(entries, title, lambda config: (_composition(kind, entries, config),))


def _joined(
    entries: Mapping[str, Entry], title: str, placements: Callable[[CLIPConfig], tuple[Placement, ...]]
) -> Entry:
    for name, known in entries.items():
        if known.rules != "adapters" or known.robust_drop:
            trains = "drops layers in training" if known.robust_drop else f"trains by the rules {known.rules!r}"
            raise UserError(
                f"{name} {trains}, which other methods do not; put together methods that add adapters alone"
            )
    paces = {known.pace for known in entries.values()}
    first = next(iter(entries.values()))
    return dataclasses.replace(
        first,
        title=title,
        family="composition",
        placements=placements,
        pace=paces.pop() if len(paces) == 1 else "adapters",
    )


def _together(entries: Mapping[str, Entry], config: CLIPConfig) -> tuple[Placement, ...]:
    """All placements, named apart."""
    found = [placement for known in entries.values() for placement in known.placements(config)]
    names = [placement.name for placement in found]
    return tuple(
        dataclasses.replace(placement, name=f"{placement.name}_{names[:place].count(placement.name) + 1}")
        if placement.name in names[:place]
        else placement
        for place, placement in enumerate(found)
    )


def _composition(kind: str, entries: Mapping[str, Entry], config: CLIPConfig) -> Placement:
    """One placement of a method that is made of all of them."""
    found = {name: known.placements(config) for name, known in entries.items()}
    several = [name for name, placements in found.items() if len(placements) > 1]
    if several:
        raise UserError(f"{several[0]} has several placements, which {kind} cannot take; write METHOD+METHOD instead")
    members = {name: placements[0] for name, placements in found.items()}
    (first, one), *others = members.items()
    for name, other in others:
        if other.slots != one.slots:
            raise UserError(
                f"{first} sits in {', '.join(one.slots)} and {name} in {', '.join(other.slots)}, but {kind} puts "
                f"methods in the same places; write {first}+{name}, or choose others"
            )
        if dataclasses.replace(other, method=one.method, name=one.name) != one:
            raise UserError(
                f"{first} and {name} are placed otherwise (layers, towers, ranks or what they share); {kind} "
                f"puts methods in the same places; write {first}+{name}, or choose others"
            )
    children = tuple((name, placement.method) for name, placement in members.items())
    return dataclasses.replace(one, method=COMPOSITIONS[kind](children), name=kind)
