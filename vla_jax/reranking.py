"""Retrieval in two stages: the best candidates by their features are put in order by a model that judges pairs.

Features of the two modalities that know nothing of one another are computed once and compared cheaply. A fusion adapter
or a matching head must see every pair, and so sees the best few candidates of each query alone, as in ALBEF (Li et al.
2021).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from vla_jax.backbones.loading import Backbone
from vla_jax.data.answers import texts as as_texts
from vla_jax.data.each_caption import EachCaption
from vla_jax.data.pipeline import TransformExample
from vla_jax.errors import UserError
from vla_jax.evaluation.exact_ranks import Before
from vla_jax.evaluation.probe.models import saved_scorer
from vla_jax.evaluation.ranking import exact_top, rerank
from vla_jax.evaluation.scorers import Asking, Reading
from vla_jax.exchange.checkpoints import read_adapter

PairScores = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""``(captions int [pairs], pictures int [pairs]) -> scores float64 [pairs]``."""

SecondStage = Callable[[Before, np.ndarray, np.ndarray], Before]
"""``(ranks, images float [pictures, width], texts float [captions, width]) -> ranks``."""

_KEPT = 64  # pictures of which the pixels stay in memory


@dataclasses.dataclass(frozen=True)
class Rerank:
    """A second stage of retrieval.

    Attributes:
        adapters: a saved model that judges pairs, in any form: a run's checkpoints, one file, a checkpoint of peft. It
            judges by the matching head that was trained with it, else by the cosine of the features that it makes of
            the pair. No second stage if empty.
        top: how many candidates of each query it puts in order, those that are the best by their features.
    """

    adapters: str = ""
    top: int = 16

    def __post_init__(self):
        if self.top < 1:
            raise UserError(f"re-ranking puts at least 1 candidate in order, got top {self.top}")


class Judge:
    """A saved model that puts the best candidates in order.

    Attributes:
        name: how it judges, by the matching head (``head``) or the ``cosine`` of features, and how many candidates.
    """

    def __init__(self, rerank: Rerank, backbone: Backbone, transform: TransformExample, batch_size: int, mesh: Mesh):
        """Reads the model.

        Args:
            rerank: which one, and how many candidates.
            backbone: the one that the first stage has.
            transform: makes rows of pictures and texts.
            batch_size: pairs at a time.
            mesh: where it is run.

        Raises:
            UserError: if it cannot be read, was trained on another backbone, or judges no pairs.
        """
        path = Path(rerank.adapters).expanduser()
        saved = read_adapter(path, backbone.name)
        self._preprocess = transform.preprocess
        reading = Reading(lambda read, generator: read(), transform.tokenize)
        asking = Asking(reading, batch_size, mesh)
        self._scorer, score = saved_scorer(saved, backbone, asking, path)
        self._top, self.name = rerank.top, f"{score}, of the best {rerank.top}"

    def stage(self, split: EachCaption, captions: np.ndarray, pictures: np.ndarray, owner: np.ndarray) -> SecondStage:
        """What it makes of the ranks in a split.

        Args:
            split: pictures with captions.
            captions: int ``[captions]``, those of the split that are ranked.
            pictures: int ``[pictures]``, those of its source that are ranked.
            owner: int ``[captions]``, which of ``pictures`` each belongs to.

        Returns:
            ``(ranks, images float [pictures, width], texts float [captions, width]) -> ranks``, of their features.
        """
        scores = self._scores(split)

        def stage(before: Before, images: np.ndarray, texts: np.ndarray) -> Before:
            pairs = lambda text, image: scores(captions[text], pictures[image])  # noqa: E731
            return second_stage(before, images, texts, owner, self._top, pairs)

        return stage

    def _scores(self, split: EachCaption) -> PairScores:
        """Its scores of captions by their places in the split, with pictures by their places in its source."""
        texts = as_texts(split.annotation(place)["caption"] for place in range(len(split)))
        places: dict[str, int] = {}
        same_as = np.array([places.setdefault(text, place) for place, text in enumerate(texts)])

        @functools.lru_cache(maxsize=_KEPT)
        def read(picture: int) -> np.ndarray:
            return self._preprocess(split.source[picture]["image"], None)

        def scores(captions: np.ndarray, pictures: np.ndarray) -> np.ndarray:
            if not len(captions):
                return np.zeros(0)
            # Equal captions have equal scores to the last bit if a picture is judged with them once. Picture by
            # picture, each is decoded about once.
            asked = np.stack([pictures, same_as[captions]], axis=1)
            distinct, of_pair = np.unique(asked, axis=0, return_inverse=True)
            pairs = _Pairs([texts[place] for place in distinct[:, 1]], distinct[:, 0].tolist(), read)
            return self._scorer(pairs)[:, 0, 0][of_pair.reshape(-1)]

        return scores


@dataclasses.dataclass(frozen=True)
class _Pairs:
    """Pairs of a caption and a picture's place, in the form of a probe; a picture is what reads it."""

    captions: Sequence[str]
    pictures: Sequence[int]
    read: Callable[[int], np.ndarray]

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return {"image": functools.partial(self.read, self.pictures[index]), "captions": (self.captions[index],)}


def second_stage(
    before: Before, images: np.ndarray, texts: np.ndarray, owner: np.ndarray, top: int, scores: PairScores
) -> Before:
    """Ranks after the best candidates of both directions have been put in order.

    Args:
        before: the ranks of the first stage.
        images: float32 ``[pictures, width]``, its features.
        texts: float32 ``[captions, width]``.
        owner: int ``[captions]``, which picture each belongs to.
        top: how many candidates of each query are put in order; all where there are fewer.
        scores: of pairs, captions and pictures by their rows here.

    Returns:
        The ranks as :func:`vla_jax.evaluation.ranking.rerank` counts them.
    """
    captions, _ = exact_top(images, texts, min(top, len(texts)))
    pictures, _ = exact_top(texts, images, min(top, len(images)))
    of_pictures = owner[captions] == np.arange(len(images))[:, None]
    return Before(
        rerank(before.image_to_text, captions, of_pictures, lambda picture, caption: scores(caption, picture)),
        rerank(before.text_to_image, pictures, pictures == owner[:, None], scores),
    )
