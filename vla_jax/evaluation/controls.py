"""What a result must be read beside: scorers that cannot bind words to things, on the same probe.

- A constant scorer: every comparison is a tie. A metric that gives it points counts ties as right.
- Text only: the model is shown one and the same picture for all. What it still gets right, the words give away.
- Image only: the model is shown one and the same caption for all.

The latter two blind a given model. A model that was trained without a modality (``AdaptedModel.modalities``) had reason
to learn what the other gives away and is the harder control; give it, and plain fine-tuning without the idea in
question, as further scorers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_jax.data.stages import Source
from vla_jax.errors import UserError
from vla_jax.evaluation.scorers import Parts, Scorer, captions_of, images_of

MODEL, CONSTANT, TEXT_ONLY, IMAGE_ONLY = "model", "constant", "text only", "image only"


def constant(source: Source) -> np.ndarray:
    """The scorer that says zero, float64 [examples, captions, images]."""
    return np.zeros(Parts(source).shape)


def text_only(scorer: Scorer) -> Scorer:
    """A scorer shown a plain grey picture in place of every other one; its scores do not depend on the picture."""
    return lambda source: _widened(scorer(_OnePicture(source)), source)


def image_only(scorer: Scorer) -> Scorer:
    """A scorer shown an empty text in place of every caption; its scores do not depend on the caption."""
    return lambda source: _widened(scorer(_OneCaption(source)), source)


def with_controls(scorer: Scorer, source: Source, others: Mapping[str, Scorer] | None = None) -> dict[str, np.ndarray]:
    """Scores of a model and of all controls.

    Args:
        scorer: the model's.
        source: the probe.
        others: further scorers by name, such as models trained on one modality, or by plain fine-tuning.

    Returns:
        By name (``model``, ``constant``, ``text only``, ``image only`` and those of ``others``) float64 [examples,
        captions, images].

    Raises:
        UserError: one of ``others`` has the name of a control.
    """
    scorers = {MODEL: scorer, CONSTANT: constant, TEXT_ONLY: text_only(scorer), IMAGE_ONLY: image_only(scorer)}
    others = others or {}
    if taken := sorted(scorers.keys() & others.keys()):
        raise UserError(f"the name {taken[0]!r} is that of a control made here; give the scorer another one")
    return {name: found(source) for name, found in (scorers | dict(others)).items()}


def _widened(scores: np.ndarray, source: Source) -> np.ndarray:
    return np.broadcast_to(scores, Parts(source).shape).copy()


@dataclass(frozen=True)
class _OnePicture:
    """A probe with a single grey picture in every example."""

    source: Source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"captions": captions_of(self.source[index]), "image": np.full((64, 64, 3), 127, np.uint8)}


@dataclass(frozen=True)
class _OneCaption:
    """A probe with a single empty caption in every example."""

    source: Source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.source[index]
        pictures = (
            {"image": example["image"]}
            if "image" in example
            else {f"image_{number}": picture for number, picture in enumerate(images_of(example))}
        )
        return {"captions": ("",)} | pictures
