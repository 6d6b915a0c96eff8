"""An adapter out of two backbones: the low-rank part of what fine-tuning changed.

The best approximation of a kernel's change by rank r is that of its r largest singular values (Eckart and Young 1936).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from vla_jax.adapters import Affine, LoRA, Placement
from vla_jax.adapters.plan import Group
from vla_jax.algebra.low_rank import nearest_factors
from vla_jax.algebra.merge import merge
from vla_jax.algebra.places import Adapter, Place, assemble
from vla_jax.errors import UserError
from vla_jax.names import Tree, flatten
from vla_jax.slots import LINEAR_MAPS, SINGLE_SLOTS, TowerShape


class Extracted(NamedTuple):
    """What was extracted, and what was not.

    Attributes:
        adapter: the adapter.
        missing: for every parameter in which the backbones differ, the norm of what the adapter lacks of the
            difference over the norm of the difference: near zero where it has all of it, one where it has nothing.
    """

    adapter: Adapter
    missing: dict[str, float]


def extract(
    before: Tree, after: Tree, placements: Placement | Sequence[Placement], towers: Mapping[str, TowerShape]
) -> Extracted:
    """The adapter that, merged into one backbone, comes nearest to another.

    Args:
        before: the tree below ``backbone/`` that the adapter is to sit in.
        after: the one to reproduce, such as the same fine-tuned in full.
        placements: where: LoRA for kernels, ``Affine(scale=False, shift=True)`` for biases.
        towers: by name, the backbone's (``CLIPConfig.towers``).

    Raises:
        UserError: for backbones of different parameters, methods other than these, or weights that are shared or
            stacked over tasks.
    """
    old, new = flatten(before), flatten(after)
    for name in (*old, *new):
        shapes = [None if name not in side else np.shape(side[name]) for side in (old, new)]
        if shapes[0] != shapes[1]:
            raise UserError(f"the two backbones differ in {name!r}, which is {shapes[0]} and {shapes[1]}")
    placements = (placements,) if isinstance(placements, Placement) else tuple(placements)
    for placement in placements:
        _check(placement)

    def leaves_at(group: Group, at: Place) -> dict[str, np.ndarray]:
        part = "kernel" if isinstance(group.method, LoRA) else "bias"
        name = f"{at.tower}/{LINEAR_MAPS[at.slot]}/{part}"
        if name not in old:
            raise UserError(f"adapter {group.path[0]!r} cannot hold a change of {name!r}: there is no such parameter")
        layer = () if at.slot in SINGLE_SLOTS else at.layer
        change = _difference(new[name][layer], old[name][layer])
        if part == "bias":
            return {"shift": change}
        a, b = nearest_factors(change, group.method.rank)
        return {"a": a, "b": b / group.method.scale}

    adapter = assemble(placements, towers, leaves_at)
    merged = flatten(merge(before, adapter, keep_float32=True).params)
    missing = {}
    for name in old:
        size = float(np.linalg.norm(_difference(new[name], old[name])))
        if size:
            missing[name] = float(np.linalg.norm(_difference(new[name], merged[name]))) / size
    return Extracted(adapter, missing)


def _difference(one: jax.Array, other: jax.Array) -> np.ndarray:
    return np.asarray(one, np.float64) - np.asarray(other, np.float64)


def _check(placement: Placement) -> None:
    method = placement.method
    plain = isinstance(method, LoRA) and not method.uses_weights
    bias = isinstance(method, Affine) and not method.scale
    if not plain and not bias:
        raise UserError(
            f"adapter {placement.name!r} ({method.kind}) cannot be extracted; give LoRA for kernels, with its default "
            "init and without magnitudes, and Affine(scale=False, shift=True) for biases"
        )
    for slot in placement.slots:
        if slot not in LINEAR_MAPS:
            raise UserError(f"adapter {placement.name!r} sits at {slot!r}, where no linear map stands to be compared")
    if placement.tasks or placement.tied or any(share.over for share in placement.shares):
        raise UserError(
            f"adapter {placement.name!r} shares weights or stacks them over tasks; every place has a difference of its "
            "own"
        )
