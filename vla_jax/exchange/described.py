"""Placements as a checkpoint describes them: every type, size and pattern looked at, since somebody else wrote them."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
import types
import typing
from collections.abc import Mapping
from typing import Any

from vla_jax import patterns
from vla_jax.adapters import Placement, Plan, place
from vla_jax.errors import UserError
from vla_jax.foreign import shown
from vla_jax.slots import TowerShape

MOST_SHAPES = 1024
"""Stacks of weights that differ in place, method or rank: each is traced, in some milliseconds."""

MOST_SECONDS = 5.0
"""Of computing, after which no further placement is looked at; a large model's takes one."""

MOST_ENTRIES = 10_000
"""Of a list: places of a large model, each with a rank of its own."""

_MOST_NUMBER = 1 << 20  # a width, a rank, a number of tokens
_LONGEST_TEXT = 1 << 15


def planned(described: Any, towers: Mapping[str, TowerShape]) -> Plan:
    """The plan of placements that :meth:`vla_jax.adapters.Plan.describe` described.

    Args:
        described: the list of placements as JSON gives it.
        towers: the towers that they belong to.

    Raises:
        UserError: a placement cannot be read, cannot be, or is too large.
    """
    if not isinstance(described, list) or not all(isinstance(one, dict) for one in described):
        raise UserError(f"the placements of a checkpoint are a list of objects, got {shown(described)}")
    _check_sizes(described)
    try:
        with patterns.limited():
            placements = [Placement.from_description(one) for one in described]
            for one, placement in zip(described, placements, strict=True):
                if problem := _problem(placement, "placement"):
                    raise UserError(f"the placement {shown(one.get('name'))} cannot be read: {problem}")
            deepest = max((shape.depth for shape in towers.values()), default=1)
            shapes = sum(_shapes(placement, deepest) for placement in placements)
            if shapes > MOST_SHAPES:
                raise UserError(f"the placements ask for {shapes:,} stacks of weights; {MOST_SHAPES:,} are the most")
            started = time.thread_time()
            for placement in placements:  # what is traced for one is there for all of them together
                place(placement, towers)
                if time.thread_time() - started > MOST_SECONDS:
                    raise UserError(f"the placements take over {MOST_SECONDS:.0f} seconds to be laid out; give fewer")
            return place(placements, towers)
    except UserError:
        raise
    except Exception as error:  # what is of a wrong type is met where it is used
        raise UserError(f"the placements of the checkpoint cannot be read: {error!r}; write it again") from error


def _check_sizes(described: list[Any]) -> None:
    """Refuses long lists and texts and large numbers, wherever they stand."""
    left, methods = [described], 0
    while left:
        value = left.pop()
        methods += isinstance(value, dict) and "kind" in value
        if methods > MOST_SHAPES:
            raise UserError(f"the placements have over {MOST_SHAPES:,} methods, each within another or beside it")
        if isinstance(value, list | dict):
            if len(value) > MOST_ENTRIES:
                raise UserError(f"a list of {len(value):,} entries in the placements; {MOST_ENTRIES:,} are the most")
            left += value.values() if isinstance(value, dict) else value
        elif isinstance(value, str) and len(value) > _LONGEST_TEXT:
            raise UserError(f"a text of {len(value):,} characters in the placements: {shown(value)}")
        elif isinstance(value, int | float) and not abs(value) <= _MOST_NUMBER:
            raise UserError(f"a number in the placements is {shown(value)}; at most {_MOST_NUMBER:,}")


def _problem(value: Any, name: str) -> str:
    """What in a dataclass is not of the type that its field has; empty if nothing is."""
    hints = _hints(type(value))
    for field in dataclasses.fields(value):
        own = getattr(value, field.name)
        if not _fits(own, hints[field.name]):
            return f"{name}.{field.name} is {shown(own)}"
        if dataclasses.is_dataclass(own) and (problem := _problem(own, f"{name}.{field.name}")):
            return problem
        for position, inner in enumerate(own if isinstance(own, tuple) else ()):
            for part in inner if isinstance(inner, tuple) else (inner,):
                if dataclasses.is_dataclass(part) and (problem := _problem(part, f"{name}.{field.name}.{position}")):
                    return problem
    return ""


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is typing.Literal:
        return isinstance(value, str | int) and value in arguments
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is tuple:
        if not isinstance(value, tuple | list):
            return False
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        return len(value) == len(kinds) and all(map(_fits, value, kinds))
    return not isinstance(origin or hint, type) or isinstance(value, origin or hint)


def _shapes(placement: Placement, depth: int) -> int:
    """How many stacks of weights a placement may have at most, each child of a composition counted."""
    ranks, alphas = (len({value for _, value in table}) + 1 for table in (placement.ranks, placement.alphas))
    return len(placement.towers) * len(placement.slots) * min(ranks * alphas, depth) * _methods(placement.method)


def _methods(method: Any) -> int:
    return 1 + sum(_methods(child) for _, child in getattr(method, "children", ()))
