"""The small CLIP of this folder: towers that differ in width, depth, heads and activation."""

from vla_jax.backbones.clip_config import CLIPConfig
from vla_jax.backbones.transformer import TowerConfig

CONFIG = CLIPConfig(
    vision=TowerConfig(width=16, depth=3, heads=2, mlp_width=40),
    text=TowerConfig(width=12, depth=2, heads=3, mlp_width=24, activation="gelu"),
    image_size=8,
    patch_size=4,
    vocabulary_size=40,
    context_length=7,
    projection=10,
    eos_token_id=39,
)
