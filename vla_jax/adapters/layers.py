"""Which layers: a small notation for configurations, the same for every tower and for pairs of blocks.

all                 every layer
early, late         the lower and the upper half (the middle layer of an odd number belongs to the upper one)
first 4, last 4     that many from either end
every 2nd           counted so that the last layer is among them
3   0,5,7   -1      single layers, negative ones from the end
2:8   ::3           slices, as Python's
"""

from __future__ import annotations

import re

from vla_jax.errors import UserError

NOTATION = "all, early, late, 'first 4', 'last 4', 'every 2nd', single layers such as 0,5,-1, or slices such as 2:8"


def layers(notation: str, depth: int, where: str) -> tuple[int, ...]:
    """The layers that a notation names, ascending.

    Args:
        notation: see the module's text; parts joined by commas add up.
        depth: how many layers there are.
        where: what has these layers, for messages.

    Raises:
        UserError: for a layer that does not exist, a part that cannot be read, or a notation that names none.
    """
    chosen: set[int] = set()
    for part in notation.split(","):
        chosen |= set(_part(part.strip(), depth, where))
    if not chosen:
        raise UserError(f"layers {notation!r} name none of the {depth} layers of {where}; allowed: {NOTATION}")
    return tuple(sorted(chosen))


def _part(part: str, depth: int, where: str) -> range:
    every = range(depth)
    if part in ("all", "early", "late"):
        return {"all": every, "early": every[: depth // 2], "late": every[depth // 2 :]}[part]
    if match := re.fullmatch(r"(first|last) (\d+)", part):
        count = int(match[2])
        if count > depth:
            raise UserError(f"layers {part!r} ask for {count} of the {depth} layers of {where}")
        return every[:count] if match[1] == "first" else every[depth - count :]
    if match := re.fullmatch(r"every (\d+)(?:st|nd|rd|th)", part):
        step = int(match[1])
        if step < 1:
            raise UserError(f"layers {part!r}: the step must be at least 1")
        return every[(depth - 1) % step :: step] if step <= depth else range(0)
    if re.fullmatch(r"-?\d+", part):
        layer = int(part)
        if not -depth <= layer < depth:
            raise UserError(
                f"layer {layer} does not exist: {where} has {depth} layers, 0 to {depth - 1} (or -{depth} to -1)"
            )
        return range(layer % depth, layer % depth + 1)
    if re.fullmatch(r"(-?\d+)?:(-?\d+)?(:[1-9]\d*)?", part):
        bounds = [int(b) if b else None for b in part.split(":")]
        beyond = [b for b in bounds[:2] if b is not None and abs(b) > depth]
        if beyond:
            raise UserError(f"layers {part!r} reach beyond {where}, which has {depth} layers, 0 to {depth - 1}")
        return every[slice(*bounds)]
    raise UserError(f"layers {part!r} cannot be read; allowed: {NOTATION}")
