"""What a CLIP's step and forward need, by formula."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.measuring import TOKENS

if TYPE_CHECKING:
    from vla_jax.backbones.clip_config import CLIPConfig
    from vla_jax.backbones.transformer import TowerConfig


def forward_flop(config: CLIPConfig) -> float:
    """FLOP of one pair's forward: all products of both towers, adapters and embeddings' look-ups left out."""

    def blocks(tower: TowerConfig, tokens: int) -> float:
        weights = 4 * tower.width**2 + 2 * tower.width * tower.mlp_width
        return tower.depth * (2 * tokens * weights + 4 * tokens**2 * tower.width)

    patches, vision, text = config.grid**2, config.vision, config.text
    embedding = 2 * patches * 3 * config.patch_size**2 * vision.width
    projections = 2 * (vision.width + text.width) * config.projection
    return blocks(vision, patches + 1) + blocks(text, TOKENS) + embedding + projections


def step_flop(config: CLIPConfig, *, full: bool) -> float:
    """FLOP of one pair's training step; frozen weights get no gradient, so that two passes' worth are enough."""
    return (3 if full else 2) * forward_flop(config)
