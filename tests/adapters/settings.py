"""The list of adapters to which every shared property applies: a new method joins by being listed here."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax import names
from vla_jax.adapters import (
    MMA,
    PHM,
    Affine,
    Average,
    Bottleneck,
    CLIPAdapter,
    CoCoOp,
    CrossModal,
    Fuse,
    Fusion,
    Hyperformer,
    Ladder,
    LoRA,
    MaPLe,
    Parallel,
    Placement,
    Prefix,
    Prompt,
    Share,
    Split,
    Stack,
    ia3,
)
from vla_jax.adapters.base import Method
from vla_jax.adapters.composite import Composite
from vla_jax.adapters.plan import Plan
from vla_jax.backbones.clip import CLIP
from vla_jax.backbones.clip_config import CLIPConfig
from vla_jax.backbones.convert import abstract_params
from vla_jax.backbones.transformer import Compute, TowerConfig
from vla_jax.slots import Site

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


def site(slot: str, x_width: int, y_width: int, tower: str = "vision") -> Site:
    """A place of these widths."""
    return Site(tower, slot, 4, (x_width, y_width), (("vision", x_width), ("text", y_width)), CONFIG.projection)


def count(method: Method, place: Site) -> int:
    """Parameters of one layer there, by the closed formula."""
    return sum(method.parameter_counts(place).values())


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
    "ladder": Placement(Ladder(rank=8, heads=2)),
    "ladder_some_rungs": Placement(Ladder(reduction=4, heads=1, rungs="every 2nd", mlp_ratio=2)),
    "fusion": Placement(Fusion(rank=4, heads=2)),
    "fusion_gate": Placement(Fusion(rank=4, mix="gate")),
    "fusion_attention": Placement(Fusion(rank=4, heads=1, mix="attention", layer_norm=False)),
    "fusion_none": Placement(Fusion(rank=4, mix="none")),
    "fusion_to_vision": Placement(Fusion(rank=4, direction="to_vision")),
    "fusion_to_text": Placement(Fusion(rank=4, direction="to_text", scale=2.0)),
    "fusion_late": Placement(Fusion(rank=4), layers="late"),
    # bottlenecks, kronecker, hypernetworks, cross-modal
    "bottleneck_drop_path": Placement(
        Bottleneck(rank=4, channel_scale=True, scale=0.5, drop_path=0.5, init="truncated"), slots=("block_out",)
    ),
    "bottleneck_half_shared": Placement(
        Bottleneck(rank=4), slots=("mlp_out",), sharing=(Share("down/.*", ("tasks", "layers")),)
    ),
    "compacter": Placement(PHM(n=2, rank=4), slots=("attn_sublayer", "mlp_out")),
    "phm": Placement(
        PHM(n=4, rank=4, factorised=False, shared_rule=False, init="glorot"), slots=("attn_out", "block_out")
    ),
    "hyperformer": Placement(
        Hyperformer(rank=2, embedding=5, hidden=7, projection=4), slots=("attn_sublayer", "mlp_out")
    ),
    "hyperformer_per_slot": Placement(
        Hyperformer(rank=2, embedding=5, hidden=7, projection=4, per_slot=True, init="normal"),
        slots=("attn_sublayer", "mlp_out"),
    ),
    "cross_modal": Placement(CrossModal(rank=3, shared=8), slots=("attn_sublayer", "mlp_out"), layers="last 2"),
    "mma": Placement(MMA(rank=4, scale=0.5), layers="last 2"),
    # end of bottlenecks, kronecker, hypernetworks, cross-modal
    # low rank and scaling
    "lora_alphas": Placement(
        LoRA(rank=2),
        slots=("attn_k", "projection"),
        ranks=(("vision/attn_k/1", 3),),
        alphas=((r".*/attn_k/[01]", 4.0),),
    ),
    "dora": Placement(LoRA(rank=2, decomposed=True), slots=("attn_q", "mlp_fc1", "projection")),
    "lora_pissa": Placement(LoRA(rank=2, init="pissa"), slots=("attn_q", "mlp_fc2", "projection")),
    "dora_pissa": Placement(LoRA(rank=2, init="pissa", decomposed=True, dropout=0.5), slots=("attn_out", "mlp_fc1")),
    "affine_ia3": ia3(),
    "affine_shift": Placement(Affine(scale=False, shift=True), slots=("attn_q", "mlp_fc1", "projection")),
    "affine_both": Placement(Affine(shift=True), slots=("embed", "attn_in", "attn_sublayer", "mlp_out", "block_out")),
    # end of low rank and scaling
    # tokens and features
    "prompt": Placement(Prompt(2), slots=("tokens",)),
    "prompt_deep": Placement(Prompt(2), slots=("tokens", "prompts")),
    "prompt_made": Placement(Prompt(1, hidden=5), slots=("tokens", "prompts")),
    "prefix": Placement(Prefix(3)),
    "prefix_made": Placement(Prefix(3, hidden=5)),
    "cocoop": Placement(CoCoOp(2, reduction=4), towers=("text",)),
    "maple": Placement(MaPLe(2), slots=("tokens", "prompts"), layers="first 2"),
    "clip_adapter": Placement(CLIPAdapter(), towers=("vision",)),
    # compositions
    "stack": Placement(
        Stack((("low", LoRA(rank=2, dropout=0.5)), ("wide", Bottleneck(rank=4, init="normal")))), slots=("attn_out",)
    ),
    "stack_prefixes": Placement(Stack((("short", Prefix(1)), ("long", Prefix(2))))),
    "parallel": Placement(
        Parallel((("a", Bottleneck(rank=4)), ("b", PHM(n=2, rank=4)), ("c", Affine()))), slots=("mlp_out", "block_out")
    ),
    "parallel_fusions": Placement(Parallel((("gate", Fusion(rank=4, mix="gate")), ("none", Fusion(mix="none"))))),
    "average": Placement(
        Average((("plain", LoRA(rank=2)), ("dora", LoRA(rank=3, decomposed=True))), weights=(3.0, 1.0)),
        slots=("attn_q", "mlp_fc1"),
    ),
    "average_prompts": Placement(
        Average((("one", Prompt(2)), ("two", Prompt(2, hidden=5)))), slots=("tokens", "prompts")
    ),
    "split": Placement(
        Split((("first", Bottleneck(rank=4)), ("rest", Bottleneck(rank=3))), ranges=((0, 1), (1, None))),
        slots=("attn_in",),
    ),
    "fuse": Placement(
        Fuse((("a", Bottleneck(rank=4)), ("b", Bottleneck(rank=2, parallel=True)), ("c", PHM(n=2, rank=4)))),
        slots=("mlp_out",),
    ),
    "fuse_nested": Placement(
        Fuse(
            (("pair", Stack((("a", Affine()), ("b", LoRA(rank=2))))), ("dora", LoRA(rank=2, decomposed=True))), heads=2
        ),
        slots=("attn_v",),
    ),
    # end of compositions
}

TIED: dict[str, Placement] = {
    "bottleneck_tied": Placement(Bottleneck(rank=4), slots=("mlp_out",), tied=True),
    "lora_tied": Placement(LoRA(rank=2, dropout=0.5), slots=("attn_q",), tied=True),
    "fusion_shared": Placement(Fusion(rank=4, shared=True)),
    "uniadapter": Placement(
        Bottleneck(rank=4, parallel=True, layer_norm=True),
        slots=("mlp_out",),
        sharing=(Share("(down|norm)/.*", ("towers",)),),
    ),
}


def shape_for(name: str) -> CLIPConfig:
    """The CLIP a setting is tested on."""
    return equal_towers() if name in TIED else CONFIG


ALL = PLACEMENTS | TIED

VARIATIONS = frozenset(
    {
        "fusion_to_vision",
        "fusion_to_text",
        "parallel_fusions",
        "prompt_made",
        "average_prompts",
        "prefix_made",
        "stack_prefixes",
        "fusion_gate",
        "fusion_attention",
        "fusion_none",
        "ladder_some_rungs",
        "bottleneck_normal",
        "dora_pissa",
        "affine_shift",
    }
)
"""Settings that stand where another one of the list stands, and differ in what their module computes alone. What scan,
mesh and cuts of the tower make of a module there is tested for the others, since compiling takes the time."""

PLACED = [name for name in ALL if name not in VARIATIONS]


def kinds(method: Method) -> set[str]:
    """A method's kind, and those of its children at any depth."""
    below = [kinds(child) for _, child in method.children] if isinstance(method, Composite) else []
    return {method.kind}.union(*below)


def _families() -> list[str]:
    """A setting of every kind, those that keep frozen arrays or share weights in ways of their own, all composites."""
    found: list[str] = []
    known: set[str] = set()
    for name in PLACED:
        placement, own = ALL[name], name in ("dora", "lora_pissa", "lora_alphas", *TIED)
        shares = own or bool(placement.sharing) or isinstance(placement.method, Composite)
        if shares or not kinds(placement.method) <= known:
            found.append(name)
            known |= kinds(placement.method)
    return found


FAMILIES = _families()
"""For what takes two compiled gradients of each setting."""

WITHOUT_GRADIENT = r".*/(fuse|side/rungs/attention)/key/bias"
"""Parameters that change nothing by their method's definition: softmax ignores what is added to all of its scores."""


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


def begun(plan: Plan, params):
    """New adapters. In one program: drawn one by one as :meth:`Plan.init` does it, they take most of a test's time."""
    return jax.jit(plan.init)(jax.random.key(5), params)


def inputs(config: CLIPConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Images, tokens of several lengths, and their mask."""
    generator = np.random.default_rng(2)
    images = generator.standard_normal((BATCH, config.image_size, config.image_size, 3), np.float32)
    lengths = 3 + np.arange(BATCH) % (LENGTH - 2)  # [batch]
    place = np.arange(LENGTH)[None]
    words = generator.integers(2, 48, (BATCH, LENGTH))
    tokens = np.where(place < lengths[:, None] - 1, words, np.where(place == lengths[:, None] - 1, 49, 0))
    return jnp.asarray(images), jnp.asarray(tokens, jnp.int32), jnp.asarray(place < lengths[:, None])
