"""The algebra of adapters on what is kept: a merged backbone in the hub's format, one checkpoint from several."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from vla_jax.algebra import combine, merge
from vla_jax.algebra.sums import DROPPED
from vla_jax.backbones.export import export_backbone
from vla_jax.backbones.loading import Backbone
from vla_jax.errors import UserError
from vla_jax.exchange.adapter_file import SavedAdapter
from vla_jax.exchange.sites import adapter_of, saved_as
from vla_jax.names import Tree, flatten, unflatten


def export_merged(folder: str | os.PathLike[str], saved: SavedAdapter, backbone: Backbone) -> Path:
    """Writes the backbone with an adapter in its weights, as :func:`vla_jax.backbones.export.export_backbone` does.

    Trained leaves of the backbone stand in the place of its own; heads are left out. The tokenizer and the image
    processor of the backbone's folder travel along.

    Args:
        folder: where to write; made if it does not exist.
        saved: the adapter.
        backbone: the backbone it was trained on, float32.

    Returns:
        The folder.

    Raises:
        UserError: the adapter is not linear in the weights, or the folder cannot be written to.
    """
    prefix = "backbone/"
    trained = {name.removeprefix(prefix): leaf for name, leaf in saved.leaves.items() if name.startswith(prefix)}
    params = unflatten(flatten(backbone.params) | trained)
    if saved.adapters.get("placements"):
        params = merge(params, adapter_of(saved, backbone.params)).params
    try:
        tokenizer = backbone.tokenizer
    except UserError:  # a backbone without one is exported without one
        tokenizer = None
    processor = backbone.image_processor if backbone.folder is not None else None
    return export_backbone(params, backbone.config, folder, tokenizer=tokenizer, image_processor=processor)


def combine_saved(
    several: Sequence[SavedAdapter],
    weights: Sequence[float],
    how: str,
    *,
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    backbone: Tree | None = None,
    heads: bool = True,
) -> SavedAdapter:
    """One checkpoint from several of one backbone; :func:`vla_jax.algebra.combine` says how.

    Args:
        several: what to combine.
        weights: one for each.
        how: one of :data:`vla_jax.algebra.HOWS`.
        rank: of the result, where ``how`` uses it.
        density: the share of entries that are kept, where ``how`` uses it.
        seed: of what DARE drops.
        backbone: the tree below ``backbone/``; needed for DoRA and PiSSA.
        heads: whether the heads of all of them are kept; one that two have differently is then an error.

    Raises:
        UserError: other backbones, trained backbone leaves, heads in conflict, or what the algebra refuses.
    """
    first = several[0]
    kept: dict[str, np.ndarray] = {}
    for one in several:
        if one.fingerprint != first.fingerprint:
            raise UserError(
                f"the adapters were trained on two backbones, {first.backbone!r} with fingerprint {first.fingerprint} "
                f"and {one.backbone!r} with {one.fingerprint}; combine adapters of one backbone"
            )
        for name, leaf in one.leaves.items():
            if name.startswith("backbone/"):
                raise UserError(f"{name} was trained itself, and only adapters are combined; merge them instead")
            if heads and name.startswith("heads/") and not np.array_equal(kept.setdefault(name, leaf), leaf):
                raise UserError(f"two of the adapters have a head {name} of their own; leave heads out (--no-heads)")
    key = jax.random.key(seed) if how in DROPPED else None
    adapters = [adapter_of(one, backbone) for one in several]
    combined = combine(adapters, weights, how, rank=rank, density=density, key=key, backbone=backbone)
    return saved_as(dataclasses.replace(first, leaves=kept, step=0), combined)
