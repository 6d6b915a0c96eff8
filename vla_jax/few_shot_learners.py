"""Methods as the few-shot protocol takes them: what is trained by a comparison, and what only needs frozen features.

Each is a learner of :mod:`vla_jax.evaluation.few_shot`: from drawn examples and a seed to a classifier of the test
split with all choices made, the learning rate among them, on the validation examples of the same draw.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vla_jax.adapters import TipAdapter
from vla_jax.adapters.features import Labelled
from vla_jax.backbones.clip import CLIP, normalise
from vla_jax.backbones.loading import Backbone
from vla_jax.backbones.transformer import Compute
from vla_jax.comparison import Comparison
from vla_jax.data.cached import Chosen, evaluate
from vla_jax.data.pipeline import Pipeline
from vla_jax.data.stages import Row, Transform
from vla_jax.errors import UserError
from vla_jax.evaluation.few_shot import Classifier, Learner, split_classes
from vla_jax.few_shot_data import Pool
from vla_jax.model import Task
from vla_jax.tasks.classification import ZeroShotClassification
from vla_jax.training.sharding import batch_sharding, place, replicated
from vla_jax.variants import Outcome, Probe, TaskData, Variant


class FrozenFeatures:
    """The plain backbone's features of a pool's pictures and of its classes, computed once."""

    def __init__(
        self,
        backbone: Backbone,
        task: ZeroShotClassification,
        pool: Pool,
        transform: Transform,
        compute: Compute,
        mesh: jax.sharding.Mesh,
        batch_size: int,
    ):
        """Nothing is computed yet.

        Args:
            backbone: the backbone.
            task: says what texts name the classes.
            pool: the pictures.
            transform: makes pixels of them.
            compute: how the backbone is run.
            mesh: where.
            batch_size: pictures at a time.
        """
        self.pool, self._task, self._transform, self._batch_size = pool, task, transform, batch_size
        self._clip, self._sharding = CLIP(backbone.config, compute), batch_sharding(mesh)
        self._params = place(backbone.params, replicated(mesh))
        self._images = jax.jit(
            lambda params, batch: {
                "feature": normalise(self._clip.apply({"params": params}, batch["image"]).image_features)
            }
        )
        self._found: dict[str, np.ndarray] = {}

    def images(self, split: str, places: np.ndarray) -> np.ndarray:
        """Normalised features of examples at these places of the whole split, float32 ``[places, width]``."""
        if split not in self._found:
            pipeline = Pipeline(self.pool.splits[split], self._transform, self._batch_size, training=False)
            compute = functools.partial(self._images, self._params)
            found = evaluate(pipeline, compute, self._sharding, description=f"features, {split}")
            if len(found["index"]) < len(self.pool.places[split]):
                raise UserError(f"pictures of the {split} split cannot be decoded; mend or remove them")
            self._found[split] = found["feature"][np.argsort(found["index"])]
        return self._found[split][self.pool.here(split, places)]

    @functools.cached_property
    def classes(self) -> np.ndarray:
        """One normalised feature a class, float32 ``[classes, width]``."""
        texts = normalise(self._clip.apply({"params": self._params}, None, *self._task.texts).text_features)
        each = texts.reshape(self._task.classes, -1, texts.shape[-1])
        return np.asarray(normalise(each.mean(1)), np.float32)

    def labelled(self, split: str, places: np.ndarray) -> Labelled:
        """Features and labels of examples of a split."""
        return Labelled(self.images(split, places), self.pool.labels[split][places])


def zero_shot(features: FrozenFeatures) -> Learner:
    """The backbone as it is, by the classes' names; it serves base-to-novel too."""

    def learn(train: np.ndarray, validation: np.ndarray, seed: int) -> Callable[..., np.ndarray]:
        del train, validation, seed

        def classify(places: np.ndarray, candidates: np.ndarray | None = None) -> np.ndarray:
            candidates = np.arange(len(features.classes)) if candidates is None else candidates
            scores = features.images("test", places) @ features.classes[candidates].T
            return candidates[scores.argmax(1)]

        return classify

    return learn


def tip(features: FrozenFeatures, settings: TipAdapter, *, trained: bool) -> Learner:
    """Tip-Adapter, or Tip-Adapter-F where its keys are trained."""

    def learn(train: np.ndarray, validation: np.ndarray, seed: int) -> Classifier:
        given = features.labelled("train", train), features.labelled("validation", validation), features.classes
        fitted = settings.fit_keys(*given, jax.random.key(seed)) if trained else settings.fit(*given)
        return lambda places: np.asarray(fitted.cache.logits(features.images("test", places))).argmax(1)

    return learn


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a trained method is given: a task with its data, and what its predictions stand for.

    Attributes:
        data: the task with its data; places of training and validation examples are those of a pool's splits.
        tested: by name of predictions (the test split, or a probe), places in the whole test split.
        first: by name of predictions, the class that a prediction of 0 stands for.
    """

    data: TaskData
    tested: Mapping[str, np.ndarray]
    first: Mapping[str, int]


def all_classes(pool: Pool, task: Task, transform: Transform) -> Problem:
    """Telling all classes apart."""
    data = TaskData(task, pool.splits, transform)
    return Problem(data, {"test": pool.places["test"]}, {"test": 0})


def halves_of(pool: Pool, name_classes: Callable[[slice], ZeroShotClassification], transform: Transform) -> Problem:
    """Telling the base classes apart in training, and the novel ones in a test of their own.

    Args:
        pool: the pictures.
        name_classes: makes the task of some of the classes.
        transform: makes rows of pictures.
    """
    labels = pool.labels["test"]
    base, novel = split_classes(int(labels.max()) + 1)
    tested = {"test": np.flatnonzero(np.isin(labels, base)), "novel": np.flatnonzero(np.isin(labels, novel))}
    splits = dict(pool.splits) | {"test": Chosen(pool.splits["test"], tested["test"])}
    moved = Moved(transform, len(base))
    named = name_classes(slice(len(base), None))
    probe = Probe(Chosen(pool.splits["test"], tested["novel"]), moved, named)
    data = TaskData(name_classes(slice(len(base))), splits, transform, {"novel": probe})
    return Problem(data, tested, {"test": 0, "novel": len(base)})


@dataclasses.dataclass(frozen=True)
class Moved:
    """A transform whose labels are counted from another class.

    Attributes:
        transform: with ``label`` among its fields.
        first: the class that is 0 from here on.
    """

    transform: Transform
    first: int

    def __call__(self, example: Mapping[str, Any], generator: np.random.Generator | None = None) -> Row:
        row = self.transform(example, generator)
        return row | {"label": row["label"] - self.first}


@dataclasses.dataclass
class Trained:
    """A method that is trained, as a learner; it remembers what came of it.

    Attributes:
        comparison: on the problem's data.
        problem: what is to be told apart.
        pool: the pictures.
        variant: the method.
        folder: where its runs are kept.
        told: what came of it, by shots and seed.
    """

    comparison: Comparison
    problem: Problem
    pool: Pool
    variant: Variant
    folder: Path
    told: dict[tuple[int, int], Outcome] = dataclasses.field(default_factory=dict)

    def __call__(self, train: np.ndarray, validation: np.ndarray, seed: int) -> Callable[..., np.ndarray]:
        """Trains on drawn examples; see :data:`vla_jax.evaluation.few_shot.Learner`."""
        shots = int(np.bincount(self.pool.labels["train"][train]).max())
        drawn, checked = self.pool.here("train", train), self.pool.here("validation", validation)
        outcome = self.comparison.drawing({seed: drawn}, self.folder / f"shots_{shots}", checked).run(self.variant)
        # The protocol has no use for the weights, which are on disk.
        self.told[shots, seed] = dataclasses.replace(outcome, trained={}, predictions={})
        # A picture that cannot be decoded has no prediction: no class is right for it.
        said = {name: np.full(len(self.pool.labels["test"]), -1) for name in self.problem.tested}
        for name, places in self.problem.tested.items():
            found = outcome.predictions[name]
            said[name][places[found["index"][0]]] = found["prediction"][0] + self.problem.first[name]

        def classify(places: np.ndarray, candidates: np.ndarray | None = None) -> np.ndarray:
            novel = candidates is not None and candidates[0] > 0
            return said["novel" if novel else "test"][places]

        return classify
