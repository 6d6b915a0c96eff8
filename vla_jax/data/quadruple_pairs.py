"""Quadruples in Winoground's format (two captions, two pictures) as the four pairs that a model scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vla_jax.data.stages import Source


class QuadruplePairs:
    """Four examples a quadruple: caption c with image i at ``4 n + 2 c + i``; label 1 where they belong together.

    Args:
        source: quadruples with ``caption_0``, ``caption_1``, ``image_0`` and ``image_1``.
    """

    def __init__(self, source: Source):
        self.source = source

    def __len__(self) -> int:
        return 4 * len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        quadruple, pair = divmod(int(index), 4)
        caption, image = divmod(pair, 2)
        example = self.source[quadruple]
        return {
            "image": example[f"image_{image}"],
            "text": example[f"caption_{caption}"],
            "label": int(caption == image),
        }


def as_scores(values: np.ndarray, shown: Sequence[str] = ("image", "text")) -> np.ndarray:
    """Scores of all pairs in order, ``[..., 4 * n]``, as ``[..., n, 2 captions, 2 images]``.

    Args:
        values: one for each of :class:`QuadruplePairs`.
        shown: the modalities that the model was shown. What it does not see must tie to the last bit; rounding that
            depends on a row's place in its batch would decide ties.
    """
    scores = values.reshape(*values.shape[:-1], -1, 2, 2)
    one = scores[..., :1, :] if "text" not in shown else scores
    one = one[..., :1] if "image" not in shown else one
    return np.broadcast_to(one, scores.shape)
