"""The training steps that ``scaling.py`` compiles, as shapes: contrastive training of a CLIP, and a decoder of 7 B.

The project has no text decoder yet. This one is made of its blocks, scan, adapters and table of parameters, in the size
of LLaMA's 7 B (Touvron et al. 2023): causal, 32 blocks of width 4,096, 32,000 words. A LLaMA block has three maps of
4,096 by 11,008 in its MLP and no biases; ours has two, of 4,096 by 16,512, which are as many weights and products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from benchmarks.measuring import TOKENS
from vla_jax.adapters import LoRA, Placement, place
from vla_jax.backbones.loading import abstract_backbone
from vla_jax.backbones.transformer import Compute, Remat, TowerConfig, as_bias, init_blocks, layer_norm, run_blocks
from vla_jax.flop import blocks_flop, pair_flop
from vla_jax.model import AdaptedModel
from vla_jax.slots import vacant
from vla_jax.tasks.retrieval import Retrieval

Method = Literal["lora", "full"]

DECODER = "decoder_7b"
DECODER_BLOCKS = TowerConfig(width=4096, depth=32, heads=32, mlp_width=16512)
DECODER_WORDS, DECODER_TOKENS = 32_000, 512


@dataclass(frozen=True)
class Work:
    """What a step is compiled of.

    Attributes:
        shapes: of all parameters, a nested dict.
        loss: ``(params, batch, key) -> (loss, metrics)``.
        batch: shapes of a global batch.
        flop: of one step on all devices together.
        kept: bytes that an example leaves for the backward pass with ``remat=full``: each block's input, float32.
    """

    shapes: dict[str, Any]
    loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
    batch: dict[str, jax.ShapeDtypeStruct]
    flop: float
    kept: int


def work(model: str, method: Method, batch: int, remat: Remat) -> Work:
    """A model's step: LoRA of rank 16 on queries and values of every block, or everything trained."""
    if model == DECODER:
        return decoder(method, batch, remat)
    return contrastive(model, method, batch, remat)


def _placement(**where: Any) -> Placement:
    return Placement(LoRA(rank=16), slots=("attn_q", "attn_v"), **where)


def contrastive(preset: str, method: Method, batch: int, remat: Remat) -> Work:
    """CLIP's own training on pairs of pictures and texts."""
    backbone = abstract_backbone(f"random:{preset}")
    size = backbone.config.image_size
    placements = (_placement(),) if method == "lora" else ()
    model = AdaptedModel(backbone, Retrieval(), placements, Compute(remat=remat))
    rows = {
        "image": jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32),
        "tokens": jax.ShapeDtypeStruct((batch, TOKENS), jnp.int32),
        "text_mask": jax.ShapeDtypeStruct((batch, TOKENS), jnp.bool_),
    }
    flop = pair_flop(backbone.config, TOKENS, full=method == "full") * batch
    config = backbone.config
    kept = _inputs(config.vision, config.grid**2 + 1) + _inputs(config.text, TOKENS)
    return Work(model.shapes(), model.loss, rows, flop, kept)


def decoder(method: Method, batch: int, remat: Remat) -> Work:
    """A decoder's training on texts of :data:`DECODER_TOKENS` tokens: the next word after each."""
    tower, compute = DECODER_BLOCKS, Compute(remat=remat)
    width, depths = tower.width, {"text": tower.depth}
    norm = layer_norm(tower, compute)
    plan = place((_placement(towers=("text",)),) if method == "lora" else (), {"text": tower.shape})
    backbone = {
        "blocks": jax.eval_shape(lambda: init_blocks(jax.random.key(0), tower)),
        "post_norm": jax.eval_shape(lambda: norm.init(jax.random.key(0), jnp.zeros((1, width)))["params"]),
        "token_embedding": jax.ShapeDtypeStruct((DECODER_WORDS, width), jnp.float32),
        "projection": {"kernel": jax.ShapeDtypeStruct((width, DECODER_WORDS), jnp.float32)},
    }
    seen = jnp.tril(jnp.ones((DECODER_TOKENS, DECODER_TOKENS), bool))[None, None]

    def loss(params: Any, rows: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        del key
        own = params["backbone"]["text"]
        occupancy = vacant(depths) if method == "full" else plan.bind(params["adapters"]).occupy(None, None)
        stream = jnp.take(own["token_embedding"], rows["tokens"], axis=0)
        segments = occupancy.segments["text"]
        stream, _ = run_blocks(tower, compute, own["blocks"], stream, as_bias(seen), segments)
        logits = norm.apply({"params": own["post_norm"]}, stream) @ own["projection"]["kernel"]
        targets = jnp.roll(rows["tokens"], -1, axis=1)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)[:, :-1].mean(), {}

    adapters = {"adapters": plan.shapes()} if method == "lora" else {}
    rows = {"tokens": jax.ShapeDtypeStruct((batch, DECODER_TOKENS), jnp.int32)}
    # Forward and back through the words' product, whose weights have a gradient only where they are trained.
    words = (3 if method == "full" else 2) * 2 * DECODER_TOKENS * width * DECODER_WORDS
    flop = blocks_flop(tower, DECODER_TOKENS, reached=0, trained=float(method == "full")) + words
    kept = _inputs(tower, DECODER_TOKENS)
    return Work({"backbone": {"text": backbone}} | adapters, loss, rows, flop * batch, kept)


def _inputs(tower: TowerConfig, tokens: int) -> int:
    return 4 * tower.depth * tower.width * tokens
