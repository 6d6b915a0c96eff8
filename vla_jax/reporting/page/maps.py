"""Patch heat maps of the models that a work directory holds: which patches look like the text beside the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vla_jax import names
from vla_jax.adapters import Placement, fuse, place
from vla_jax.backbones.loading import Backbone
from vla_jax.data.image import Preprocess
from vla_jax.data.text import Tokenize
from vla_jax.errors import UserError
from vla_jax.evaluation.grounding import as_grid
from vla_jax.model import MODALITIES, AdaptedModel
from vla_jax.saved_model import saved_model
from vla_jax.tasks.grounding import heat_map
from vla_jax.tasks.matching import Matching
from vla_jax.training.checkpoint import load_adapters

Pair = tuple[Any, str]
"""A picture, in any form that :class:`vla_jax.data.image.Preprocess` takes, and a text."""


class HeatMaps:
    """Heat maps of pairs by any model of one backbone.

    A heat map is the cosine of each patch's feature with the text's feature, both as the adapted towers make them. It
    says what the towers have brought together, not what a head makes of it.
    """

    def __init__(self, backbone: Backbone, pairs: Sequence[Pair], text_length: int, route: int = 0):
        """Args:
        backbone: the frozen backbone.
        pairs: what maps are made of.
        text_length: tokens a text; must hold the longest.
        route: whose adapters pairs go through, in models that have them for several tasks.
        """
        self.backbone = backbone
        preprocess, tokenize = Preprocess(backbone.image_processor), Tokenize(backbone.tokenizer, text_length)
        tokens, mask = zip(*(tokenize(text) for _, text in pairs), strict=True)
        self._batch = {
            "image": np.stack([preprocess(picture) for picture, _ in pairs]),
            "tokens": np.stack(tokens),
            "text_mask": np.stack(mask),
            "route": np.full(len(pairs), route, np.int32),
        }
        self._frozen: np.ndarray | None = None

    def frozen(self) -> np.ndarray:
        """Maps of the backbone without anything in it, float32 ``[pairs, grid, grid]``."""
        if self._frozen is None:
            self._frozen = self._of(AdaptedModel(self.backbone, Matching()), {"backbone": self.backbone.params})
        return self._frozen

    def adapted(self, folder: Path, begun: Path | None = None) -> np.ndarray | None:
        """Maps of a trained model; None for one that is shown one modality alone.

        Args:
            folder: its trained leaves, as :func:`vla_jax.training.checkpoint.save_adapters` wrote them.
            begun: those of the adapters that AdapterFusion's second stage weighs, and does not keep again.

        Raises:
            UserError: if there are none, they belong to another backbone, or adapters are missing among them.
        """
        trained, metadata = load_adapters(folder)
        identity = metadata.identity
        if identity.fingerprint != self.backbone.fingerprint:
            raise UserError(f"{folder} was trained on another backbone than {self.backbone.name!r} is now")
        if set(identity.adapters.get("modalities", MODALITIES)) != set(MODALITIES):
            return None
        if set(trained) == {"heads"}:
            return self.frozen()
        placements = tuple(map(Placement.from_description, identity.adapters["placements"]))
        leaves = names.flatten(trained)
        if begun is not None:
            leaves = self._fused(begun, placements) | leaves
        return self._of(*saved_model(leaves, identity.adapters, self.backbone, Matching(), folder))

    def _fused(self, begun: Path, placements: Sequence[Placement]) -> dict[str, Any]:
        """The leaves with which AdapterFusion's second stage began, by name."""
        first, metadata = load_adapters(begun)
        towers = self.backbone.config.towers
        plan = place([Placement.from_description(each) for each in metadata.identity.adapters["placements"]], towers)
        _, adapters = fuse(plan, first["adapters"], towers, jax.random.key(0), tasks=placements[0].tasks)
        return names.flatten({"adapters": adapters})

    def _of(self, model: AdaptedModel, params: Mapping[str, Any]) -> np.ndarray:
        program = jax.jit(lambda params, batch: heat_map(model.apply(params, batch)))
        return as_grid(np.asarray(program(params, self._batch)))
