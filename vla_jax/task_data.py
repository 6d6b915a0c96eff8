"""The tasks that methods are compared on, with their data: statements on scenes, easy-VQA, retrieval among scenes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vla_jax.backbones.loading import Backbone
from vla_jax.data.builders.easy_vqa import QUESTION_KINDS
from vla_jax.data.builders.scenes import ScenesConfig
from vla_jax.data.image import Preprocess
from vla_jax.data.pipeline import TransformExample
from vla_jax.data.quadruple_pairs import QuadruplePairs
from vla_jax.data.scenes import SceneConfig
from vla_jax.data.scenes.vocabulary import STATEMENT_KINDS
from vla_jax.data.sources import load_source, make_builder
from vla_jax.data.stages import Source
from vla_jax.data.text import Tokenize
from vla_jax.data.twin_pairs import Negatives, TwinPairs
from vla_jax.errors import UserError, unknown
from vla_jax.model import Task
from vla_jax.tasks.classification import Classification
from vla_jax.tasks.matching import Matching
from vla_jax.tasks.retrieval import Retrieval
from vla_jax.variants import Probe, TaskData

KINDS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "statements": ("statement_kind", tuple(STATEMENT_KINDS)),
    "easy_vqa": ("question_kind", tuple(QUESTION_KINDS)),
}
"""By task, the field that says an example's kind, and the kinds; tasks without kinds are left out."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much data, and where it lies.

    Attributes:
        train: training examples of each task, or as many as there are.
        validation: validation examples of each task.
        test: test examples of each task.
        quadruples: Winoground-format quadruples, 0 for none.
        kept: pairs on which a model trained for something else is asked for what the backbone could do, 0 for none.
        text_length: tokens a statement or a question; must hold the longest.
        caption_length: tokens a caption.
        data_dir: where data sets are built and kept.
    """

    train: int = 16_000
    validation: int = 1_000
    test: int = 2_000
    quadruples: int = 0
    kept: int = 0
    text_length: int = 20
    caption_length: int = 40
    data_dir: str = "data"

    def __post_init__(self):
        if min(self.train, self.validation, self.test) < 1:
            raise UserError("train, validation and test must be at least 1")
        if min(self.quadruples, self.kept) < 0:
            raise UserError("quadruples and kept cannot be negative")

    @property
    def splits(self) -> dict[str, int]:
        """Examples by split."""
        return {"train": self.train, "validation": self.validation, "test": self.test}


def task(name: str) -> Task:
    """A task by name, without its data.

    Raises:
        UserError: if there is no task of that name.
    """
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    if name == "statements":
        return Matching("statements")
    if name == "retrieval":
        return Retrieval()
    answers = make_builder("easy_vqa", "data").info.features["answer_id"].num_classes
    return Classification("easy_vqa", answers)


def task_data(name: str, sizes: Sizes, backbone: Backbone) -> TaskData:
    """A task with its data, as a backbone takes them; the first use builds the data sets.

    Raises:
        UserError: if there is no task of that name.
    """
    trained = task(name)
    transform, splits = TASKS[name](sizes, backbone)
    probes = {}
    if name == "statements" and sizes.quadruples:
        probes["quadruples"] = Probe(QuadruplePairs(_test_scenes("quadruples", backbone, sizes, sizes.quadruples)))
    if name != "retrieval" and sizes.kept:
        captions = _test_scenes("captions", backbone, sizes, sizes.kept)
        look = _transform(backbone, sizes.caption_length, text_key="caption")
        probes["kept"] = Probe(captions, look, Retrieval(), pairs=False)
    return TaskData(trained, splits, transform, probes)


def examples_of(data: TaskData, index: np.ndarray) -> list[Mapping[str, Any]]:
    """The raw test examples that results stand for."""
    return [data.splits["test"][int(place)] for place in index]


def clusters(name: str, examples: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
    """Which examples stand or fall together: questions on one picture; None where each stands for itself."""
    return np.array([example["image_id"] for example in examples]) if name == "easy_vqa" else None


def of_kinds(name: str, examples: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """By kind, which examples are of it, bool ``[examples]``; kinds without examples are left out."""
    if name not in KINDS:
        return {}
    field, kinds = KINDS[name]
    found = {
        kind: np.array([_is_kind(example[field], kind, number) for example in examples])
        for number, kind in enumerate(kinds)
    }
    return {kind: chosen for kind, chosen in found.items() if chosen.any()}


def _is_kind(value: Any, kind: str, number: int) -> bool:
    """Whether a stored kind, a label or a text, is this one."""
    return value.decode() == kind if isinstance(value, bytes) else value in (kind, number)


def _transform(backbone: Backbone, length: int, **fields: str) -> TransformExample:
    return TransformExample(Preprocess(backbone.image_processor), Tokenize(backbone.tokenizer, length), **fields)


def scenes(kind: str, backbone: Backbone, sizes: Sizes) -> dict[str, Source]:
    """Generated scenes of the backbone's size; what is built is named by everything that makes it differ."""
    scene = SceneConfig(image_size=backbone.config.image_size)
    name = "_".join(map(str, [kind, scene.image_size, *sizes.splits.values()]))
    built = ScenesConfig(name=name, kind=kind, scene=scene, **sizes.splits)
    return {split: load_source("scenes", split, sizes.data_dir, built) for split in sizes.splits}


def _test_scenes(kind: str, backbone: Backbone, sizes: Sizes, count: int) -> Source:
    """Generated scenes for testing alone."""
    scene = SceneConfig(image_size=backbone.config.image_size)
    name = f"{kind}_{scene.image_size}_{count}"
    built = ScenesConfig(name=name, kind=kind, scene=scene, train=1, validation=1, test=count)
    return load_source("scenes", "test", sizes.data_dir, built)


def twin_pairs(
    negatives: Negatives, sizes: Mapping[str, int], backbone: Backbone, data_dir: str
) -> dict[str, TwinPairs]:
    """Pairs of twins of the backbone's size as pairs to judge.

    Args:
        negatives: where false captions come from.
        sizes: by split, pairs of twins; each gives four pairs to judge.
        backbone: the backbone.
        data_dir: where data sets are built and kept.
    """
    scene = SceneConfig(image_size=backbone.config.image_size)
    name = "_".join(map(str, ["twins", scene.image_size, *sizes.values()]))
    built = ScenesConfig(name=name, kind="twins", scene=scene, **sizes)
    return {split: TwinPairs(load_source("scenes", split, data_dir, built), negatives) for split in sizes}


def _statements(sizes: Sizes, backbone: Backbone) -> tuple[TransformExample, dict[str, Source]]:
    return _transform(backbone, sizes.text_length, label_key="label"), scenes("statements", backbone, sizes)


def _easy_vqa(sizes: Sizes, backbone: Backbone) -> tuple[TransformExample, dict[str, Source]]:
    splits = {split: load_source("easy_vqa", f"{split}[:{n}]", sizes.data_dir) for split, n in sizes.splits.items()}
    return _transform(backbone, sizes.text_length, text_key="question", label_key="answer_id"), splits


def _retrieval(sizes: Sizes, backbone: Backbone) -> tuple[TransformExample, dict[str, Source]]:
    return _transform(backbone, sizes.caption_length, text_key="caption"), scenes("captions", backbone, sizes)


TASKS: Mapping[str, Callable[[Sizes, Backbone], tuple[TransformExample, dict[str, Source]]]] = {
    "statements": _statements,
    "easy_vqa": _easy_vqa,
    "retrieval": _retrieval,
}
"""The tasks by name."""
