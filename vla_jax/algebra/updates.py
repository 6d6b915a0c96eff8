"""What an adapter does to the weights of a linear map; whatever does something else is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from vla_jax.adapters import Affine, LoRA
from vla_jax.algebra.places import Occupant
from vla_jax.errors import UserError
from vla_jax.slots import LINEAR_MAPS, LINEAR_SLOTS, LinearWeights

OUTPUT_MAPS: Mapping[str, str] = MappingProxyType(
    dict(LINEAR_MAPS) | {"attn_sublayer": "blocks/attn/out", "mlp_out": "blocks/mlp/fc2"}
)
"""Slots whose y comes out of one linear map, and the map's name below its tower's parameters."""

INPUT_MAPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "attn_in": ("blocks/attn/q", "blocks/attn/k", "blocks/attn/v"),
        "mlp_in": ("blocks/mlp/fc1",),
        "mlp_hidden": ("blocks/mlp/fc2",),
    }
)
"""Slots whose y enters these linear maps and nothing else."""


class Update(NamedTuple):
    """A change of one layer of a linear map, in float64.

    At the map's output it makes ``gain * kernel + a @ b`` of the kernel and ``bias_gain * bias + shift`` of the bias.
    At its input, the map gets ``gain * x + shift`` instead of x.

    Attributes:
        gain: ``[channels]``, the map's columns; at the input its rows.
        bias_gain: ``[channels]``.
        shift: ``[channels]``.
        a: ``[in, rank]``; None for what has no rank.
        b: ``[rank, out]``, all scales included.
    """

    gain: Float[np.ndarray, " channels"]
    bias_gain: Float[np.ndarray, " channels"]
    shift: Float[np.ndarray, " channels"]
    a: Float[np.ndarray, "in rank"] | None = None
    b: Float[np.ndarray, "rank channels"] | None = None


def check_linear(occupant: Occupant) -> None:
    """Refuses what is not a change of linear maps' weights.

    Raises:
        UserError: naming the adapter, the place and the reason.
    """
    method, slot = occupant.method, occupant.place.slot
    activation = getattr(method, "activation", None)
    if method.joint:
        reason = "it lets the two towers read each other"
    elif activation not in (None, "identity"):
        reason = f"between its maps stands {activation}, which is not linear"
    elif not isinstance(method, LoRA | Affine):
        reason = f"{method.kind} is not known as a change of weights"
    elif slot not in OUTPUT_MAPS and slot not in INPUT_MAPS:
        reason = f"at {slot!r} stands no linear map that could take it in"
    else:
        return
    raise UserError(f"{occupant} cannot be turned into weights: {reason}. LoRA, DoRA and affine adapters can")


def is_at_input(occupant: Occupant) -> bool:
    """Whether it changes what goes into linear maps, not what comes out of one."""
    return occupant.place.slot in INPUT_MAPS


def map_names(occupant: Occupant) -> tuple[str, ...]:
    """The names, within the backbone, of the linear maps that an occupant changes."""
    slot = occupant.place.slot
    names = INPUT_MAPS[slot] if slot in INPUT_MAPS else (OUTPUT_MAPS[slot],)
    return tuple(f"{occupant.place.tower}/{name}" for name in names)


def is_decomposed(occupant: Occupant) -> bool:
    """Whether it is DoRA, whose change of a kernel depends on the kernel."""
    return isinstance(occupant.method, LoRA) and occupant.method.decomposed


def read_map(flat: Mapping[str, Any], name: str, layer: int, own: Sequence[Occupant]) -> LinearWeights:
    """One layer of a linear map in float64, once it is sure that its occupants were made for it.

    Args:
        flat: the backbone's parameters by name.
        name: the map's.
        layer: which; ignored for a map that a tower has once.
        own: what changes it.

    Raises:
        UserError: if there is no such map, one of another shape, or no bias for a shift.
    """
    kernel, bias = flat.get(f"{name}/kernel"), flat.get(f"{name}/bias")
    stacked = "/blocks/" in name
    for occupant in own:
        widths: tuple[int | None, ...] = occupant.site.widths
        if is_at_input(occupant):
            widths = (widths[1], None)
        elif occupant.place.slot not in LINEAR_SLOTS:
            widths = (None, widths[1])
        expected = (occupant.site.depth, *widths) if stacked else widths
        shape = () if kernel is None else np.shape(kernel)
        if len(shape) != len(expected) or any(e not in (None, s) for e, s in zip(expected, shape, strict=True)):
            wanted = ", ".join("any" if size is None else str(size) for size in expected)
            found = "none" if kernel is None else str(list(shape))
            raise UserError(
                f"{occupant} was made for another backbone: it needs '{name}/kernel' of shape [{wanted}], and this one "
                f"has {found}"
            )
        if bias is None and "shift" in occupant.leaves:
            raise UserError(f"{occupant} has a shift, and the map {name!r} has no bias that could take it in")
    at = layer if stacked else ()
    parts = (None if part is None else np.asarray(np.asarray(part)[at], np.float64) for part in (kernel, bias))
    return LinearWeights(*parts)


def norms_of(occupant: Occupant, kernel: Float[np.ndarray, "in out"]) -> Float[np.ndarray, " out"]:
    """The norms that DoRA divides the columns of a frozen kernel by, once that is updated."""
    return column_norms(kernel + np.matmul(*_factors(occupant)))


def column_norms(kernel: Float[np.ndarray, "in out"]) -> Float[np.ndarray, " out"]:
    """The norms of a kernel's columns; a column of zeros has no direction, and stays zero when divided by its norm."""
    return np.maximum(np.linalg.norm(kernel, axis=0), np.finfo(np.float32).tiny)


def update_of(occupant: Occupant, norms: Float[np.ndarray, " out"] | None = None) -> Update:
    """The change that an occupant makes.

    Args:
        occupant: a linear one; see :func:`check_linear`.
        norms: for DoRA, what :func:`norms_of` gave.
    """
    leaves, method, width = occupant.leaves, occupant.method, occupant.site.widths[1]
    if isinstance(method, Affine):
        gain = leaves.get("scale", np.ones(width))
        return Update(gain, gain, leaves.get("shift", np.zeros(width)))
    a, b = _factors(occupant)
    gain = leaves["magnitude"] / norms if method.decomposed else np.ones(width)
    return Update(gain, np.ones(width), np.zeros(width), a, gain * b)


def apply_update(update: Update, weights: LinearWeights, at_input: bool) -> LinearWeights:
    """The changed map."""
    kernel, bias = weights
    if at_input:
        return LinearWeights(update.gain[:, None] * kernel, bias + update.shift @ kernel)
    bias = None if bias is None else update.bias_gain * bias + update.shift
    return LinearWeights(update.gain * kernel + _added(update), bias)


def undo_update(update: Update, weights: LinearWeights, at_input: bool) -> LinearWeights:
    """The map before it was changed; no gain may be zero."""
    kernel, bias = weights
    if at_input:
        kernel = kernel / update.gain[:, None]
        return LinearWeights(kernel, bias - update.shift @ kernel)
    bias = None if bias is None else (bias - update.shift) / update.bias_gain
    return LinearWeights((kernel - _added(update)) / update.gain, bias)


def _added(update: Update) -> Float[np.ndarray, "in out"] | float:
    return 0.0 if update.a is None else update.a @ update.b


def _factors(occupant: Occupant) -> tuple[Float[np.ndarray, "in rank"], Float[np.ndarray, "rank out"]]:
    """LoRA's factors, with its scale in the second, and what PiSSA started from taken off."""
    leaves, method = occupant.leaves, occupant.method
    a, b = leaves["a"], method.scale * leaves["b"]
    if method.from_singular_vectors:
        a = np.concatenate([a, leaves["frozen/a"]], axis=1)
        b = np.concatenate([b, -method.scale * leaves["frozen/b"]], axis=0)
    return a, b
