"""A small CLIP with random weights, a model of it with adapters, and batches for it."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from vla_jax import names
from vla_jax.adapters import Bottleneck, Fusion, LoRA, Placement
from vla_jax.backbones.clip import CLIPConfig
from vla_jax.backbones.convert import abstract_params
from vla_jax.backbones.loading import Backbone
from vla_jax.backbones.transformer import TowerConfig
from vla_jax.model import AdaptedModel
from vla_jax.tasks.matching import Matching

# Every width can be cut into eight, so that fsdp=8 cuts each of them.
TOWER = TowerConfig(width=32, depth=2, heads=4, mlp_width=64)
CONFIG = CLIPConfig(
    vision=TOWER,
    text=TOWER,
    image_size=16,
    patch_size=8,
    vocabulary_size=48,
    context_length=8,
    projection=16,
    eos_token_id=47,
)
LENGTH = 6

PLACEMENTS = (
    Placement(Bottleneck(rank=4), "bottleneck", slots=("mlp_out",)),
    Placement(LoRA(rank=2, dropout=0.3), "lora", slots=("attn_q", "attn_v")),
    Placement(Fusion(rank=4, heads=2), "fusion", layers="last 1"),
)


def backbone(config: CLIPConfig = CONFIG) -> Backbone:
    """Random weights in which no bias is zero and no LayerNorm is trivial."""
    generator = np.random.default_rng(0)
    flat = {}
    for name, shape in names.flatten(abstract_params(config)).items():
        drawn = 0.2 * generator.standard_normal(shape.shape)
        flat[name] = jnp.asarray(drawn + name.endswith("scale"), jnp.float32)
    return Backbone("random", config, names.unflatten(flat), "0" * 64, None)


def model(placements: tuple[Placement, ...] = PLACEMENTS, **changes) -> AdaptedModel:
    """A judge of pairs on that backbone."""
    return dataclasses.replace(AdaptedModel(backbone(), Matching(), placements), **changes)


def drawn_params(given: AdaptedModel, seed: int = 1, size: float = 0.2):
    """The model's tree with adapters and head as training might leave them: no leaf is zero. Compiles nothing."""
    generator = np.random.default_rng(seed)
    flat = names.flatten(given.shapes())
    for name, leaf in flat.items():
        flat[name] = jnp.asarray(size * generator.standard_normal(leaf.shape) + name.endswith("scale"), leaf.dtype)
    return names.unflatten(flat) | {"backbone": given.backbone.params}


def batch(size: int = 16, seed: int = 0) -> dict[str, np.ndarray]:
    """Pictures, texts of several lengths, labels and routes; the last row is padding."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(3, LENGTH + 1, size)
    place = np.arange(LENGTH)
    words = generator.integers(2, CONFIG.eos_token_id, (size, LENGTH))
    tokens = np.where(place < lengths[:, None] - 1, words, np.where(place == lengths[:, None] - 1, 47, 0))
    return {
        "image": generator.normal(size=(size, 16, 16, 3)).astype(np.float32),
        "tokens": tokens.astype(np.int32),
        "text_mask": place < lengths[:, None],
        "label": generator.integers(0, 2, size).astype(np.int32),
        "route": np.zeros(size, np.int32),
        "valid": np.arange(size) < size - 1,
    }
