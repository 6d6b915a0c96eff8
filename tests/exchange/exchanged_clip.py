"""A small CLIP, here and as a folder for transformers, and adapters on it; imported by the tests beside it."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import numpy as np

from vla_jax import names
from vla_jax.adapters import Placement, Plan, place
from vla_jax.backbones.clip import CLIP
from vla_jax.backbones.clip_config import CLIPConfig
from vla_jax.backbones.convert import parameter_shapes
from vla_jax.backbones.export import export_backbone
from vla_jax.backbones.loading import Backbone, load_backbone
from vla_jax.backbones.transformer import TowerConfig
from vla_jax.exchange.adapter_file import SavedAdapter
from vla_jax.exchange.sites import adapter_of, is_start

CONFIG = CLIPConfig(
    vision=TowerConfig(width=24, depth=3, heads=2, mlp_width=40),
    text=TowerConfig(width=16, depth=2, heads=4, mlp_width=36, activation="gelu"),
    image_size=16,
    patch_size=8,
    vocabulary_size=40,
    context_length=7,
    projection=12,
    eos_token_id=39,
)
BATCH = 3


def write_backbone(folder: Path, config: CLIPConfig = CONFIG, seed: int = 0) -> Path:
    """Random weights in the hub's format: no bias zero, no LayerNorm trivial, activations of size one."""
    generator = np.random.default_rng(seed)
    flat = {}
    for name, shape in parameter_shapes(config).items():
        fan_in = shape[-2] if name.endswith("kernel") else 1
        flat[name] = (generator.standard_normal(shape) * 0.5 / fan_in**0.5 + name.endswith("scale")).astype(np.float32)
    flat["logit_scale"] = np.float32(2.0)
    return export_backbone(names.unflatten(flat), config, folder)


def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images ``[batch, size, size, 3]``, tokens and mask ``[batch, length]``."""
    generator = np.random.default_rng(1)
    images = generator.standard_normal((BATCH, 16, 16, 3)).astype(np.float32)
    lengths = np.array([7, 4, 5])[:, None]
    place_ = np.arange(7)[None]
    tokens = np.where(place_ < lengths - 1, generator.integers(1, 39, (BATCH, 7)), 0)
    tokens = np.where(place_ == lengths - 1, 39, tokens).astype(np.int32)
    return images, tokens, place_ < lengths


def drawn(backbone: Backbone, placements: tuple[Placement, ...], trained: str = "", seed: int = 2) -> SavedAdapter:
    """An adapter as training might leave it.

    Args:
        backbone: what it belongs to.
        placements: what sits where.
        trained: the end of the names of backbone leaves that are trained too; none if empty.
        seed: of the values.
    """
    generator = np.random.default_rng(seed)
    plan = place(placements, backbone.config.towers)
    leaves = {}
    known = plan.leaves()
    for path, leaf in names.flatten(plan.shapes()).items():
        if is_start(known[path]):
            continue
        name = f"adapters/{path}"
        # Scales and magnitudes lie around one, and what a map is to be multiplied with may not vanish.
        around = 1.0 if name.rsplit("/", 1)[-1] in ("scale", "magnitude") else 0.0
        leaves[name] = (around + 0.3 * generator.standard_normal(leaf.shape)).astype(np.float32)
    for name, leaf in names.flatten({"backbone": backbone.params}).items():
        if trained and trained in name:
            leaves[name] = np.asarray(leaf) + 0.2 * generator.standard_normal(leaf.shape).astype(np.float32)
    return SavedAdapter(
        leaves=leaves,
        adapters={"placements": plan.describe()},
        backbone=backbone.name,
        fingerprint=backbone.fingerprint,
        towers={tower: shape._asdict() for tower, shape in backbone.config.towers.items()},
        step=7,
    )


@functools.cache
def _program(config: CLIPConfig, plan: Plan | None):
    images, tokens, mask = inputs()

    @jax.jit
    def run(params, adapters):
        bound = None if plan is None else plan.bind(adapters)
        out = CLIP(config).apply({"params": params}, images, tokens, mask, adapters=bound)
        return out.image_features, out.text_features

    return run


def features(backbone: Backbone, adapter: SavedAdapter | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Both features, ``[batch, projection]``, of the backbone with an adapter's leaves in it."""
    tree = names.unflatten({} if adapter is None else adapter.leaves)
    params = names.unflatten(names.flatten(backbone.params) | names.flatten(tree.get("backbone", {})))
    plan, own = adapter_of(adapter, backbone.params) if "adapters" in tree else (None, None)
    image, text = _program(backbone.config, plan)(params, own)
    return np.asarray(image), np.asarray(text)


def close(ours: tuple[np.ndarray, ...], theirs: tuple[np.ndarray, ...], tolerance: float = 1e-5) -> None:
    """Each pair within a relative distance."""
    for one, other in zip(ours, theirs, strict=True):
        assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other)


def far(ours: tuple[np.ndarray, ...], theirs: tuple[np.ndarray, ...]) -> None:
    """At least one pair far apart, so that a comparison of the same adapter could fail."""
    assert max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(ours, theirs, strict=True)) > 1e-2


def loaded(folder: Path) -> Backbone:
    """The backbone in a folder."""
    return load_backbone(folder)
