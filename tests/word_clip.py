"""A small CLIP in the hub's format, with random weights, that knows the words of the scenes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vla_jax import names
from vla_jax.backbones.clip import CLIPConfig
from vla_jax.backbones.convert import abstract_params
from vla_jax.backbones.export import export_backbone
from vla_jax.backbones.transformer import TowerConfig
from vla_jax.data.scenes.vocabulary import WORDS
from vla_jax.data.text import train_word_tokenizer


def export_word_clip(folder: Path) -> Path:
    """Writes the backbone below a folder, and returns where."""
    tokenizer = train_word_tokenizer(WORDS, folder / "words", context_length=24)
    config = CLIPConfig(
        vision=TowerConfig(width=16, depth=2, heads=2, mlp_width=32),
        text=TowerConfig(width=16, depth=2, heads=2, mlp_width=32),
        image_size=32,
        patch_size=8,
        vocabulary_size=len(tokenizer),
        context_length=24,
        projection=8,
        eos_token_id=tokenizer.eos_token_id,
    )
    generator = np.random.default_rng(0)
    flat = {
        name: (0.2 * generator.standard_normal(leaf.shape) + name.endswith("scale")).astype(np.float32)
        for name, leaf in names.flatten(abstract_params(config)).items()
    }
    return export_backbone(names.unflatten(flat), config, folder / "small", tokenizer=tokenizer)
