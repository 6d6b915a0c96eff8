"""Domains that a backbone was not made for, as the classification of pictures: textile defects and shifted scenes.

Both have as many pictures of each class as of every other, so that chance is the same for all and a number of labels a
class says everything about a training set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax.backbones.loading import Backbone
from vla_jax.data.builders.textile_defects import CLASSES
from vla_jax.data.cached import ArraySource, as_rows
from vla_jax.data.image import Preprocess
from vla_jax.data.pipeline import TransformExample
from vla_jax.data.scenes import SceneConfig, SceneSource, Shift
from vla_jax.data.scenes.vocabulary import CLASS_TEMPLATES, SHAPES
from vla_jax.data.sources import load_source
from vla_jax.data.stages import stack
from vla_jax.data.text import Tokenize
from vla_jax.errors import UserError, unknown
from vla_jax.evaluation.few_shot import draw_shots
from vla_jax.tasks.classification import Classification, ZeroShotClassification
from vla_jax.variants import TaskData

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class DomainSizes:
    """How many pictures a split has at most, all classes together, and where built data lie.

    Attributes:
        train: for training.
        validation: for choosing learning rates.
        test: for testing.
        data_dir: where data sets are built and kept.
    """

    train: int = 2_048
    validation: int = 240
    test: int = 800
    data_dir: str = "data"

    def __post_init__(self):
        if min(self.train, self.validation, self.test) < 2:
            raise UserError("train, validation and test must be at least 2")


@dataclasses.dataclass(frozen=True)
class Description:
    """What is known of a domain before its pictures are read.

    Attributes:
        title: in tables and figures.
        classes: names of the classes, in the order of labels.
        named: whether the names are words that the backbone of the generated scenes knows.
        examples: those of a split with ``image`` and ``label``, for pictures of a size: ``(split, size, sizes)``.
    """

    title: str
    classes: tuple[str, ...]
    named: bool
    examples: Callable[[str, int, DomainSizes], list[Mapping[str, Any]]]


def _textile_defects(split: str, size: int, sizes: DomainSizes) -> list[Mapping[str, Any]]:
    del size  # pictures have their own, and are resized
    source = load_source("textile_defects", split, Path(sizes.data_dir))
    return [source[index] for index in range(len(source))]


def _shifted_scenes(split: str, size: int, sizes: DomainSizes) -> list[Mapping[str, Any]]:
    # A seed a shape: else the first of all shapes would have one colour, in one place.
    each = getattr(sizes, split) // len(SHAPES)
    configs = [SceneConfig(seed, image_size=size, shapes=(name,), shift=Shift()) for seed, name in enumerate(SHAPES)]
    sources = [SceneSource(split, "classes", config, max(each, 1)) for config in configs]
    return [source[index] for source in sources for index in range(each)]


DOMAINS: Mapping[str, Description] = {
    "textile_defects": Description("textile defects", CLASSES, False, _textile_defects),
    "shifted_scenes": Description("shifted scenes", SHAPES, True, _shifted_scenes),
}
"""The domains by name. Those of the shifted scenes' pictures that hold a single object are told apart by its shape."""


@dataclasses.dataclass(frozen=True)
class Domain:
    """A domain with its pictures.

    Attributes:
        name: one of :data:`DOMAINS`.
        data: the task and its splits, pictures as the backbone takes them.
        labels: int ``[examples]`` of the training split.
        by_name: the same task by the classes' names, without training; None where the names say nothing.
    """

    name: str
    data: TaskData
    labels: np.ndarray
    by_name: ZeroShotClassification | None

    @property
    def most(self) -> int:
        """Labels a class, if all are used."""
        return int(np.bincount(self.labels).min())

    def draws(self, labels: int, seeds: tuple[int, ...]) -> dict[int, np.ndarray]:
        """By seed, places in the training split of so many examples of each class.

        Those of fewer labels are among those of more.
        """
        return {seed: draw_shots(self.labels, labels, seed) for seed in seeds}


def describe(name: str) -> Description:
    """A domain by name.

    Raises:
        UserError: if there is none.
    """
    if name not in DOMAINS:
        raise unknown("domain", name, DOMAINS)
    return DOMAINS[name]


def domain_task(name: str) -> Classification:
    """A domain's task, without its data."""
    return Classification(name, len(describe(name).classes))


def domain_pictures(name: str, split: str, sizes: DomainSizes, size: int) -> list[Mapping[str, Any]]:
    """The pictures of a split as they are, with ``image`` and ``label``, as many of each class.

    Args:
        name: one of :data:`DOMAINS`.
        split: one of :data:`SPLITS`.
        sizes: the most that splits may have.
        size: of pictures that are drawn, in pixels.

    Raises:
        UserError: if there is no such domain, or the split has none of some class.
    """
    known = describe(name)
    classes = len(known.classes)
    examples = known.examples(split, size, sizes)
    labels = np.array([example["label"] for example in examples], np.int64)
    each = min(np.bincount(labels, minlength=classes).min(), getattr(sizes, split) // classes)
    if each < 1:
        raise UserError(
            f"the {split} split of {name!r} cannot have a picture of each of {classes} classes; raise sizes.{split}"
        )
    return [examples[place] for place in draw_shots(labels, each, seed=0)]


def domain(name: str, sizes: DomainSizes, backbone: Backbone) -> Domain:
    """A domain with its pictures in memory, which are few; the first use may build a data set.

    Args:
        name: one of :data:`DOMAINS`.
        sizes: the most that splits may have; there are as many of each class as of the rarest.
        backbone: says how pictures go in.

    Raises:
        UserError: if there is no such domain, or a split has none of some class.
    """
    known = describe(name)
    tokenize = Tokenize(backbone.tokenizer, backbone.config.context_length)
    transform = TransformExample(Preprocess(backbone.image_processor), tokenize, text_key=None, label_key="label")
    splits: dict[str, ArraySource] = {}
    for split in SPLITS:
        pictures = domain_pictures(name, split, sizes, backbone.config.image_size)
        splits[split] = ArraySource(stack([transform(example) for example in pictures]))
    by_name = None
    if known.named:
        by_name = ZeroShotClassification.of_names(f"{name}_by_name", known.classes, CLASS_TEMPLATES, tokenize)
    data = TaskData(domain_task(name), splits, as_rows)
    return Domain(name, data, splits["train"].arrays["label"], by_name)
