"""The list of adapters to which every shared property applies: a new method joins by being listed here."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax import names
from vla_jax.adapters import Bottleneck, Fusion, LoRA, Placement
from vla_jax.backbones.clip import CLIP
from vla_jax.backbones.clip_config import CLIPConfig
from vla_jax.backbones.convert import abstract_params
from vla_jax.backbones.transformer import Compute, TowerConfig

CONFIG = CLIPConfig(
    vision=TowerConfig(width=32, depth=4, heads=2, mlp_width=64),
    text=TowerConfig(width=24, depth=2, heads=2, mlp_width=48),
    image_size=16,
    patch_size=8,
    vocabulary_size=50,
    context_length=8,
    projection=16,
    eos_token_id=49,
)
BATCH, LENGTH = 8, 6


def equal_towers() -> CLIPConfig:
    """The same CLIP with towers of one shape, for weights shared between them."""
    return dataclasses.replace(CONFIG, text=CONFIG.vision)


PLACEMENTS: dict[str, Placement] = {
    "bottleneck": Placement(Bottleneck(rank=4), slots=("mlp_out",)),
    "bottleneck_parallel": Placement(Bottleneck(rank=4, parallel=True, scale=4.0), slots=("attn_sublayer", "mlp_out")),
    "bottleneck_norm": Placement(Bottleneck(reduction=8, layer_norm=True, activation="gelu"), slots=("block_out",)),
    "bottleneck_normal": Placement(Bottleneck(rank=4, init="normal", activation="gelu_tanh"), slots=("attn_out",)),
    "bottleneck_embed": Placement(Bottleneck(rank=4), slots=("embed", "mlp_in")),
    "bottleneck_ranks": Placement(Bottleneck(rank=4), slots=("mlp_out",), ranks=((r"vision/mlp_out/[02]", 2),)),
    "lora": Placement(LoRA(rank=2, alpha=4.0), slots=("attn_q", "attn_v")),
    "lora_everywhere": Placement(
        LoRA(rank=2, rank_stabilised=True), slots=("attn_q", "attn_k", "attn_v", "attn_out", "mlp_fc1", "mlp_fc2")
    ),
    "lora_dropout": Placement(LoRA(rank=2, dropout=0.5), slots=("attn_q", "mlp_fc2")),
    "fusion": Placement(Fusion(rank=4, heads=2)),
    "fusion_gate": Placement(Fusion(rank=4, mix="gate")),
    "fusion_attention": Placement(Fusion(rank=4, heads=1, mix="attention", layer_norm=False)),
    "fusion_none": Placement(Fusion(rank=4, mix="none")),
    "fusion_to_vision": Placement(Fusion(rank=4, direction="to_vision")),
    "fusion_to_text": Placement(Fusion(rank=4, direction="to_text", scale=2.0)),
    "fusion_late": Placement(Fusion(rank=4), layers="late"),
}

TIED: dict[str, Placement] = {
    "bottleneck_tied": Placement(Bottleneck(rank=4), slots=("mlp_out",), tied=True),
    "lora_tied": Placement(LoRA(rank=2, dropout=0.5), slots=("attn_q",), tied=True),
    "fusion_shared": Placement(Fusion(rank=4, shared=True)),
}


def shape_for(name: str) -> CLIPConfig:
    """The CLIP a setting is tested on."""
    return equal_towers() if name in TIED else CONFIG


ALL = PLACEMENTS | TIED


def model(config: CLIPConfig, unroll: int = 1) -> CLIP:
    """A CLIP of this shape."""
    return CLIP(config, Compute(unroll=unroll))


def drawn(shapes, seed: int, size: float, around=None):
    """Normal noise of these shapes, drawn by NumPy: one compiled random number a shape is what makes tests slow."""
    generator = np.random.default_rng(seed)
    leaves, structure = jax.tree.flatten(shapes)
    centres = [0.0] * len(leaves) if around is None else jax.tree.leaves(around)
    noise = [c + size * generator.standard_normal(leaf.shape) for leaf, c in zip(leaves, centres, strict=True)]
    return jax.tree.unflatten(structure, [jnp.asarray(array, jnp.float32) for array in noise])


def backbone(config: CLIPConfig):
    """Random parameters in which no bias is zero and no LayerNorm is trivial."""
    flat = names.flatten(drawn(abstract_params(config), 0, 0.2))
    return names.unflatten({name: leaf + 1.0 if name.endswith("scale") else leaf for name, leaf in flat.items()})


def inputs(config: CLIPConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Images, tokens of several lengths, and their mask."""
    images = jax.random.normal(jax.random.key(2), (BATCH, config.image_size, config.image_size, 3))
    lengths = 3 + jnp.arange(BATCH) % (LENGTH - 2)  # [batch]
    place = jnp.arange(LENGTH)[None]
    words = jax.random.randint(jax.random.key(3), (BATCH, LENGTH), 2, 48)
    tokens = jnp.where(place < lengths[:, None] - 1, words, jnp.where(place == lengths[:, None] - 1, 49, 0))
    return images, tokens, place < lengths[:, None]
