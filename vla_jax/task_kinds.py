"""Kinds of tasks on any data set whose examples have the shared field names: head, transform and what is measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from vla_jax.backbones.loading import Backbone
from vla_jax.data.answers import AnswerCounts, AnswerVocabulary
from vla_jax.data.boxes import TargetBox
from vla_jax.data.image import AUGMENTATIONS, Preprocess
from vla_jax.data.pipeline import TransformExample
from vla_jax.data.stages import Row, Source, Transform
from vla_jax.data.text import Tokenize
from vla_jax.errors import UserError, unknown
from vla_jax.model import Task
from vla_jax.tasks.classification import Classification, ZeroShotClassification
from vla_jax.tasks.grounding import BoxPrediction
from vla_jax.tasks.matching import Matching, PairMatching
from vla_jax.tasks.retrieval import Retrieval
from vla_jax.tasks.vqa import AnswerClassification
from vla_jax.variants import TaskData


@dataclasses.dataclass(frozen=True)
class Setup:
    """How a task is put to a backbone.

    Attributes:
        text_length: tokens of a text; the backbone's context if that is shorter.
        augment: what training does to pictures: ``none``, ``crop``, or ``flip_crop`` where no text speaks of sides.
        classifier: of classification: ``linear`` on the features of the picture and of the text beside it, or
            ``names``, which compares pictures with texts that name the classes.
        templates: the sentences in which ``names`` puts them.
        prompt: the text beside a picture to be classified, where the data have none; for ``linear``.
        least_answers: questions that an answer must be right for, to be one of those a model chooses from; 9 is usual
            for VQAv2.
    """

    text_length: int = 40
    augment: Literal["none", "crop", "flip_crop"] = "none"
    classifier: Literal["linear", "names"] = "linear"
    templates: tuple[str, ...] = ("a photo of a {}",)
    prompt: str = "a photo"
    least_answers: int = 1

    def __post_init__(self):
        if self.augment not in AUGMENTATIONS:
            raise unknown("augmentation", self.augment, AUGMENTATIONS)
        if self.least_answers < 1:
            raise UserError(f"least_answers must be at least 1, got {self.least_answers}")
        if not self.prompt.strip():
            raise UserError("the prompt is empty; it is the text beside a picture that has none")

    def length(self, backbone: Backbone) -> int:
        """Tokens of a text for this backbone."""
        return min(self.text_length, backbone.config.context_length)


@dataclasses.dataclass(frozen=True)
class Measure:
    """Something that is told of a task.

    Attributes:
        field: of the predictions, bool or a number for each example.
        title: in tables.
    """

    field: str
    title: str


MEASURES: Mapping[str, tuple[Measure, ...]] = {
    "classification": (Measure("correct", "accuracy"), Measure("top_5", "top-5")),
    "matching": (Measure("correct", "accuracy"),),
    "retrieval": (Measure("image_to_text", "R@1 image to text"), Measure("text_to_image", "R@1 text to image")),
    "vqa": (Measure("accuracy", "VQA accuracy"), Measure("correct", "most frequent answer")),
    "grounding": (Measure("correct", "accuracy at IoU 0.5"), Measure("pointed", "pointing"), Measure("iou", "IoU")),
}
"""By kind of task, what is measured, the first thing foremost."""


@dataclasses.dataclass(frozen=True)
class Labels:
    """What a head chooses from; empty for kinds of tasks that have no such list.

    Attributes:
        names: of the classes, or the answers.
        annotators: the most answers a question has.
        key: the field with the answers.
        two_pictures: whether a text is about two pictures.
    """

    names: tuple[str, ...] = ()
    annotators: int = 1
    key: str = "answers"
    two_pictures: bool = False


@dataclasses.dataclass(frozen=True)
class Prompted:
    """A transform for examples that may have no text of their own."""

    transform: Transform
    prompt: str

    def __call__(self, example: Mapping[str, Any], generator: np.random.Generator | None = None) -> Row:
        return self.transform({"text": self.prompt, **example}, generator)


def task_of_kind(kind: str, labels: Labels, setup: Setup, backbone: Backbone) -> Task:
    """The task, without its data.

    Raises:
        UserError: if there is no such kind, or fewer than two classes or answers.
    """
    if kind not in MEASURES:
        raise unknown("task", kind, MEASURES)
    if kind == "classification" and setup.classifier == "names":
        tokenize = Tokenize(backbone.tokenizer, setup.length(backbone))
        return ZeroShotClassification.of_names(kind, labels.names, setup.templates, tokenize)
    makers: Mapping[str, Callable[[], Task]] = {
        "classification": lambda: Classification(kind, len(labels.names)),
        "matching": lambda: PairMatching(kind) if labels.two_pictures else Matching(kind),
        "retrieval": lambda: Retrieval(kind),
        "vqa": lambda: AnswerClassification(kind, len(labels.names)),
        "grounding": lambda: BoxPrediction(kind),
    }
    return makers[kind]()


def transform_of_kind(kind: str, labels: Labels, setup: Setup, backbone: Backbone, text_key: str) -> Transform:
    """What makes a row of an example of the task.

    Args:
        kind: of the task.
        labels: what its head chooses from.
        setup: how it is put.
        backbone: says how pictures and texts go in.
        text_key: the field with the text.
    """
    preprocess = Preprocess(backbone.image_processor, augment=setup.augment)
    tokenize = Tokenize(backbone.tokenizer, setup.length(backbone))
    fields: dict[str, Any] = {"text_key": text_key}
    if kind in ("classification", "matching"):
        fields["label_key"] = "label"
    if labels.two_pictures:
        fields["image_key"] = ("image_0", "image_1")
    if kind == "vqa":
        vocabulary = AnswerVocabulary(labels.names)
        fields["parts"] = (AnswerCounts(vocabulary, places=max(labels.annotators, 1), key=labels.key),)
    if kind == "grounding":
        fields["parts"] = (TargetBox(),)
    if kind == "classification" and setup.classifier == "names":
        fields["text_key"] = None
    transform = TransformExample(preprocess, tokenize, **fields)
    return Prompted(transform, setup.prompt) if kind == "classification" else transform


def answer_labels(answers: Mapping[str, Sequence[Sequence[str]]], setup: Setup, key: str = "answers") -> Labels:
    """The answers that a model chooses from: those of the training questions.

    Args:
        answers: by split, the annotators' answers to each question.
        setup: says how often one must have been given.
        key: the field that has them.
    """
    vocabulary = AnswerVocabulary.build(answers["train"], least=setup.least_answers)
    most = max(len(given) for questions in answers.values() for given in questions)
    return Labels(vocabulary.answers, most, key)


TEXT_KEYS: Mapping[str, str] = {
    "classification": "text",
    "matching": "text",
    "retrieval": "caption",
    "vqa": "question",
    "grounding": "phrase",
}
"""By kind of task, the field with its text."""


def data_of_kind(kind: str, labels: Labels, setup: Setup, backbone: Backbone, splits: Mapping[str, Source]) -> TaskData:
    """The task with its data, as a backbone takes them.

    Args:
        kind: of the task.
        labels: what its head chooses from.
        setup: how it is put.
        backbone: the backbone.
        splits: examples of ``train``, ``validation`` and ``test``.
    """
    several = kind == "retrieval" and "captions" in _fields(splits["train"])
    text_key = "captions" if several else TEXT_KEYS[kind]
    transform = transform_of_kind(kind, labels, setup, backbone, text_key)
    return TaskData(task_of_kind(kind, labels, setup, backbone), splits, transform)


def _fields(source: Source) -> Mapping[str, Any]:
    """An example, without its picture where that is cheaper."""
    return annotation(source, 0)


def annotation(source: Source, index: int) -> Mapping[str, Any]:
    """What is said in an example, without its pictures."""
    read = getattr(source, "annotation", source.__getitem__)
    fields = read(index)
    return {name: fields[name] for name in fields if not name.startswith("image") or name.startswith("image_id")}
