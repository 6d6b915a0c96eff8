"""Adapters merged into the weights of a backbone, and taken out again.

A merged backbone is a plain one: it runs as fast, and :func:`vla_jax.backbones.export.export_backbone` writes it for
``transformers``. Sums are made in float64 on the host and rounded to float32. Where the backbone is kept in fewer bits,
the merged weights are rounded to them, which can lose most of a small update; how much is measured and returned.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.adapters import Affine
from vla_jax.algebra.places import Adapter, Occupant, occupants, of_one_task
from vla_jax.algebra.updates import (
    Update,
    apply_update,
    check_linear,
    is_at_input,
    is_decomposed,
    map_names,
    norms_of,
    read_map,
    undo_update,
    update_of,
)
from vla_jax.errors import UserError
from vla_jax.names import Tree, flatten, unflatten
from vla_jax.slots import SLOTS, LinearWeights


class Rounding(NamedTuple):
    """What rounding to the backbone's dtype did to one merged parameter.

    Attributes:
        weight: the norm of the rounding error over that of the merged parameter.
        update: the same over the norm of what merging added; one is an update lost altogether.
    """

    weight: float
    update: float


class Merged(NamedTuple):
    """A backbone with adapters in its weights.

    Attributes:
        params: the tree below ``backbone/``.
        rounding: by parameter, what rounding did; zero where the parameter is kept in float32.
        dtypes: by parameter, the dtype that it had before.
        norms: by ``adapter/tower/slot/layer``, the norms of DoRA's updated columns, without which it cannot be taken
            out again.
    """

    params: Tree
    rounding: Mapping[str, Rounding] = MappingProxyType({})
    dtypes: Mapping[str, Any] = MappingProxyType({})
    norms: Mapping[str, np.ndarray] = MappingProxyType({})


def merge(backbone: Tree, adapter: Adapter, *, task: str | None = None, keep_float32: bool = False) -> Merged:
    """Puts adapters into the weights of the linear maps that they sit at.

    LoRA, rsLoRA, PiSSA and DoRA are changes of such weights, and so are affine adapters at either end of a linear map,
    such as (IA)^3. Several adapters at one map are merged in the order in which they act.

    Args:
        backbone: the tree below ``backbone/``.
        adapter: what to merge.
        task: which task's weights, where adapters are stacked over tasks.
        keep_float32: keeps merged parameters in float32, whatever the backbone's dtype.

    Returns:
        The merged backbone; parameters that nothing was merged into are those of ``backbone``.

    Raises:
        UserError: for an adapter that is no change of linear maps' weights, another backbone than the adapter's, or a
            missing or unknown task.
    """
    flat = flatten(backbone)
    new, norms = {}, {}
    for name, by_layer in _by_map(of_one_task(adapter, task)).items():
        changed = {}
        for layer, own in by_layer.items():
            weights = frozen = read_map(flat, name, layer, own)
            for occupant in own:
                if is_decomposed(occupant):
                    norms[_key(occupant)] = norms_of(occupant, frozen.kernel)
                weights = apply_update(update_of(occupant, norms.get(_key(occupant))), weights, is_at_input(occupant))
            changed[layer] = weights
        new |= _stacked(flat, name, changed)
    rounding, kept = {}, {}
    for name, exact in new.items():
        kept[name] = exact if keep_float32 else exact.astype(flat[name].dtype)
        rounding[name] = _rounding(flat[name], exact, kept[name])
    dtypes = {name: jnp.dtype(flat[name].dtype) for name in new}
    return Merged(unflatten(flat | _placed_as(kept, flat)), rounding, dtypes, norms)


def unmerge(merged: Merged, adapter: Adapter, *, task: str | None = None) -> dict[str, Any]:
    """Takes adapters out of the weights that :func:`merge` put them into.

    In float32 what comes back is the backbone to rounding; from fewer bits, to the error that rounding the merged
    weights made, unless they were kept in float32. ``Merged(params)`` is enough for a merged backbone from elsewhere,
    unless DoRA is in it.

    Args:
        merged: the merged backbone.
        adapter: what was merged.
        task: which task's weights were.

    Returns:
        The tree below ``backbone/``, in the dtypes it had before.

    Raises:
        UserError: where :func:`merge` would, for DoRA without its norms, or for a scale of zero, which leaves nothing
            to take the adapter out of.
    """
    flat = flatten(merged.params)
    new = {}
    for name, by_layer in _by_map(of_one_task(adapter, task)).items():
        changed = {}
        for layer, own in by_layer.items():
            weights = read_map(flat, name, layer, own)
            for occupant in reversed(own):
                update = update_of(occupant, _known_norms(merged, occupant))
                _check_gain(occupant, update)
                weights = undo_update(update, weights, is_at_input(occupant))
            changed[layer] = weights
        new |= _stacked(flat, name, changed)
    dtypes = {name: merged.dtypes.get(name, flat[name].dtype) for name in new}
    return unflatten(flat | _placed_as({name: leaf.astype(dtypes[name]) for name, leaf in new.items()}, flat))


def _key(occupant: Occupant) -> str:
    return f"{occupant.adapter}/{occupant.place}"


def _known_norms(merged: Merged, occupant: Occupant) -> np.ndarray | None:
    norms = merged.norms.get(_key(occupant))
    if is_decomposed(occupant) and norms is None:
        raise UserError(
            f"{occupant} set the norms of the columns it was merged into, and what they were is not known; unmerge "
            "what merge returned, or keep the backbone"
        )
    return norms


def _by_map(adapter: Adapter) -> dict[str, dict[int, list[Occupant]]]:
    """By linear map and layer, the occupants to merge, in order.

    What sits at a map's output comes first, as it acts; then what sits at its input, last one first, since the map
    takes in its nearest neighbour before those further away.
    """
    found: dict[str, dict[int, list[Occupant]]] = {}
    for occupant in occupants(adapter).values():
        check_linear(occupant)
        for name in map_names(occupant):
            found.setdefault(name, {}).setdefault(occupant.place.layer, []).append(occupant)
    for by_layer in found.values():
        for layer, own in by_layer.items():
            own.sort(key=lambda occupant: SLOTS.index(occupant.place.slot))
            inputs = [occupant for occupant in own if is_at_input(occupant)]
            outputs = [occupant for occupant in own if not is_at_input(occupant)]
            _check_order(outputs)
            by_layer[layer] = outputs + inputs[::-1]
    return found


def _check_order(outputs: list[Occupant]) -> None:
    for number, occupant in enumerate(outputs):
        before = next((other for other in outputs[:number] if isinstance(other.method, Affine)), None)
        if is_decomposed(occupant) and before is not None:
            raise UserError(
                f"{occupant} rescales what {before} made of the map, all but the frozen bias, which is then no longer "
                "the map's; place DoRA first"
            )


def _stacked(flat: Mapping[str, Any], name: str, layers: Mapping[int, LinearWeights]) -> dict[str, np.ndarray]:
    """A map's parameters in float32 with some of its layers replaced."""
    new = {}
    for part in LinearWeights._fields:
        if f"{name}/{part}" not in flat:
            continue
        whole = np.array(flat[f"{name}/{part}"], np.float32)
        for layer, weights in layers.items():
            whole[layer if "/blocks/" in name else ()] = getattr(weights, part)
        new[f"{name}/{part}"] = whole
    return new


def _placed_as(new: Mapping[str, np.ndarray], old: Mapping[str, Any]) -> dict[str, jax.Array]:
    """New parameters on the devices where the old ones are."""
    shardings = {name: getattr(old[name], "sharding", None) for name in new}
    return {name: jax.device_put(value, shardings[name]) for name, value in new.items()}


def _rounding(before: Any, exact: np.ndarray, kept: np.ndarray) -> Rounding:
    error, update = (np.linalg.norm(np.asarray(a, np.float32) - exact) for a in (kept, before))
    return Rounding(*(float(error / size) if size > 0 else 0.0 for size in (np.linalg.norm(exact), update)))


def _check_gain(occupant: Occupant, update: Update) -> None:
    zeros = int(np.sum(update.gain == 0))
    if zeros:
        raise UserError(
            f"{occupant} scales {zeros} channels by zero, so that their weights are no longer in the merged ones; keep "
            "the backbone"
        )
