"""Scores s(c, i) of every caption of an example with each of its pictures, by any model, for any probe.

A probe is a source of examples in one of two forms, which may be mixed with any further fields:

- quadruples, published or generated: ``caption_0``, ``caption_1``, ``image_0``, ``image_1``;
- one picture with several captions: ``image``, ``captions``.

A scorer takes a probe and gives float64 ``[examples, captions, images]``. What must be equal by the nature of a scorer
is equal to the last bit: a feature that depends on the text alone is computed once a text and not once a pair, and a
caption that stands in an example twice is scored once. Without that, rounding that depends on a row's place in its
batch decides ties, and a control that cannot see seems to.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from vla_jax.backbones.clip import normalise
from vla_jax.data.cached import evaluate
from vla_jax.data.pipeline import Pipeline
from vla_jax.data.stages import Row, Source
from vla_jax.errors import UserError, unknown
from vla_jax.model import MODALITIES, AdaptedModel
from vla_jax.names import Tree
from vla_jax.training.sharding import MeshConfig, batch_sharding, check_batch, make_mesh

Scorer = Callable[[Source], np.ndarray]
Score = Literal["head", "cosine"]
SCORES: tuple[Score, ...] = ("head", "cosine")
_AT_A_TIME = 1024  # examples whose products are held at once
Compute = Callable[[Tree, Mapping[str, jax.Array]], Mapping[str, jax.Array]]


def captions_of(example: Mapping[str, Any]) -> Sequence[str]:
    """An example's captions, in order."""
    return example["captions"] if "captions" in example else (example["caption_0"], example["caption_1"])


def images_of(example: Mapping[str, Any]) -> Sequence[Any]:
    """An example's pictures, in order."""
    return (example["image"],) if "image" in example else (example["image_0"], example["image_1"])


@dataclasses.dataclass(frozen=True)
class Parts:
    """A probe's captions and pictures one by one: what a model is asked at a time.

    Example n with caption c and picture i stands at ``(n * captions + c) * images + i``, of ``captions`` and
    ``images`` in each example; a modality that is not shown counts as one.

    Attributes:
        source: the probe.
        shown: ``image``, ``text`` or both.
    """

    source: Source
    shown: tuple[str, ...] = MODALITIES

    def __post_init__(self):
        if len(self.source) == 0:
            raise UserError("the probe holds no example")

    @functools.cached_property
    def shape(self) -> tuple[int, int, int]:
        """Examples, captions and pictures; of the first example, and so of all."""
        example = self.source[0]
        counts = {"text": len(captions_of(example)), "image": len(images_of(example))}
        texts, images = (counts[name] if name in self.shown else 1 for name in ("text", "image"))
        return len(self.source), texts, images

    def __len__(self) -> int:
        return int(np.prod(self.shape))

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, caption, image = (int(place) for place in np.unravel_index(int(index), self.shape))
        example = self.source[number]
        part: dict[str, Any] = {}
        if "text" in self.shown:
            captions = list(captions_of(example))
            self._check(number, len(captions), self.shape[1], "captions")
            part |= {"text": captions[caption], "same_as": captions.index(captions[caption])}
        if "image" in self.shown:
            images = images_of(example)
            self._check(number, len(images), self.shape[2], "pictures")
            part |= {"image": images[image]}
        return part

    @staticmethod
    def _check(number: int, found: int, expected: int, what: str) -> None:
        if found != expected:
            raise UserError(
                f"example {number} of the probe has {found} {what} and the first one {expected}; all must have as many"
            )


@dataclasses.dataclass(frozen=True)
class Reading:
    """Makes rows of the batch contract of :class:`Parts`.

    Attributes:
        preprocess: the picture's transformation, :class:`vla_jax.data.image.Preprocess`.
        tokenize: the text's transformation, :class:`vla_jax.data.text.Tokenize`.
        route: the adapter (task) of all rows; -1 is the bare backbone.
    """

    preprocess: Callable[[Any, np.random.Generator | None], np.ndarray]
    tokenize: Callable[[str], tuple[np.ndarray, np.ndarray]]
    route: int = 0

    def __call__(self, part: Mapping[str, Any], generator: np.random.Generator | None = None) -> Row:
        """The row of one part; ``same_as`` int32 [] is the first caption of its example with the same words."""
        row: Row = {"route": np.asarray(self.route, np.int32), "same_as": np.asarray(part.get("same_as", 0), np.int32)}
        if "text" in part:
            row["tokens"], row["text_mask"] = self.tokenize(part["text"])
        if "image" in part:
            row["image"] = self.preprocess(part["image"], generator)
        return row


@dataclasses.dataclass(frozen=True)
class Asking:
    """Runs a model over the parts of a probe, in batches.

    Attributes:
        reading: makes rows.
        batch_size: rows at a time.
        mesh: where; all devices if None.
    """

    reading: Reading
    batch_size: int = 64
    mesh: jax.sharding.Mesh | None = None

    def __call__(self, compute: Compute, params: Tree, source: Source, shown: tuple[str, ...]) -> np.ndarray:
        """The results of all parts.

        Args:
            compute: compiled ``(params, batch) -> {"result": [batch, ...]}``.
            params: its first argument.
            source: the probe.
            shown: the modalities that a part has.

        Returns:
            ``[examples, captions, images, ...]``; a modality that is not shown counts as one.

        Raises:
            UserError: a picture cannot be decoded, or examples differ in the number of captions or pictures.
        """
        mesh = make_mesh(MeshConfig()) if self.mesh is None else self.mesh
        check_batch(self.batch_size, mesh)
        parts = Parts(source, shown)
        # Every picture counts here, so that none may be passed over: what is missing is named below.
        pipeline = Pipeline(parts, self.reading, self.batch_size, training=False, max_bad_share=0.999)
        run = functools.partial(compute, params)
        with jax.set_mesh(mesh):
            found = evaluate(pipeline, run, batch_sharding(mesh), keep=("same_as",))
        if len(found["index"]) < len(parts):
            absent = np.setdiff1d(np.arange(len(parts)), found["index"]) // (parts.shape[1] * parts.shape[2])
            raise UserError(
                f"pictures of {len(np.unique(absent))} of {len(source)} examples cannot be decoded, first of example "
                f"{absent[0]}; a probe is scored whole, so replace the files"
            )
        result = found["result"].reshape(*parts.shape, *found["result"].shape[1:])
        return result[np.arange(len(source))[:, None], found["same_as"].reshape(parts.shape)[:, :, 0]]


def model_scorer(model: AdaptedModel, params: Tree, asking: Asking, score: Score = "head") -> Scorer:
    """The scorer that a model is.

    Which kind it is follows from the model: with ``cosine``, a dual encoder encodes each caption and each picture
    once, and a model whose features of one modality depend on the other (fusion adapters) encodes each pair; with
    ``head``, the task's head judges each pair by its ``score``. A model that is shown one modality alone
    (:attr:`AdaptedModel.modalities`) is asked once for it, whatever stands beside it.

    Args:
        model: the model.
        params: its whole tree.
        asking: how batches are made and where they are computed.
        score: ``head``, or ``cosine`` of the two features, for which no head need be trained.

    Raises:
        UserError: another kind of score, a task whose predictions have none, or a cosine of one modality alone.
    """
    if score not in SCORES:
        raise unknown("score", score, SCORES)
    if score == "head":
        return _by_parts(jax.jit(functools.partial(_head_score, model)), params, asking, model.modalities)
    if set(model.modalities) != set(MODALITIES):
        raise UserError(
            f"a cosine needs both features, and this model is shown the {model.modalities[0]} alone; use score='head'"
        )
    if model.plan.needs_pairs:
        return _by_parts(jax.jit(functools.partial(_pair_cosine, model)), params, asking, MODALITIES)
    image, text = (
        jax.jit(functools.partial(_feature, dataclasses.replace(model, modalities=(name,)), name))
        for name in ("image", "text")
    )

    def dual_encoder(source: Source) -> np.ndarray:
        images = asking(image, params, source, ("image",))[:, 0].astype(np.float64)  # [examples, images, projection]
        texts = asking(text, params, source, ("text",))[:, :, 0].astype(np.float64)  # [examples, captions, projection]
        scores = np.empty((len(texts), texts.shape[1], images.shape[1]))
        for start in range(0, len(texts), _AT_A_TIME):
            part = slice(start, start + _AT_A_TIME)
            # Every pair by itself and in one order, so that equal features give equal cosines; `@` does not promise it.
            scores[part] = (texts[part, :, None] * images[part, None]).sum(-1)
        return scores

    return dual_encoder


def _by_parts(compute: Compute, params: Tree, asking: Asking, shown: tuple[str, ...]) -> Scorer:
    def scorer(source: Source) -> np.ndarray:
        found = asking(compute, params, source, shown).astype(np.float64)
        return np.broadcast_to(found, Parts(source).shape).copy()

    return scorer


def _head_score(model: AdaptedModel, params: Tree, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    # Tasks compare with a label; which one is of no account for the score.
    label = jax.numpy.zeros_like(batch["route"])
    found = model.predict(params, {**batch, "label": label})
    if "score" not in found:
        raise UserError(
            f"the task {model.task.name!r} gives no score of a pair, but {', '.join(found)}; use a matching head, or "
            "score='cosine'"
        )
    return {"result": found["score"]}


def _pair_cosine(model: AdaptedModel, params: Tree, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    output = model.apply(params, batch)
    return {"result": (normalise(output.image_features) * normalise(output.text_features)).sum(-1)}


def _feature(model: AdaptedModel, modality: str, params: Tree, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {"result": normalise(getattr(model.apply(params, batch), f"{modality}_features"))}
