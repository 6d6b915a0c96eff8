"""Pretraining a CLIP on generated scenes: pairs with hard twins, and the loss with dense supervision."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vla_jax import names
from vla_jax.backbones.clip import CLIP
from vla_jax.data.image import Preprocess
from vla_jax.data.scenes import SceneConfig, SceneSource
from vla_jax.data.scenes.vocabulary import ATTRIBUTES
from vla_jax.data.text import Tokenize
from vla_jax.tasks import scene_supervision
from vla_jax.tasks.contrastive import info_nce, matched_first
from vla_jax.tasks.scene_supervision import SceneHeads

_EXAMPLES = 10_000_000  # far more than any run sees: no scene comes twice


@dataclasses.dataclass(frozen=True)
class ScenePairs:
    """Pairs of captioned scenes: twins that differ by one swap, or two scenes that have nothing to do with each other.

    Attributes:
        scenes: what scenes look like.
        twin_share: share of twins.
    """

    scenes: SceneConfig
    twin_share: float

    def __len__(self) -> int:
        return _EXAMPLES

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        # A golden-ratio sequence spreads the twins evenly, and draws nothing.
        if index * 0.6180339887498949 % 1 < self.twin_share:
            drawn = SceneSource("train", "twins", self.scenes, _EXAMPLES)[index]
            twin = {name: drawn[f"twin_{name}"] for name in ("image", "caption", "scene")}
            return [drawn, twin]
        source = SceneSource("train", "captions", self.scenes, 2 * _EXAMPLES)
        return [source[2 * index], source[2 * index + 1]]


@dataclasses.dataclass(frozen=True)
class PairRow:
    """Makes a row of a pair: every array has a leading axis of two."""

    preprocess: Preprocess
    tokenize: Tokenize

    def __call__(self, pair: Sequence[Mapping[str, Any]], generator: np.random.Generator | None = None) -> Any:
        tokens, text_mask = self.tokenize.batch([example["caption"] for example in pair])
        return {
            "image": np.stack([self.preprocess(example["image"]) for example in pair]),
            "tokens": tokens,
            "text_mask": text_mask,
            "cells": np.stack([scene_supervision.cell_labels(example["scene"]) for example in pair]),
        }


@dataclasses.dataclass(frozen=True)
class DenseWeights:
    """Weights of the losses of :mod:`vla_jax.tasks.scene_supervision` beside the contrastive loss.

    Attributes:
        cells: of attributes by patch and by cell.
        pairings: of which attribute values belong together.
        orders: of which value lies before which.
        numbers: of how many objects have a value.
    """

    cells: float = 1.0
    pairings: float = 5.0
    orders: float = 2.0
    numbers: float = 1.0


def make_loss(clip: CLIP, *, texts: bool, weights: DenseWeights) -> Callable[..., Any]:
    """The loss: dense supervision of the image tower; with texts, dense supervision of both towers, and InfoNCE.

    Args:
        clip: the model.
        texts: whether texts take part.
        weights: of the dense losses beside the contrastive one.

    Returns:
        ``(params, batch, key) -> (loss, metrics)`` for batches of :class:`PairRow` rows; the parameters of the heads
        lie below ``heads/scenes``.
    """
    heads = SceneHeads()
    of_patch = scene_supervision.cell_of_patch(clip.config.grid)

    def loss_function(params: names.Tree, batch: dict[str, jax.Array], key: jax.Array) -> Any:
        batch = {name: a.reshape(-1, *a.shape[2:]) for name, a in batch.items() if name not in ("valid", "index")}
        captions = (batch["tokens"], batch["text_mask"]) if texts else (None, None)
        output = clip.apply({"params": params["backbone"]}, batch["image"], *captions)
        variables, cells = {"params": params["heads"]["scenes"]}, batch["cells"]

        patch_logits = heads.apply(variables, output.image_tokens[:, 1:], method="of_patches")
        loss, accuracy = scene_supervision.attribute_loss(patch_logits, cells[:, of_patch])
        loss = weights.cells * loss
        metrics = {f"patch_{name}": accuracy[index] for index, name in enumerate(ATTRIBUTES)}
        for tower, features in (("image", output.image_features), ("text", output.text_features)):
            if features is None:
                continue
            logits = heads.apply(variables, features, method="of_features")
            cell_loss, accuracy = scene_supervision.attribute_loss(logits.cells, cells)
            pairing_loss = scene_supervision.pairing_loss(logits.pairings, cells)
            order_loss, ordered = scene_supervision.order_loss(logits.coordinates, cells)
            number_loss = scene_supervision.number_loss(logits.numbers, cells)
            loss += weights.cells * cell_loss + weights.pairings * pairing_loss
            loss += weights.orders * order_loss + weights.numbers * number_loss
            metrics |= {f"{tower}_cells": cell_loss, f"{tower}_pairings": pairing_loss}
            metrics |= {f"{tower}_ordered": ordered, f"{tower}_numbers": number_loss}
            metrics |= {f"{tower}_{name}": accuracy[index] for index, name in enumerate(ATTRIBUTES)}
        if texts:
            contrastive = info_nce(output.logits)
            metrics |= {"contrastive": contrastive, "scale": output.scale} | matched_first(output.logits)
            loss += contrastive
        return loss, metrics

    return loss_function
