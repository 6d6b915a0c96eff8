"""What a training step must compute, by a closed formula, and how much of a device's rate that takes.

The formula counts training with a frozen backbone. A weight's product costs 2 FLOP a token forward. Going back it costs
as much again for the gradient of its input, in the blocks from the first adapter on and in no others, and as much once
more for the gradient of the weight if it is trained. Attention's two products cost twice their forward going back.

What is left out makes the number a lower bound: the adapters' own products, tokens they insert, norms, softmax, head
and loss, and whatever is computed again to save memory (so that it is the model's FLOP in the sense of Chowdhery et al.
2022, PaLM, appendix B).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import jax

from vla_jax.backbones.clip_config import CLIPConfig
from vla_jax.backbones.transformer import TowerConfig
from vla_jax.model import AdaptedModel
from vla_jax.training.table import ResolvedTable

# Dense bfloat16 products, FLOP/s of what JAX calls a device (of TPU v2 and v3 a core); Google's and NVIDIA's figures.
_PEAKS = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "Tesla T4": 65e12,
    "Tesla V100": 125e12,
}


def peak_flop_per_second(device_kind: str) -> float | None:
    """A device's published rate of dense bfloat16 products (float16 before Ampere); None if it is not known.

    Args:
        device_kind: as ``jax.devices()[0].device_kind`` has it, such as ``NVIDIA A100-SXM4-80GB``.
    """
    found = [name for name in _PEAKS if re.match(rf"{re.escape(name)}\b", device_kind)]
    return _PEAKS[max(found, key=len)] if found else None


def device_peak() -> float | None:
    """The published rate of all devices together; None if it is not known."""
    peak = peak_flop_per_second(jax.devices()[0].device_kind)
    return None if peak is None else peak * jax.device_count()


def blocks_flop(
    tower: TowerConfig, tokens: int, *, start: int = 0, reached: int | None = None, trained: float = 0.0
) -> float:
    """FLOP of one sequence in a tower's blocks, forward and backward.

    Args:
        tower: the tower.
        tokens: of the sequence.
        start: the first block that is run; those below it are computed once for all steps.
        reached: the first block that gradients go back through; none if None.
        trained: share of the blocks' product weights that are trained.
    """
    products = 2 * tokens * (4 * tower.width**2 + 2 * tower.width * tower.mlp_width)
    attention = 4 * tokens**2 * tower.width
    run = tower.depth - start
    back = 0 if reached is None else tower.depth - max(start, reached)
    return run * (products + attention) + back * (products + 2 * attention) + trained * tower.depth * products


def pair_flop(config: CLIPConfig, text_length: int, *, full: bool) -> float:
    """FLOP of one pair's training step with an adapter in every block, or with every weight trained.

    Args:
        config: the shape.
        text_length: tokens a text.
        full: whether the whole backbone is trained.
    """
    change = {"reached": 0, "trained": 1.0 if full else 0.0}
    blocks = blocks_flop(config.vision, config.grid**2 + 1, **change) + blocks_flop(config.text, text_length, **change)
    ends = (2 if full else 1) * _embedding(config) + (3 if full else 2) * sum(_projections(config).values())
    return blocks + ends


def batch_flop(model: AdaptedModel, table: ResolvedTable, batch: Mapping[str, Any]) -> float:
    """FLOP of a training step of a model on one global batch.

    Args:
        model: the model; where its adapters sit says how far gradients go.
        table: what is trained.
        batch: the step's batch, as arrays or as shapes. Pictures or texts that come as streams computed before cost
            nothing below the first adapter, and a task's own texts are counted once.
    """
    config = model.backbone.config
    rows = {row.name.removeprefix("backbone/"): row for row in table.rows if row.name.startswith("backbone/")}
    trained = {name for name, row in rows.items() if row.train}
    streamed = "image_stream" in batch
    first = model.plan.first_layers()
    total = 0.0
    for tower, sequences, tokens in _sequences(model, batch):
        own = [name for name in trained if name.startswith(f"{tower}/")]
        below = any(not name.startswith((f"{tower}/post_norm", f"{tower}/projection")) for name in own)
        reached = 0 if below else _first_reached(model, tower)
        weights = {n: row.size for n, row in rows.items() if n.startswith(f"{tower}/blocks/") and n.endswith("/kernel")}
        share = sum(size for name, size in weights.items() if name in trained) / sum(weights.values())
        shape = getattr(config, tower)
        each = blocks_flop(shape, tokens, start=first[tower] if streamed else 0, reached=reached, trained=share)
        if tower == "vision" and not streamed:
            each += _embedding(config) * (2 if "vision/patch_embedding/kernel" in trained else 1)
        passes = 1 + (reached is not None or f"{tower}/post_norm/scale" in own) + (f"{tower}/projection/kernel" in own)
        total += sequences * (each + passes * _projections(config)[tower])
    return total


def _sequences(model: AdaptedModel, batch: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """By tower, how many sequences a batch has for it and how many tokens each."""
    config, found = model.backbone.config, []
    if "image" in model.modalities:
        lead = batch["image_stream"].shape[:-2] if "image_stream" in batch else batch["image"].shape[:-3]
        found.append(("vision", math.prod(lead), config.grid**2 + 1))
    if "text" in model.modalities:
        texts = getattr(model.task, "texts", None)
        shape = batch["tokens"].shape if texts is None else texts[0].shape
        found.append(("text", math.prod(shape[:-1]), shape[-1]))
    return found


def _first_reached(model: AdaptedModel, tower: str) -> int | None:
    """The first block that gradients of adapters go back through; None where they sit beside or behind the blocks."""
    found = [
        layer + group.method.joint
        for group in model.plan.groups
        if group.site.slot not in ("projection", "side")
        for at, layer in group.places()
        if at == tower
    ]
    return min(found, default=None)


def _embedding(config: CLIPConfig) -> float:
    return 2 * config.grid**2 * 3 * config.patch_size**2 * config.vision.width


def _projections(config: CLIPConfig) -> dict[str, float]:
    return {tower: 2 * getattr(config, tower).width * config.projection for tower in ("vision", "text")}
